"""Append-only tables of numbers per reply, so that each number is computed only once.

A table is a folder of shards, one safetensors file each. A shard is written under a temporary name
and then renamed: readers see all of it or nothing, and several processes can append at once. Rows
are addressed by content: the key is a hash of one prompt and one reply, so that overlapping data
sets, pools, splits, pairs and lists share rows. If rows repeat, the oldest counts: a number never
changes once it was read.

A shard's name has the checksum of its content and its table, so that a damaged shard, or one of
another table, is refused and never read as numbers.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mrpo_lab.errors import UserError
from mrpo_lab.storage import cache
from mrpo_lab.storage.checksums import DIFFERS, DamagedError, read_json, sha256
from mrpo_lab.storage.files import write_whole

logger = logging.getLogger(__name__)

ID = np.dtype("S16")
"""Type of a row's id, a 16-byte hash."""
NONE = b""
"""Padding in an array of ids, where a list has fewer replies than others; its numbers are 0."""
KEY = "key.json"
"""The file of a table that says of what its numbers are."""
FIRST = "first_opened_as"
"""What a key.json says besides the key and the columns."""
LIMITS = {
    **dict.fromkeys(("sums", "alone", "together", "left", "again"), (-math.inf, 0)),
    **dict.fromkeys(("counts", "vocabulary"), (1, math.inf)),
    **dict.fromkeys(("prompt", "reply"), (0, math.inf)),
    **dict.fromkeys(("prefix_broken", "system_folded", "conforms"), (0, 1)),
}
"""Least and greatest number of the columns with these names; others may have any finite number."""


