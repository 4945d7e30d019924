"""What a job does: score a reference, train a run, or gather a sweep's results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from omegaconf import DictConfig

from mrpo_lab.runs.naming import run_name
from mrpo_lab.training.interruption import Interruption

T = TypeVar("T", bound="Task")


@dataclass(frozen=True)
class Task:
    """Plain values, written to ``tasks.json`` by who submits and read by the job."""

    kind: ClassVar[str]
    sweep: str
    """Folder of the sweep."""

    @property
    def title(self) -> str:
        return self.kind

    @property
    def gives(self) -> list[str]:
        """What exists once it has succeeded."""
        return []

    @property
    def needs(self) -> list[str]:
        """What must exist before it begins."""
        return []

    def perform(self, interruption: Interruption) -> None:
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Score(Task):
    """One reference on all data sets that lack its scores: two jobs would wait for each other."""

    kind = "score"
    slug: str
    path: str
    runs: dict[str, dict[str, Any]]
    """Key of the scores to the overrides and ``conf`` of a run that needs them."""

    @property
    def title(self) -> str:
        return f"score {self.slug}"

    @property
    def gives(self) -> list[str]:
        return [f"scores {key}" for key in self.runs]

    def perform(self, interruption: Interruption) -> None:
        from launchers.scores import put_mark
        from mrpo_lab.experiment import score_reference

        for key, run in self.runs.items():
            cfg, _ = compose(Path(self.sweep) / run["conf"], run["overrides"])
            put_mark(key, self.slug, score_reference(cfg, self.slug))


@dataclass(frozen=True)
class Train(Task):
    """One run, as ``train.py`` with the same overrides would do it."""

    kind = "train"
    name: str
    overrides: list[str]
    conf: str
    """Folder below the sweep's with the configuration files as they were when it was asked for."""
    scores: list[str]

    @property
    def title(self) -> str:
        return self.name

    @property
    def gives(self) -> list[str]:
        return [f"run {self.name}"]

    @property
    def needs(self) -> list[str]:
        return [f"scores {key}" for key in self.scores]

    def perform(self, interruption: Interruption) -> None:
        from mrpo_lab.experiment import run_experiment

        cfg, name = compose(Path(self.sweep) / self.conf, self.overrides)
        assert name == self.name, f"{self.name} was asked for, its configuration is of {name}"
        run_experiment(cfg, name, interruption)


@dataclass(frozen=True)
class Gather(Task):
    """The sweep's table, after all else."""

    kind = "gather"

    def perform(self, interruption: Interruption) -> None:
        from launchers.gather import gather
        from launchers.sweep import Sweep

        print(gather(Sweep(Path(self.sweep))), flush=True)


def compose(conf: Path, overrides: Sequence[str]) -> tuple[DictConfig, str]:
    """The configuration of a run, and the run's name."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from launchers.composing import without_hydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    name = run_name(str(cfg.name), cfg.hydra.runtime.choices, list(overrides))
    return without_hydra(cfg), name


def read_tasks(file: Path) -> list[Task]:
    kinds = {cls.kind: cls for cls in (Score, Train, Gather)}
    tasks = json.loads(file.read_text())["tasks"]
    return [kinds[task.pop("kind")](**task) for task in tasks]
