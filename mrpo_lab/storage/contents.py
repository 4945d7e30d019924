"""Hashes of files, kept in the cache so that large files are read once."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from mrpo_lab.storage import cache
from mrpo_lab.storage.checksums import (
    CHANGED,
    CHECKSUM,
    DamagedError,
    hash_file,
    read_json,
    sha256,
    write_json,
)

MEMOS = "sha256"
"""The folder of the cache with the hashes of files."""
SETTLED = 2.0
"""Seconds after which another change of a file gives it another time of change for certain."""


def content_hash(file: Path) -> str:
    """sha256 of a file, kept in the cache for as long as the file stays the same by its size, inode
    and times. The time of change (ctime) cannot be set back, so that every change is seen.

    Raises:
        DamagedError: the file is named by its sha256, as in the hub's cache, and has another.
    """
    real = file.resolve()
    stamp = _stamp(real, real.stat())
    name = sha256(json.dumps(stamp).encode())[:24]
    memo = cache.root() / MEMOS / f"{name}.json"
    with suppress(DamagedError):
        known = read_json(memo, bound=True)
        if CHECKSUM in known and known["stamp"] == stamp:
            return str(known["sha256"])
    found = hash_file(real)
    status = real.stat()
    if re.fullmatch(r"[0-9a-f]{64}", real.name) and real.name != found:
        raise DamagedError(real, CHANGED, f"delete it and {file}, and download it again")
    if _stamp(real, status) == stamp and time.time() - status.st_ctime > SETTLED:
        with suppress(OSError):  # without it the file is only hashed again
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, {"stamp": stamp, "sha256": found}, bound=True, lasting=False)
    return found


def _stamp(file: Path, status: os.stat_result) -> list[str | int]:
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return [str(file), status.st_size, status.st_ino, *times]


def tree_hash(path: Path) -> str:
    """sha256 of a file, or of the names and contents of all files in and below a folder.

    Hidden files and texts for people (.md) do not count.
    """
    if path.is_file():
        return content_hash(path)
    parts = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and file.suffix != ".md" and not any(p[0] == "." for p in name.parts):
            parts.append(f"{name}\0{content_hash(file)}\0".encode())
    return sha256(*parts)
