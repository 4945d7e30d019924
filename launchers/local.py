"""Sweeps on this machine: one background process runs the tasks, N at a time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from launchers.cluster import Cluster, checked
from launchers.local_queue import LOCK
from launchers.supervisor import count_gpus
from launchers.sweep import ActiveJob, Sweep
from launchers.tasks import Gather, Score, Train

ROOT = Path(__file__).parents[1]


@checked
class Local(Cluster):
    """The keys of ``conf/hydra/launcher/local.yaml``."""

    parallel: Annotated[int, Field(ge=1)] | None
    """Number of runs at once; null is one per GPU, or one per core where there is no GPU."""
    threads: Annotated[int, Field(ge=1)] | None
    """CPU threads of each run; null divides the cores evenly."""
    blocking: bool

    def check(self, scores: Sequence[Score]) -> None:
        """Accept everything: a profile asks for nothing that this machine could lack."""

    def submit(
        self,
        sweep: Sweep,
        scores: Sequence[Score],
        runs: Sequence[Train],
        gather: Gather,
        active: Mapping[str, ActiveJob],
    ) -> None:
        """Start one supervisor, which outlives this process, for all tasks.

        ``active`` is not needed: a run that finds its reference being scored waits for the store.
        """
        cores = len(os.sched_getaffinity(0))
        parallel = self.parallel or count_gpus() or cores
        threads = self.threads or max(1, cores // parallel)
        folder = sweep.new_array([*scores, *runs, gather], "local")
        (folder / "log").mkdir()
        # The supervisor inherits the locked file: the array never looks abandoned in between.
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (folder / "log" / "supervisor.out").open("w") as out:
            started = subprocess.Popen(
                [sys.executable, "-m", "launchers.supervisor", str(folder), str(parallel)],
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ":".join(path)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=[lock],
                start_new_session=True,
            )
        os.write(lock, f"{started.pid}\n".encode())
        os.close(lock)
