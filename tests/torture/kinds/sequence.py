"""Many runs in one process: memory, files and threads stay as they are after the first ones."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from random import Random

from harness import TINY, train_py

from torture.place import Place, succeeded
from torture.process import BrokenError

KINDS: tuple[tuple[str, ...], ...] = (
    ("weighting=vaw",),
    ("weighting=tsw",),
    ("weighting=swcw", "train.samples=1", "train.sample_tokens=4"),
    ("weighting=arwc", "model.lora={r: 2, target_modules: [q_proj, v_proj]}"),
    ("loss.beta=-1",),
    ("dataset.max_tokens=3",),
)
"""The last two are refused, one of them after its data were read."""


def trial(place: Place, random: Random) -> None:
    place.take_scores()
    number, warm = (6, 2) if place.short else (30, 2)
    kinds = [*KINDS * warm, *(random.choice(KINDS) for _ in range(number))]
    report = place.folder / "report.json"
    first_measured = len(KINDS) * warm
    name = f"{number} runs"
    succeeded(place.start(name, before=lambda: measure(kinds, first_measured, report)).wait())
    first, last = json.loads(report.read_text())
    place.notes.append(f"{number} runs: first {first}, last {last}")
    for name in ("files", "threads", "temporary"):
        if last[name] > first[name]:
            raise BrokenError(f"{name}: {first[name]} before, {last[name]} after {number} runs")
    if last["MiB"] > first["MiB"] * 1.02:
        raise BrokenError(
            f"memory: {first['MiB']} MiB before, {last['MiB']} MiB after {number} runs"
        )


def measure(kinds: Sequence[tuple[str, ...]], warm: int, report: Path) -> None:
    """Make all runs in this process, and end it; what is taken is measured after ``warm`` of them
    and at the end."""
    measured = []
    for index, kind in enumerate(kinds, 1):
        train_py(*TINY, *kind, f"outputs=runs/{index}")
        if index in (warm, len(kinds)):
            measured.append(resources())
    report.write_text(json.dumps(measured))
    os._exit(0)


def resources() -> dict[str, float]:
    # Without pages of libraries, which a forked process takes over one by one as it needs them.
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("RssAnon:")[2].split()[0])
    return {
        "MiB": round(kibibytes / 2**10, 1),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "temporary": len(os.listdir(os.environ["TMPDIR"])),
    }
