"""One task in a process of its own: its record, its signals, its processes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.sweep import Record
from launchers.tasks import read_tasks
from mrpo_lab.errors import UserError
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.runs.provenance import cluster_job
from mrpo_lab.training.interruption import Interruption, nothing

PREEMPTED = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
"""What a cluster sends before time is up: save, and go on in another job."""


@dataclass(frozen=True)
class SlurmJob:
    """What submitit calls: nothing but where the task is written. All else is read when it runs,
    and a run resumes from its own folder."""

    array: str
    index: int

    def __call__(self) -> None:
        handler: Any = signal.getsignal(PREEMPTED)  # submitit's, which requeues
        perform(Path(self.array), self.index, lambda: handler(PREEMPTED, None))

    def checkpoint(self) -> Any:
        """Called by that handler."""
        import submitit

        log("saved; this job goes on when the cluster starts it again")
        return submitit.helpers.DelayedSubmission(self)


def perform(array: Path, index: int, leave: Callable[[], None]) -> None:
    """Do the task; its record says how it ended, and what it raises ends the job.

    ``leave``: what follows when the run was asked to stop and has saved itself.
    """
    if "SLURM_CPUS_PER_TASK" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
    os.environ.setdefault("WANDB_RUN_GROUP", array.parent.parent.name)
    join_processes()
    interruption = Interruption()
    answer_signals(interruption, leave)
    task = read_tasks(array / "tasks.json")[index]
    file, record = array / f"{index}.json", begin(task.title)
    is_main = os.environ.get("RANK", "0") == "0"

    def note(state: str, error: BaseException | None = None) -> None:
        record.state, record.ended = state, time.time() if state != "running" else None
        if error is not None:
            record.error = (str(error) or type(error).__name__).splitlines()[0]
            record.traceback = traceback.format_exc()
        if is_main:
            record.write(file)

    quiet_libraries()
    logging.getLogger("submitit").propagate = False  # it prints by itself
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    note("running")
    try:
        task.perform(interruption)
    except Exception as error:
        note("failed", error)
        if isinstance(error, UserError):
            log(f"error: {error}")
        raise
    except BaseException:
        note("left")
        raise
    note("done")


def begin(title: str) -> Record:
    job = cluster_job() or {}
    return Record(
        title=title,
        state="running",
        job=job.get("id", str(os.getpid())),
        host=job.get("node") or socket.gethostname(),
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        restarts=int(job.get("restarts", 0)),
        began=time.time(),
        log=output_file(),
    )


def output_file() -> str:
    """What stderr is written to."""
    place = Path("/proc/self/fd/2")
    return str(place.readlink()) if place.exists() else ""


def answer_signals(interruption: Interruption, leave: Callable[[], None]) -> None:
    """Before preemption and time-outs save and leave. SIGTERM comes before a kill that may or may
    not be followed by a requeue, which is not ours to know: save, and go on until it comes."""
    signal.signal(PREEMPTED, lambda *_: interruption.ask(leave))
    signal.signal(signal.SIGTERM, lambda *_: interruption.ask(nothing))
    # A cluster signals every process of a job: those that libraries fork must not do the same.
    os.register_at_fork(after_in_child=_ignore_cluster)


def _ignore_cluster() -> None:
    signal.signal(PREEMPTED, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def join_processes() -> None:
    """Where SLURM started several, tell each its place, as ``accelerate launch`` would. They are
    on one node, whose name need not be known to it."""
    given = {
        "RANK": "SLURM_PROCID",
        "LOCAL_RANK": "SLURM_LOCALID",
        "WORLD_SIZE": "SLURM_NTASKS",
        "LOCAL_WORLD_SIZE": "SLURM_NTASKS",
    }
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in given.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ["SLURM_JOB_ID"]) % 40000)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
