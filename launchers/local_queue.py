"""Jobs of this machine: those that a supervisor process still works on."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from launchers.sweep import ActiveJob, Record
from launchers.tasks import known_tasks
from mrpo_lab.errors import UserError
from mrpo_lab.storage.files import is_locked

LOCK = ".supervisor"
"""File in an array's folder that its supervisor keeps locked and has written its process id to."""


def queue(outputs: Path) -> list[ActiveJob]:
    """Jobs of the sweeps below ``outputs`` that a supervisor on this machine runs or will run."""
    active = []
    for lock in outputs.glob(f"sweeps/*/jobs/local-*/{LOCK}"):
        array = lock.parent
        if not is_active(array):
            continue
        for index, _ in enumerate(known_tasks(array)):
            record = Record.read(array / f"{index}.json")
            if record is None:
                active.append(ActiveJob(array, index, "", "queued"))
            elif record.state == "running":
                active.append(ActiveJob(array, index, record.job, "running"))
    return active


def is_active(array: Path) -> bool:
    """Whether a supervisor still works on the array of tasks in this folder."""
    return is_locked(array / LOCK)


def cancel(jobs: Sequence[ActiveJob]) -> None:
    """Stop the arrays that the jobs belong to, as a whole, and wait until they have stopped.

    Raises:
        UserError: the file with the process id of a supervisor is damaged.
    """
    arrays = {job.array for job in jobs}
    for array in arrays:
        written = (array / LOCK).read_text()
        if not re.fullmatch(r"\d+\n", written):
            raise UserError(f"{array / LOCK}: it should hold the process id of a supervisor")
        os.kill(int(written), signal.SIGTERM)
    while any(is_active(array) for array in arrays):
        time.sleep(0.1)
