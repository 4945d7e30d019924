"""A full or read-only disk: one line that names the place, and the same command goes on later."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import partial
from pathlib import Path
from random import Random

from torture.events import at_event, die
from torture.place import Place, SkippedError, refused, succeeded
from torture.process import BrokenError, Finished

RUN = ("weighting=tsw",)
CLONE_NEWNS = 0x20000
ROOM = "size=200m"


def trial(place: Place, random: Random) -> None:
    own_mounts()
    where = random.choice(["outputs", "cache"])
    disk = place.work if where == "outputs" else place.cache
    reference = place.reference(*RUN)
    models = os.readlink(place.cache / "models")
    mount("-t", "tmpfs", "-o", ROOM, "tmpfs", str(disk))
    if where == "cache":
        (disk / "models").symlink_to(models)
    elif random.random() < 0.8:  # else the scores have to be written too
        place.take_scores()
    done = random.choice([small, filled, read_only])(place, disk, reference.events, random)
    if done.code == 0:
        succeeded(done)
    else:
        message = refused(done)
        if os.access(disk, os.W_OK):
            place.no_drafts()
        named = [str(disk), os.path.relpath(disk, place.work), "outputs"]
        if not any(name in message for name in named[: 2 if where == "cache" else 3]):
            raise BrokenError(f"the message does not name {disk}: {message}")
    mount("-o", f"remount,rw,{ROOM}", str(disk))
    (disk / "ballast").unlink(missing_ok=True)
    succeeded(place.train(*RUN))
    place.ends_like(reference)


def small(place: Place, disk: Path, events: int, random: Random) -> Finished:
    """A disk that is too small from the beginning on."""
    mount("-o", f"remount,size={random.randint(4, 6000)}k", str(disk))
    place.notes.append(f"{disk.name} is small")
    return place.train(*RUN)


def filled(place: Place, disk: Path, events: int, random: Random) -> Finished:
    """A disk that is full from some instant on."""
    number = random.randint(1, events)
    place.notes.append(f"{disk.name} is full from change {number} of a file on")
    return place.train(*RUN, before=partial(at_event, number, partial(fill, disk)))


def read_only(place: Place, disk: Path, events: int, random: Random) -> Finished:
    """A disk that cannot be written, with what a killed run left there, or without."""
    if random.random() < 0.5:
        place.train(*RUN, before=partial(at_event, random.randint(1, events), die))
    place.notes.append(f"{disk.name} is read-only")
    mount("-o", "remount,ro", str(disk))
    return place.train(*RUN)


def fill(disk: Path) -> None:
    """Take all room that is left."""
    file = os.open(disk / "ballast", os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                os.write(file, b"\0" * size)
        except OSError:
            continue
    os.close(file)


def own_mounts() -> None:
    """Give this process a view of its own on what is mounted; it ends with the process.

    Raises:
        SkippedError: that is not allowed here.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise SkippedError(f"mounting a small disk: {os.strerror(ctypes.get_errno())}")
    mount("--make-rprivate", "/")


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"mount {' '.join(words)}: {done.stderr.strip()}")
