"""Perform one task in a process of its own: its record, its signals, its process group."""

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

from launchers.composing import compose, digest
from launchers.gather import gather
from launchers.scores import write_scored_marker
from launchers.sweep import Record, Sweep
from launchers.tasks import Gather, Score, Task, Train, read_tasks
from mrpo_lab.console import plain_text
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.redaction import redact
from mrpo_lab.runs.provenance import cluster_job
from mrpo_lab.training.interruption import Interruption, nothing

PREEMPTED = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
"""The signal that a cluster sends before time is up: save, and continue in a later job."""


@dataclass(frozen=True)
class SlurmJob:
    """What submitit pickles and calls in a job: only the place where the task is written.

    Everything else is read when the job runs, and a run resumes from its own folder.
    """

    array: str
    index: int

    def __call__(self) -> None:
        requeue: Any = signal.getsignal(PREEMPTED)  # submitit's handler
        perform(Path(self.array), self.index, lambda: requeue(PREEMPTED, None))

    def checkpoint(self) -> Any:
        """Return what is to be submitted again; submitit's handler calls this."""
        import submitit  # loaded already in a job; takes 0.1 s elsewhere

        log("saved; this job goes on when the cluster starts it again")
        return submitit.helpers.DelayedSubmission(self)


def perform(array: Path, index: int, leave: Callable[[], None]) -> None:
    """Perform a task of an array; its record says how it ended.

    Args:
        array: folder with ``tasks.json``.
        leave: called after a run that was asked to stop has saved a checkpoint.

    Raises:
        Exception: whatever the task raises, so that the job counts as failed.
    """
    if "SLURM_CPUS_PER_TASK" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
    os.environ.setdefault("WANDB_RUN_GROUP", array.parent.parent.name)
    join_process_group()
    interruption = Interruption()
    answer_signals(interruption, leave)
    task = read_tasks(array / "tasks.json")[index]
    file, record = array / f"{index}.json", new_record(task.title)
    is_main = os.environ.get("RANK", "0") == "0"

    def update_record(state: str, error: BaseException | None = None) -> None:
        record.state, record.ended = state, time.time() if state != "running" else None
        if error is not None:
            record.error = redact(first_line(error))
            record.traceback = redact(traceback.format_exc())
        if is_main:
            record.write(file)

    quiet_libraries()
    logging.getLogger("submitit").propagate = False  # it prints by itself
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    update_record("running")
    try:
        run_task(task, interruption)
    except Exception as error:
        update_record("failed", error)
        if isinstance(error, UserError):
            log(f"error: {error}")
        raise
    except BaseException:
        update_record("left")
        raise
    update_record("done")


def run_task(task: Task, interruption: Interruption) -> None:
    """Do what the task says, by its kind."""
    # torch and transformers take seconds to import: jobs need them, commands that dispatch do not.
    match task:
        case Score():
            from mrpo_lab.experiment import score_reference

            for key, run in task.runs.items():
                cfg, _ = compose(unchanged(Path(task.sweep) / run["conf"]), run["overrides"])
                write_scored_marker(key, task.slug, score_reference(cfg, task.slug))
        case Train():
            from mrpo_lab.experiment import run_experiment

            cfg, name = compose(unchanged(Path(task.sweep) / task.conf), task.overrides)
            assert name == task.name, f"{task.name} was asked for, its configuration is of {name}"
            run_experiment(cfg, name, interruption)
        case Gather():
            print(plain_text(gather(Sweep(Path(task.sweep)))), flush=True)
        case _:
            raise TypeError(f"no job performs a task of kind {task.kind}")


def unchanged(conf: Path) -> Path:
    """``conf``, a folder of configuration files that is called by their digest.

    Raises:
        UserError: a file is missing or has changed.
    """
    if digest(conf) != conf.name:
        raise UserError(
            f"{conf}: its files have changed since the sweep was dispatched: delete it and give "
            "the sweep's command again"
        )
    return conf


def new_record(title: str) -> Record:
    """The record of a task that begins now, in this process."""
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
    """Path of the file that stderr is written to."""
    stderr = Path("/proc/self/fd/2")
    return str(stderr.readlink()) if stderr.exists() else ""


def answer_signals(interruption: Interruption, leave: Callable[[], None]) -> None:
    """Install handlers of the signals that a cluster sends.

    On preemption or when time is up, the run saves a checkpoint and ``leave`` is called. SIGTERM
    comes before a kill, and whether a requeue follows is unknown: save, and go on until the kill.
    """
    signal.signal(PREEMPTED, lambda *_: interruption.ask(leave))
    signal.signal(signal.SIGTERM, lambda *_: interruption.ask(nothing))
    # A cluster signals every process of a job; those that libraries fork must not answer too.
    os.register_at_fork(after_in_child=_ignore_cluster)


def _ignore_cluster() -> None:
    signal.signal(PREEMPTED, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def join_process_group() -> None:
    """Set the variables of torch.distributed where SLURM started several processes for one job.

    ``accelerate launch`` sets the same. All processes are on one node, so that 127.0.0.1 will do.
    """
    variables = {
        "RANK": "SLURM_PROCID",
        "LOCAL_RANK": "SLURM_LOCALID",
        "WORLD_SIZE": "SLURM_NTASKS",
        "LOCAL_WORLD_SIZE": "SLURM_NTASKS",
    }
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        os.environ.update({ours: os.environ[slurms] for ours, slurms in variables.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ["SLURM_JOB_ID"]) % 40000)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