@dataclass(frozen=True)
class Table:
    """A table on disk: named columns with one number per reply."""

    folder: Path
    columns: Mapping[str, str]
    """Name to numpy dtype."""

    @classmethod
    def open(
        cls, kind: str, name: str, key: Mapping[str, Any], columns: Mapping[str, str]
    ) -> Table:
        """Open a table in the cache, creating it if needed.

        Args:
            kind: the folder of the cache it is in, such as ``scores``.
            name: written to ``key.json`` for people to read; no part of the key.
            key: everything that the numbers depend on besides the texts.
            columns: name to numpy dtype.

        Raises:
            UserError: the cache cannot be written to, or the folder is that of another table.
        """
        folder = cls._place(kind, key, columns)
        text = json.dumps({FIRST: name, **key, "columns": dict(columns)}, indent=2)
        with cache.writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / KEY).exists():
                write_whole(folder / KEY, text.encode())
        read_key(folder)
        return cls(folder, columns)

    @classmethod
    def find(cls, kind: str, key: Mapping[str, Any], columns: Mapping[str, str]) -> Table | None:
        """The table of ``key`` if it exists; none is created."""
        folder = cls._place(kind, key, columns)
        return cls(folder, columns) if folder.is_dir() else None

    @staticmethod
    def _place(kind: str, key: Mapping[str, Any], columns: Mapping[str, str]) -> Path:
        return cache.root() / kind / key_hash({**key, "columns": dict(columns)})

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Read the numbers of ``ids``, an array of any shape.

        Returns:
            Column name to numbers in the shape of ``ids``, 0 where there is no row; and whether
            there is one, in the same shape. ``NONE`` counts as found.

        Raises:
            UserError: a shard is damaged, or holds numbers that cannot be.
        """
        stored = self._load()
        order = np.argsort(stored["id"], kind="stable")
        ranked = stored["id"][order]
        place = np.searchsorted(ranked, ids.reshape(-1)).clip(max=max(len(ranked) - 1, 0))
        found = ranked[place] == ids.reshape(-1) if len(ranked) else np.zeros(ids.size, dtype=bool)
        values = {name: np.zeros(ids.shape, dtype=dtype) for name, dtype in self.columns.items()}
        for name, column in values.items():
            column.reshape(-1)[found] = stored[name][order[place[found]]]
        return values, found.reshape(ids.shape) | (ids == NONE)

    def append(self, ids: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add rows as one new shard. Rows that the table has already keep their numbers.

        Raises:
            UserError: a number is not finite or cannot be, or the cache cannot be written to.
        """
        there = ids != NONE
        raw = np.frombuffer(ids[there].tobytes(), dtype=np.uint8)
        shard = {"id": raw.reshape(-1, ID.itemsize)}
        for name, dtype in self.columns.items():
            shard[name] = np.ascontiguousarray(values[name][there], dtype=dtype)
        if problem := self._problem(shard):
            raise UserError(f"{self.folder}: {problem}: try dtype=bfloat16 or float32")
        content = save(shard)
        digest = self._checksum(content)
        with cache.writing():  # file names sort by age
            write_whole(self.folder / f"{time.time_ns():020}-{digest}.safetensors", content)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Let one process at a time compute missing rows; others wait here and then read them."""
        lock = FileLock(self.folder / ".lock")
        with cache.writing():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("%s: another process is computing it, waiting", self.folder)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _checksum(self, content: bytes) -> str:
        """The checksum of a shard, bound to the table by its kind and the hash of its key."""
        return sha256(f"{self.folder.parent.name}/{self.folder.name}\n".encode(), content)

    def shards(self) -> list[Path]:
        """The files of the table, the oldest first."""
        return sorted(self.folder.glob("*.safetensors"))

    def _load(self) -> dict[str, np.ndarray]:
        shards = self.shards()
        if any(stored_checksum(path) is None for path in shards):
            _announce_unverified(cache.root())
        loaded = [self.shard(path) for path in shards]
        empty = {"id": np.zeros(0, dtype=ID)}
        empty |= {name: np.zeros(0, dtype=dtype) for name, dtype in self.columns.items()}
        return {name: np.concatenate([s[name] for s in [empty, *loaded]]) for name in empty}

    def shard(self, path: Path) -> dict[str, np.ndarray]:
        """Read one file of the table: its columns and ``id``, each (n,).

        Raises:
            DamagedError: it is damaged, or is of another table.
        """
        try:
            content = path.read_bytes()
            if stored_checksum(path) not in (None, self._checksum(content)):
                raise ValueError(DIFFERS)
            shard = load(content)
            if problem := self._problem(shard):
                raise ValueError(problem)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DamagedError(path, error, "delete it, it will be computed again") from error
        shard["id"] = np.frombuffer(shard["id"].tobytes(), dtype=ID)
        return shard

    def _problem(self, shard: Mapping[str, np.ndarray]) -> str | None:
        """What is wrong with the columns of a shard, ``id`` as bytes; None if nothing is."""
        rows = shard["id"].shape[:1] if "id" in shard else (-1,)
        expected = {"id": ("u1", (*rows, ID.itemsize))}
        expected |= {name: (dtype, rows) for name, dtype in self.columns.items()}
        for name, (dtype, shape) in expected.items():
            column = shard.get(name)
            if column is None or column.shape != shape or column.dtype != dtype:
                return f"column {name} is incomplete"
            if not np.isfinite(column).all():
                return f"{name} not finite"
            least, greatest = LIMITS.get(name, (-math.inf, math.inf))
            if len(column) and not least <= column.min() <= column.max() <= greatest:
                return f"{name} outside [{least}, {greatest}]"
        return None


def key_hash(content: Mapping[str, Any]) -> str:
    """The name of the folder of a table with this key and columns."""
    return sha256(json.dumps(content, sort_keys=True).encode())[:16]


def stored_checksum(shard: Path) -> str | None:
    """The checksum in the name of a shard; None for those that earlier versions wrote."""
    named = re.fullmatch(r"\d+-([0-9a-f]{64})", shard.stem)
    return named[1] if named else None


def read_key(folder: Path) -> dict[str, Any]:
    """The key of the table in a folder, and its columns under ``columns``.

    Raises:
        DamagedError: its key.json is damaged or that of another table.
    """
    file = folder / KEY
    advice = (
        "delete it if nothing was renamed here, it will be written again; else delete "
        f"{folder}, its numbers will be computed again"
    )
    content = read_json(file, advice)
    content.pop(FIRST, None)
    if key_hash(content) != folder.name or not isinstance(content.get("columns"), dict):
        raise DamagedError(file, "it is that of another table", advice)
    return content


@functools.cache  # one line a process
def _announce_unverified(root: Path) -> None:
    logger.info(
        "%s: numbers that an earlier version stored have no checksums and are used unverified: "
        "`python -m mrpo_lab.storage verify` lists them",
        root,
    )
