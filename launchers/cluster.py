"""The interface of a cluster, which runs the tasks of a sweep: SLURM, or this machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from launchers.sweep import ActiveJob, Sweep
from launchers.tasks import Gather, Score, Train


@dataclass_transform(kw_only_default=True)
def checked(cls: type) -> Any:
    """Make ``cls`` a dataclass of settings whose keys and types are checked when it is built."""
    return dataclass(cls, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))


class Cluster(ABC):
    """Takes tasks and runs them. Its fields are the keys of a launcher's profile."""

    blocking: bool
    """Whether the dispatching process stays and watches until the sweep has ended."""

    @abstractmethod
    def check(self, scores: Sequence[Score]) -> None:
        """Refuse, before anything is submitted, what the cluster could never run.

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
        active: Mapping[str, ActiveJob],
    ) -> None:
        """Start ``scores``, then each run when all its inputs exist, then ``gather``.

        Args:
            active: jobs of other sweeps that will produce an output which one of ``runs`` needs,
                by the name of the output.

        Raises:
            UserError: the cluster refused a job; those submitted before it stay.
        """
