"""Checksums that bind a file to its content and its place: a folder's name and a file's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrpo_lab.errors import first_line
from mrpo_lab.storage.files import write_whole

NAME = "checksum"
"""The key of a JSON file that holds its checksum."""
OTHER = "its checksum is that of another content or place"


def checksum(place: str, content: bytes) -> str:
    """A hash of a content and where it belongs, 40 hexadecimal digits."""
    digest = hashlib.blake2b(f"{place}\0".encode(), digest_size=20)
    digest.update(content)
    return digest.hexdigest()


def write_json(path: Path, content: Mapping[str, Any], *, lasting: bool = True) -> None:
    """Replace a JSON file by ``content`` and its checksum.

    Args:
        lasting: see ``write_whole``.

    Raises:
        OSError: the file could not be written; no draft is left.
    """
    whole = {**content, NAME: _checksum(path, content)}
    write_whole(path, json.dumps(whole, indent=1).encode(), lasting=lasting)


def read_json(path: Path) -> tuple[dict[str, Any], bool]:
    """The content of a JSON file without its checksum, and whether it has one: earlier versions
    wrote none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or its content is that of another file.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    given = content.pop(NAME, None)
    if given not in (None, _checksum(path, content)):
        raise ValueError(OTHER)
    return content, given is not None


def _checksum(path: Path, content: Mapping[str, Any]) -> str:
    return checksum(f"{path.parent.name}/{path.name}", json.dumps(content, sort_keys=True).encode())
