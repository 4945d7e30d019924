"""Changes of files as instants at which a process can die or a disk can fill."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

AUDITED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def at_event(number: int, action: Callable[[], object]) -> None:
    """Do ``action`` right before this process changes files for the ``number``-th time.

    Renaming, removing and making files and folders, opening for writing and fsync count.
    """
    _each_event(lambda count: action() if count == number else None)


def count_events(total: Path) -> None:
    """Write to a file how often this process has changed files so far."""
    descriptor = os.open(total, os.O_WRONLY | os.O_CREAT)
    _each_event(lambda count: os.pwrite(descriptor, str(count).encode(), 0))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _each_event(do: Callable[[int], object]) -> None:
    count, busy = 0, False

    def happens() -> None:
        nonlocal count, busy
        if busy:  # what ``do`` does is not counted
            return
        count, busy = count + 1, True
        do(count)
        busy = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED or (event == "open" and _writes(*arguments)):
            happens()

    sync = os.fsync

    def counted(file: Any) -> None:
        happens()
        sync(file)

    vars(os)["fsync"] = counted
    sys.addaudithook(audit)


def _writes(path: Any, mode: Any, flags: Any) -> bool:
    system = str(path).startswith(("/dev/", "/proc/")) or str(path).endswith(".pyc")
    return bool(isinstance(flags, int) and flags & WRITES and not system)
