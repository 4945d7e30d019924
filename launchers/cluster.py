"""What runs a sweep's tasks: SLURM, or this machine."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from launchers.sweep import Live, Sweep
from launchers.tasks import Gather, Score, Train
from mrpo_lab.errors import UserError


@dataclass_transform(kw_only_default=True)
def checked(cls: type) -> Any:
    """A dataclass of settings: keys and types are checked when it is built."""
    return dataclass(cls, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))


def build(profile: Mapping[str, Any]) -> Cluster:
    """The cluster of a launcher's profile.

    Raises:
        UserError: all keys whose values do not fit.
    """
    from launchers.local import Local
    from launchers.slurm import Slurm

    kinds: dict[str, type[Cluster]] = {"slurm": Slurm, "local": Local}
    settings = {key: value for key, value in profile.items() if key != "cluster"}
    try:
        # As JSON, whose objects and arrays are as good as dataclasses and tuples.
        return TypeAdapter(kinds[profile["cluster"]]).validate_json(json.dumps(settings))
    except ValidationError as error:
        problems = [
            f"hydra.launcher.{'.'.join(map(str, problem['loc']))}: {problem['msg']}, "
            f"got {problem['input']!r}"
            for problem in error.errors()
        ]
        raise UserError("; ".join(problems)) from error


class Cluster(ABC):
    """Knows which tasks are alive, and takes new ones."""

    blocking: bool
    """Whether who dispatches stays to watch."""

    @abstractmethod
    def check(self, scores: Sequence[Score]) -> None:
        """Refuse what could never run.

        Raises:
            UserError: names the setting and what the cluster has.
        """

    @abstractmethod
    def submit(
        self,
        sweep: Sweep,
        scores: Sequence[Score],
        runs: Sequence[Train],
        gather: Gather,
        live: Mapping[str, Live],
    ) -> None:
        """Start ``scores``, then each run when all it needs has succeeded, then ``gather``.

        ``live``: what others are about to give; a run may need that instead.
        """


def queue(outputs: Path) -> list[Live]:
    """Every task of every sweep of this folder that some cluster still holds."""
    from launchers import local, slurm

    return [*slurm.queue(outputs), *local.queue(outputs)]


def cancel(tasks: Sequence[Live]) -> None:
    """Take tasks out of their queues; running ones save first."""
    from launchers import local, slurm

    here = [task for task in tasks if local.holds(task.array)]
    local.cancel(here)
    slurm.cancel([task for task in tasks if task not in here])
