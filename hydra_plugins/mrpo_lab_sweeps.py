"""What Hydra calls for ``-m``. It looks for plugins in this namespace alone; see ``launchers/``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from mrpo_lab.cli import fail
from mrpo_lab.errors import UserError


@contextmanager
def said() -> Iterator[None]:
    """Print what the user can mend; Hydra's caller then only ends."""
    try:
        yield
    except UserError as error:
        fail(str(error))
        raise


class RectangleSweeper(Sweeper):
    """Runs the products of ``conf/sweep``'s rectangles, which the command line may narrow."""

    def __init__(self, rectangles: Mapping[str, Mapping[str, str]]) -> None:
        self.rectangles = rectangles

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from hydra.core.plugins import Plugins

        self.loader = hydra_context.config_loader
        self.chosen = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from launchers.rectangles import expand

        with said():
            runs = expand(self.rectangles, arguments, self.loader)
        returned = self.chosen.launch(runs, 0)
        for run in returned:
            _ = run.return_value  # raises what the run raised
        return [returned]


class _DispatchLauncher(Launcher):
    """Hands a sweep to a cluster; ``settings`` are the profile's keys."""

    cluster: str

    def __init__(self, **settings: Any) -> None:
        self.profile = {"cluster": self.cluster, **settings}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from launchers.composing import Composer
        from launchers.dispatch import launch

        config = self.config
        profile = OmegaConf.to_container(OmegaConf.create(self.profile), resolve=True)
        assert isinstance(profile, dict)
        with said():
            launch(
                name=str(config.hydra.runtime.choices.get("sweep") or config.name),
                outputs=Path(config.outputs),
                overrides=[list(overrides) for overrides in job_overrides],
                composer=Composer(self.loader, config),
                profile={str(key): value for key, value in profile.items()},
            )
        return []


class SlurmLauncher(_DispatchLauncher):
    cluster = "slurm"


class LocalLauncher(_DispatchLauncher):
    cluster = "local"
