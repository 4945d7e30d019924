"""Hydra plugins for ``-m``: a sweeper, and launchers that hand runs to ``launchers/``.

Hydra looks for plugins in this namespace and imports them at every command, ``-m`` or not. What
only sweeps need is therefore imported in the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from mrpo_lab.storage.files import local_path


class GridSweeper(Sweeper):
    """Runs all combinations of each grid in ``conf/sweep``, narrowed by the command line."""

    def __init__(self, grids: Mapping[str, Mapping[str, str]]) -> None:
        self.grids = grids

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from hydra.core.plugins import Plugins

        self.loader = hydra_context.config_loader
        self.chosen_launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from launchers.grid import expand

        runs = expand(self.grids, arguments, self.loader)
        returned = self.chosen_launcher.launch(runs, 0)
        for run in returned:
            _ = run.return_value  # raises what the run raised
        return [returned]


class _DispatchLauncher(Launcher):
    """Hands a sweep to a cluster; ``settings`` are the keys of the profile."""

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
        launch(
            name=str(config.hydra.runtime.choices.get("sweep") or config.name),
            outputs=local_path(config.outputs),
            overrides=[list(overrides) for overrides in job_overrides],
            composer=Composer(self.loader, config),
            profile={str(key): value for key, value in profile.items()},
        )
        return []


class SlurmLauncher(_DispatchLauncher):
    """Runs a sweep on SLURM."""

    cluster = "slurm"


class LocalLauncher(_DispatchLauncher):
    """Runs a sweep on this machine, in the background."""

    cluster = "local"
