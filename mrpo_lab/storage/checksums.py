"""Checksums of files that are read back, and the error for a file that is not as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage.files import write_whole

CHECKSUM = "checksum"
"""Key of a JSON file for the checksum of all its other keys; files of earlier versions lack it."""
MISSING, CHANGED, DIFFERS = "it is missing", "its content has changed", "its checksum differs"
"""How a file can differ from what was written; see ``DamagedError``."""


class DamagedError(UserError):
    """A file is not as it was written: it is missing, cannot be read, or has other content."""

    def __init__(self, path: Path, why: str | Exception, advice: str = "") -> None:
        """
        Args:
            why: how it differs, or the error of reading it.
            advice: what to do about it.
        """
        if isinstance(why, OSError) and why.strerror:
            why = why.strerror
        self.path, self.why = path, first_line(why) if isinstance(why, Exception) else why
        super().__init__(f"{path}: damaged ({self.why})" + (f": {advice}" if advice else ""))


def read_bytes(path: Path, advice: str = "") -> bytes | None:
    """Content of a file; None if there is none.

    Raises:
        DamagedError: it cannot be read; a folder is in its place, for example.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):  # the latter where a folder should be
        return None
    except OSError as error:
        raise DamagedError(path, error, advice) from error


def sha256(*parts: bytes | memoryview) -> str:
    """The SHA-256 of ``parts``, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Length in bytes and SHA-256 of a file, as ``check_file`` compares them.

    Raises:
        OSError: the file cannot be read.
    """
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def check_file(
    path: Path, described: Mapping[str, Any], advice: str = "", *, contents: bool
) -> None:
    """Compare a file with what ``describe_file`` returned when it was written.

    Args:
        contents: compare the SHA-256 too, for which the whole file is read.

    Raises:
        DamagedError: the file differs, or is missing.
    """
    try:
        same = path.is_file() and path.stat().st_size == described["bytes"]
        same = same and (not contents or hash_file(path) == described["sha256"])
        why = CHANGED if path.is_file() else MISSING
    except OSError as error:
        raise DamagedError(path, error, advice) from error
    if not same:
        raise DamagedError(path, why, advice)


def without_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` without the key for its checksum."""
    return {key: value for key, value in content.items() if key != CHECKSUM}


def with_checksum(content: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """``content`` with a key for its checksum.

    Args:
        place: what the file belongs to, so that it is refused anywhere else.
    """
    plain = without_checksum(content)
    return {**plain, CHECKSUM: sha256(f"{place}\n{json.dumps(plain)}".encode())}


def write_json(
    path: Path, content: Mapping[str, Any], *, bound: bool = False, lasting: bool = True
) -> None:
    """Replace a JSON file atomically by one that has a checksum.

    Args:
        bound: the file counts only under this name and in a folder of this name.
        lasting: see ``write_whole``.

    Raises:
        OSError: the file could not be written; no draft is left.
    """
    checked = with_checksum(content, _place(path) if bound else "")
    write_whole(path, (json.dumps(checked, indent=2) + "\n").encode(), lasting=lasting)


def read_json(path: Path, advice: str = "", *, bound: bool = False) -> dict[str, Any]:
    """Content of a JSON file, with its checksum if it has one; empty if there is no file.

    Raises:
        DamagedError: the file is empty, cut, has another checksum, or is not JSON with keys.
    """
    text = read_bytes(path, advice)
    if text is None:
        return {}
    try:
        content = json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, error, advice) from error
    if not isinstance(content, dict):
        why = "it is empty" if not text else "it holds no keys"
        raise DamagedError(path, why, advice)
    checked = with_checksum(content, _place(path) if bound else "")
    if content.get(CHECKSUM, checked[CHECKSUM]) != checked[CHECKSUM]:
        raise DamagedError(path, DIFFERS, advice)
    return content


def _place(path: Path) -> str:
    return "/".join(path.absolute().parts[-2:])
