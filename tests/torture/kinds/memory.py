"""Out of memory: the run goes on with smaller passes, or one line says which setting to lower."""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path
from random import Random

from harness import read_json

from torture.place import Place, refused, succeeded
from torture.process import BrokenError

RUN = (
    "weighting=tsw",
    "dataset.pairs=300",
    "dataset.val=100",
    "dataset.test=100",
    "protocol.batch_size=50",
    "train.micro_batch_tokens=200000",
    "train.token_budget=200000",
    "reference_set.token_budget=200000",
    "kernels=off",
)
"""Large passes: the whole logits of all replies of a step, or of a split, at once."""
ROOM = (20, 600)
"""MiB beside what a process has when it begins."""


def trial(place: Place, random: Random) -> None:
    reference = place.reference(*RUN)
    if random.random() < 0.5:
        place.take_scores()
    room = random.randint(*ROOM)
    place.notes.append(f"{room} MiB")
    done = place.train(*RUN, before=partial(limit, room * 2**20))
    if done.code == 0:
        succeeded(done)
        (run,) = place.runs
        for key in ("val/accuracy", "test/accuracy"):
            one, other = (read_json(each / "result.json")[key] for each in (run, reference.folder))
            if abs(one - other) > 0.02:  # sums are rounded in another order
                raise BrokenError(f"{key} is {one}, and with enough memory {other}")
    elif not any(word in (message := refused(done)) for word in ("tokens", "budget", "memory")):
        raise BrokenError(f"the message says nothing of memory: {message}")


def limit(room: int) -> None:
    """Let this process take ``room`` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
