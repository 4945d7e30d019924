"""Checksums of all files of a folder, in a file beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mrpo_lab.storage.checksums import (
    CHANGED,
    MISSING,
    DamagedError,
    hash_file,
    read_json,
    write_json,
)
from mrpo_lab.storage.contents import content_hash

FILES = "files"


def manifest(folder: Path) -> Path:
    """The file with the checksums of a folder's files. It is beside the folder, since a file more
    in a model's folder would make it another model."""
    return folder.with_name(f"{folder.name}.checksums.json")


def write_manifest(draft: Path, name: str) -> None:
    """Write the checksums of all files in ``draft``, which is going to be called ``name``.

    Raises:
        OSError: the file could not be written.
    """
    write_json(manifest(draft.with_name(name)), {FILES: _hashes(draft, hash_file)}, bound=True)


def check_manifest(folder: Path, remedy: str, hashed: Callable[[Path], str] = content_hash) -> bool:
    """Check the files of a folder against their checksums.

    Args:
        remedy: what happens, or is to be done, once the folder is deleted.
        hashed: returns the SHA-256 of a file.

    Returns:
        Whether there are checksums; earlier versions wrote none.

    Raises:
        DamagedError: a file is damaged, missing or new, or the checksums are damaged.
    """
    file = manifest(folder)
    if not file.exists():
        return False
    advice = f"delete {folder} and {file.name} beside it; {remedy}"
    expected = read_json(file, advice, bound=True).get(FILES)
    if not isinstance(expected, dict):
        raise DamagedError(file, "it does not list files", advice)
    try:
        found = _hashes(folder, hashed)
    except OSError as error:
        raise DamagedError(Path(error.filename or folder), error, advice) from error
    for name in sorted({*expected, *found}):
        if name not in found:
            raise DamagedError(folder / name, MISSING, advice)
        if name not in expected:
            raise DamagedError(folder / name, "it was added", advice)
        if found[name] != expected[name]:
            raise DamagedError(folder / name, CHANGED, advice)
    return True


def _hashes(folder: Path, hashed: Callable[[Path], str]) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashed(path) for path in files}
