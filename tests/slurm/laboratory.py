"""A laboratory on the cluster: what is dispatched, planted, waited for and seen there."""

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
    """A folder of runs with its own plants; the store is the session's."""

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
        """``train.py -m``; the line that it says."""
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
        """Until no job of the sweep is left; whether all runs finished."""
        until(lambda: not watching.active_jobs(self.sweep(name)), seconds)
        return watching.watch(self.sweep(name))

    def active(self) -> list[ActiveJob]:
        return queue(self.outputs)

    @staticmethod
    def grant_minutes(job: str, minutes: int) -> bool:
        """More time for a job, now and when it begins again; not while one that ended is cleaned
        up."""
        asked = ("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    @staticmethod
    def fail_node(node: str, job: str) -> None:
        """As by a power cut, after which it starts again. SLURM alone would first let the job's
        processes live, and hold the job when they outlast its new beginning."""
        said("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        found = said("scontrol", "show", "job", "-o", job)
        processes = processes_of(found.partition("JobId=")[2].split()[0])
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes), 20)
        said("scontrol", "update", f"nodename={node}", "state=resume")

    def verb(self, *arguments: str) -> int:
        """``python -m launchers``; its exit code."""
        command = ["launchers", f"--outputs={self.outputs}", *arguments]
        with mock.patch.object(sys, "argv", command):
            return verbs.main()


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def processes_of(job: str) -> list[int]:
    """SLURM's own that watch over the job's steps first."""
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
    """Logged so far."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def undisturbed(folder: Path, *overrides: str) -> Path:
    """``train.py`` alone, without any launcher; the run's folder."""
    outcome: Outcome = train_py(f"outputs={folder}", *overrides)
    assert outcome.code == 0, outcome.err
    (run,) = (path.parent for path in folder.rglob("result.json"))
    return run
