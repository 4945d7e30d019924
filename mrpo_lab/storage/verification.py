"""Verifying a whole cache: what is sound, what has no checksum, what is damaged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mrpo_lab.errors import UserError
from mrpo_lab.storage.checksums import CHECKSUM, DamagedError, hash_file, read_json
from mrpo_lab.storage.contents import MEMOS
from mrpo_lab.storage.manifests import check_manifest, manifest
from mrpo_lab.storage.tables import KEY, Table, read_key, stored_checksum

TABLES = ("scores", "gate", "lengths", "truncations", "conformance")
RECORDS = (MEMOS, "scored")
"""Kinds of single JSON files."""
UNUSED = "hashes"
"""A folder that earlier versions read and wrote."""
STATES = ("sound", "unverified", "damaged", "left over")
AGAIN = "it will be made again"
HOUR = 3600.0
"""Age in seconds of a draft that no process is writing any more."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one file, or of one model's folder."""

    kind: str
    path: Path
    state: str
    """``sound``; ``unverified``: an earlier version wrote it without a checksum, and its numbers
    are possible; ``damaged``; or ``left over``: see ``left_over``."""
    problem: str = ""

    def delete(self) -> None:
        """Delete the file or folder, and the checksums beside a folder."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
            manifest(self.path).unlink(missing_ok=True)
        else:
            self.path.unlink(missing_ok=True)


Check = tuple[str, Path, Callable[[], bool]]
"""A kind, what is checked, and a function that returns whether it has a checksum.

It raises a DamagedError if the file is damaged."""


def checks(root: Path) -> list[Check]:
    """All that is to be verified in a cache.

    Raises:
        UserError: there is no such folder, or it is no cache.
    """
    kinds = (*TABLES, *RECORDS, "models")
    if not any((root / kind).is_dir() for kind in kinds):
        raise UserError(f"{root}: not a cache: it has none of the folders {', '.join(kinds)}")
    return [*_tables(root), *_records(root), *_models(root)]


def verdict(check: Check) -> Verdict:
    """Verify one file or folder."""
    kind, path, verified = check
    try:
        return Verdict(kind, path, "sound" if verified() else "unverified")
    except DamagedError as error:
        return Verdict(kind, path, "damaged", str(error).removeprefix(f"{path}: damaged "))


def left_over(root: Path) -> list[Verdict]:
    """What is read no more: drafts of killed processes, an hour old at least, and a folder of an
    earlier version."""
    drafts = {*root.glob("**/.*.tmp"), *(path for path in root.glob("models/*") if _is_draft(path))}
    found = [
        Verdict(path.relative_to(root).parts[0], path, "left over", "a draft of a killed process")
        for path in sorted(drafts)
        if _is_old(path)
    ]
    if (root / UNUSED).is_dir():
        found.append(Verdict(UNUSED, root / UNUSED, "left over", "only earlier versions read it"))
    return found


def _is_old(draft: Path) -> bool:
    try:
        return draft.lstat().st_mtime < time.time() - HOUR
    except FileNotFoundError:  # it has just taken its place
        return False


def _is_draft(model: Path) -> bool:
    return model.is_dir() and model.name.startswith((".", "tmp"))


def _tables(root: Path) -> Iterator[Check]:
    for kind in TABLES:
        for folder in sorted(path for path in (root / kind).glob("*") if path.is_dir()):
            columns = {}  # unknown without the key: of shards, only checksums are verified then
            if (folder / KEY).exists():  # else it is written again
                yield kind, folder / KEY, partial(_key, folder)
                with suppress(DamagedError):
                    columns = read_key(folder)["columns"]
            table = Table(folder, columns)
            for shard in table.shards():
                yield kind, shard, partial(_shard, table, shard)


def _key(folder: Path) -> bool:
    read_key(folder)
    return True  # the folder's name is its checksum


def _shard(table: Table, shard: Path) -> bool:
    table.shard(shard)
    return stored_checksum(shard) is not None


def _records(root: Path) -> Iterator[Check]:
    for kind in RECORDS:
        for file in sorted((root / kind).glob("*.json")):
            yield kind, file, partial(_record, file)


def _record(file: Path) -> bool:
    return CHECKSUM in read_json(file, bound=True)


def _models(root: Path) -> Iterator[Check]:
    for folder in sorted((root / "models").glob("*")):
        if folder.is_dir() and not _is_draft(folder):
            yield "models", folder, partial(check_manifest, folder, AGAIN, hash_file)
