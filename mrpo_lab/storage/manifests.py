"""Checksums of all files of a folder, in a file beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mrpo_lab.errors import UserError
from mrpo_lab.storage.checksums import read_json, write_json
from mrpo_lab.storage.contents import content_hash, read_hash

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
    write_json(manifest(draft.with_name(name)), {FILES: _hashes(draft, read_hash)})


def check_manifest(
    folder: Path, remedy: str, hash_file: Callable[[Path], str] = content_hash
) -> bool:
    """Check the files of a folder against their checksums.

    Args:
        remedy: what happens, or is to be done, once the folder is deleted.

    Returns:
        Whether there are checksums; earlier versions wrote none.

    Raises:
        UserError: a file is damaged, missing or new, or the checksums are damaged.
    """
    file = manifest(folder)
    if not file.exists():
        return False
    try:
        expected = read_json(file)[0][FILES]
        found = _hashes(folder, hash_file)
        odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        problem = f"{folder / odd[0]}: damaged, missing or new" if odd else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{file}: damaged ({error})"
    if problem:
        raise UserError(f"{problem}: delete {folder} and {file.name} beside it; {remedy}")
    return True


def _hashes(folder: Path, hash_file: Callable[[Path], str]) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_file(path) for path in files}
