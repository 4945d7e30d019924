"""SLURM's own programs: list and cancel jobs, ask for limits, and run any other command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launchers.sweep import ActiveJob
from mrpo_lab.errors import UserError

ACTIVE_STATES = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "SPECIAL_EXIT": "queued",
    "PREEMPTED": "queued",
    "RUNNING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "COMPLETING": "ending",
}
"""SLURM's state of a job to ``ActiveJob.state``; a job in any other state has ended."""
SCANCEL_BATCH = 200
"""Jobs per call of scancel, so that the command line does not grow too long."""


def queue(outputs: Path) -> list[ActiveJob]:
    """Jobs of the sweeps below ``outputs`` that SLURM runs or will run, whoever submitted them."""
    arrays = {
        file.parent.name: file.parent for file in outputs.glob("sweeps/*/jobs/slurm-*/tasks.json")
    }
    if not arrays or not shutil.which("squeue"):  # a machine that only shares the files
        return []
    owners = {str(folder.stat().st_uid) for folder in arrays.values()} | {str(os.getuid())}
    options = ("-h", "-r", "-t", "all", "-u", ",".join(sorted(owners)), "-o", "%F|%K|%T|%r|%j")
    active = []
    for line in run_command("squeue", *options).splitlines():
        array, task, state, reason, name = line.split("|", 4)
        folder = arrays.get(name.rpartition(".")[2])
        if folder is not None and state in ACTIVE_STATES:
            index, job = (int(task), f"{array}_{task}") if task.isdigit() else (0, array)
            hold_reason = reason if "held" in reason.lower() else ""
            active.append(ActiveJob(folder, index, job, ACTIVE_STATES[state], hold_reason))
    return active


def cancel(jobs: Sequence[ActiveJob]) -> None:
    """Cancel jobs; SLURM signals running ones, which then save a checkpoint."""
    for start in range(0, len(jobs), SCANCEL_BATCH):
        run_command("scancel", *(job.job for job in jobs[start : start + SCANCEL_BATCH]))


def max_array_size() -> int:
    """The largest number of tasks that the cluster accepts in one array."""
    shown = run_command("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.M)
    return max(1, int(found[1])) if found else 1000


def run_command(*command: str) -> str:
    """Run one of SLURM's programs and return its standard output.

    Raises:
        UserError: the program is missing, failed, or did not answer, as when the controller cannot
            be reached.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here: is this a SLURM cluster?") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{command[0]}: {error_line(error)}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]}: no answer in a minute") from error
    return done.stdout


def error_line(error: Exception) -> str:
    """The last error message that a program of SLURM printed, in one line."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line for line in str(text).splitlines() if "error:" in line.lower()]
    return re.sub(r"^.*?error:\s*", "", lines[-1], flags=re.I) if lines else str(text).strip()
