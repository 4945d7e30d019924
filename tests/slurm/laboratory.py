"""Helpers of the SLURM tests: dispatch sweeps, disturb their runs, wait for them, look at them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from harness import ROOT, TINY, Outcome, train_py

from launchers import __main__ as verbs
from launchers import watching
from launchers.queues import queue
from launchers.sweep import ActiveJob, RunState, Sweep, by_output

RESOURCES = (
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.train={timeout_min: 20, cpus: 1, mem_gb: 1, gpus: 0, tasks: 1}",
    "hydra.launcher.gather={timeout_min: 5, cpus: 1, mem_gb: 0.5, gpus: 0}",
    "hydra.launcher.score=[{timeout_min: 20, cpus: 1, mem_gb: 1, gpus: 0}]",
)
CHANGED = ("protocol.batch_size=", "train.checkpoint_every=")
RUN = (
    *(override for override in TINY if not override.startswith(CHANGED)),
    "protocol.batch_size=2",
    "train.checkpoint_every=5",
)
"""12 steps."""


@dataclass(frozen=True)
class Lab:
    """A folder of runs and of planted disturbances; the score store is shared by the session."""

    folder: Path

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    @property
    def plants(self) -> Path:
        return self.folder / "plants"

    def plant(self, name: str, content: str = "") -> None:
        (self.plants / name).write_text(content)

    def overrides(self, *more: str) -> list[str]:
        python = f"{shlex.quote(sys.executable)} {ROOT}/tests/slurm/planted.py"
        setup = f"['export PLANTS={self.plants}']"
        job = (f"hydra.launcher.python='{python}'", f"hydra.launcher.setup={setup}")
        return [*RESOURCES, *job, f"outputs={self.outputs}", *more]

    def dispatch(self, *more: str) -> str:
        """Run ``train.py -m``; return the line that it prints."""
        outcome = train_py("-m", *self.overrides(*more))
        assert outcome.code == 0, outcome.err
        assert not outcome.err, outcome.err
        return outcome.out.strip()

    def refused(self, *more: str) -> str:
        outcome = train_py("-m", *self.overrides(*more))
        assert outcome.code == 2
        return outcome.error

    def sweep(self, name: str) -> Sweep:
        return Sweep(self.outputs / "sweeps" / name)

    def run_states(self, name: str) -> dict[str, RunState]:
        """State of each run of a sweep, by seed."""
        sweep = self.sweep(name)
        states = sweep.run_states(by_output(queue(self.outputs)))
        return {Path(name).name.partition("__")[0]: run for name, run in states.items()}

    def run(self, name: str, seed: str) -> Path:
        (run,) = [r for r in self.sweep(name).plan.runs if f"/{seed}__" in r]
        return self.outputs / run

    def wait(self, name: str, seconds: float = 600) -> bool:
        """Wait until no job of the sweep is active; return whether all runs are finished."""
        until(lambda: not watching.active_jobs(self.sweep(name)), seconds)
        return watching.watch(self.sweep(name))

    def active(self) -> list[ActiveJob]:
        return queue(self.outputs)

    @staticmethod
    def grant_minutes(job: str, minutes: int) -> bool:
        """Raise the time limit of a job, for later starts too; return whether SLURM accepted it.

        It does not while it cleans up after the job.
        """
        asked = ("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    @staticmethod
    def fail_node(node: str, job: str) -> None:
        """Fail a node as a power cut would, then resume it.

        The job's processes are killed here because SLURM would leave them running, and would put
        the job on hold if they outlast its new start.
        """
        said("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        found = said("scontrol", "show", "job", "-o", job)
        processes = processes_of(found.partition("JobId=")[2].split()[0])
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes), 20)
        said("scontrol", "update", f"nodename={node}", "state=resume")

    def verb(self, *arguments: str) -> int:
        """Run ``python -m launchers`` in this process; return its exit code."""
        command = ["launchers", f"--outputs={self.outputs}", *arguments]
        with mock.patch.object(sys, "argv", command):
            return verbs.main()


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def processes_of(job: str) -> list[int]:
    """Process ids of a job on this machine, those of SLURM that watch its steps first."""
    steps, others = [], []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                steps.append(int(folder.name))
            elif f"SLURM_JOB_ID={job}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                others.append(int(folder.name))
    return steps + others


def until(done: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, said("squeue") + said("sinfo")
        time.sleep(0.3)


def steps(run: Path) -> int:
    """Number of steps logged so far."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def undisturbed(folder: Path, *overrides: str) -> Path:
    """Run ``train.py`` without a launcher; return the folder of the run."""
    outcome: Outcome = train_py(f"outputs={folder}", *overrides)
    assert outcome.code == 0, outcome.err
    (run,) = (path.parent for path in folder.rglob("result.json"))
    return run
