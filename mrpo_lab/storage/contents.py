"""Hashes of files, kept in the cache so that large files are read once."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path

from mrpo_lab.storage import cache
from mrpo_lab.storage.files import write_whole


def content_hash(file: Path) -> str:
    """sha256 of a file, kept in the cache for as long as the file's size and time stay the same."""
    real = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # the hub's cache names large files by their sha256
    stat = real.stat()
    stamp = [str(real), stat.st_size, stat.st_mtime_ns]
    memo = cache.root() / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError):
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with real.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    with suppress(OSError):  # without it the file is only hashed again
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memo, json.dumps({"stamp": stamp, "sha256": sha256}).encode())
    return sha256


def tree_hash(path: Path) -> str:
    """sha256 of a file, or of the names and contents of all files in and below a folder.

    Hidden files and texts for people (.md) do not count.
    """
    if path.is_file():
        return content_hash(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and file.suffix != ".md" and not any(p[0] == "." for p in name.parts):
            digest.update(f"{name}\0{content_hash(file)}\0".encode())
    return digest.hexdigest()
