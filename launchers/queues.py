"""The active jobs of all clusters: list them, cancel them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launchers import local_queue, slurm_commands
from launchers.sweep import ActiveJob


def queue(outputs: Path) -> list[ActiveJob]:
    """Every job of the sweeps below ``outputs`` that a cluster still runs or will run."""
    return [*slurm_commands.queue(outputs), *local_queue.queue(outputs)]


def cancel(jobs: Sequence[ActiveJob]) -> None:
    """Cancel jobs; running ones save a checkpoint first."""
    here = [job for job in jobs if local_queue.is_active(job.array)]
    local_queue.cancel(here)
    slurm_commands.cancel([job for job in jobs if job not in here])
