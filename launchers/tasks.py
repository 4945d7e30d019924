"""Tasks of a sweep as plain data: score a reference, train a run, or gather the results.

A task only says what is to be done; ``launchers/job.py`` does it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from mrpo_lab.storage.checksums import DamagedError, read_json, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What one job does: plain values, written to ``tasks.json`` when the job is submitted."""

    kind: ClassVar[str]
    sweep: str
    """Folder of the sweep."""

    @property
    def title(self) -> str:
        """Name of the task for people; unique within a sweep."""
        return self.kind

    @property
    def outputs(self) -> list[str]:
        """Names of what exists once the task has succeeded: ``run NAME`` or ``scores KEY``."""
        return []

    @property
    def inputs(self) -> list[str]:
        """Names of the outputs of other tasks that must exist before this one begins."""
        return []


@dataclass(frozen=True)
class Score(Task):
    """Score one reference on every data set that lacks it.

    One task, because two would block on the lock that the store has for each reference.
    """

    kind = "score"
    slug: str
    path: str
    runs: dict[str, dict[str, Any]]
    """Key of the scores to the ``overrides`` and ``conf`` of a run that needs them."""

    @property
    def title(self) -> str:
        return f"score {self.slug}"

    @property
    def outputs(self) -> list[str]:
        return [f"scores {key}" for key in self.runs]


@dataclass(frozen=True)
class Train(Task):
    """Train one run, as ``train.py`` with the same overrides would."""

    kind = "train"
    name: str
    overrides: list[str]
    conf: str
    """Folder, below the sweep's, of the configuration files as they were when dispatched."""
    scores: list[str]
    """Keys of the reference scores that the run needs."""

    @property
    def title(self) -> str:
        return self.name

    @property
    def outputs(self) -> list[str]:
        return [f"run {self.name}"]

    @property
    def inputs(self) -> list[str]:
        return [f"scores {key}" for key in self.scores]


@dataclass(frozen=True)
class Gather(Task):
    """Write the sweep's table of results, after all other tasks have ended."""

    kind = "gather"


KINDS: dict[str, type[Task]] = {cls.kind: cls for cls in (Score, Train, Gather)}


def write_tasks(file: Path, tasks: Iterable[Task]) -> None:
    """Write the tasks of one array; a task's index is its place in the list."""
    write_json(file, {"tasks": [{"kind": task.kind, **asdict(task)} for task in tasks]}, bound=True)


def read_tasks(file: Path) -> list[Task]:
    """Read what ``write_tasks`` wrote.

    Raises:
        DamagedError: the file is missing or damaged, or was written for another array.
    """
    advice = f"its jobs are not known any more; delete {file.parent}"
    content = read_json(file, advice, bound=True)
    try:
        return [KINDS[task["kind"]](**_without_kind(task)) for task in content["tasks"]]
    except (KeyError, TypeError) as error:
        raise DamagedError(file, "it does not list tasks", advice) from error


def known_tasks(array: Path) -> list[Task]:
    """Tasks of the array in a folder; empty if its file is damaged, which is said once."""
    try:
        return read_tasks(array / "tasks.json")
    except DamagedError as error:
        _warn(str(error))
        return []


@cache
def _warn(message: str) -> None:
    logger.warning("%s", message)


def _without_kind(task: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in task.items() if key != "kind"}
