"""Append-only tables of numbers per reply, so that each number is computed only once.

A table is a folder of shards, one safetensors file each. A shard is written under a temporary name
and then renamed: readers see all of it or nothing, and several processes can append at once. Rows
are addressed by content: the key is a hash of one prompt and one reply, so that overlapping data
sets, pools, splits, pairs and lists share rows. If rows repeat, the oldest counts: a number never
changes once it was read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mrpo_lab.errors import UserError
from mrpo_lab.storage import cache
from mrpo_lab.storage.files import write_whole

logger = logging.getLogger(__name__)

ID = np.dtype("S16")
"""Type of a row's id, a 16-byte hash."""
NONE = b""
"""Padding in an array of ids, where a list has fewer replies than others; its numbers are 0."""


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
            UserError: the cache cannot be written to.
        """
        folder = cls._place(kind, key, columns)
        text = json.dumps({"first_opened_as": name, **key, "columns": dict(columns)}, indent=2)
        with cache.writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "key.json").exists():
                write_whole(folder / "key.json", text.encode())
        return cls(folder, columns)

    @classmethod
    def find(cls, kind: str, key: Mapping[str, Any], columns: Mapping[str, str]) -> Table | None:
        """The table of ``key`` if it exists; none is created."""
        folder = cls._place(kind, key, columns)
        return cls(folder, columns) if folder.is_dir() else None

    @staticmethod
    def _place(kind: str, key: Mapping[str, Any], columns: Mapping[str, str]) -> Path:
        content = json.dumps({**key, "columns": dict(columns)}, sort_keys=True)
        return cache.root() / kind / hashlib.sha256(content.encode()).hexdigest()[:16]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Read the numbers of ``ids``, an array of any shape.

        Returns:
            Column name to numbers in the shape of ``ids``, 0 where there is no row; and whether
            there is one, in the same shape. ``NONE`` counts as found.

        Raises:
            UserError: a shard is damaged or holds numbers that are not finite.
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
            UserError: a number is not finite, or the cache cannot be written to.
        """
        for name in self.columns:
            if not np.isfinite(values[name]).all():
                raise UserError(f"{self.folder}: {name} not finite: try dtype=bfloat16 or float32")
        there = ids != NONE
        raw = np.frombuffer(ids[there].tobytes(), dtype=np.uint8)
        shard = {"id": raw.reshape(-1, ID.itemsize)}
        for name, dtype in self.columns.items():
            shard[name] = np.ascontiguousarray(values[name][there], dtype=dtype)
        name = f"{time.time_ns():020}-{uuid.uuid4().hex}.safetensors"  # file names sort by age
        with cache.writing():
            write_whole(self.folder / name, save(shard))

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

    def _load(self) -> dict[str, np.ndarray]:
        shards = [self._shard(path) for path in sorted(self.folder.glob("*.safetensors"))]
        empty = {"id": np.zeros(0, dtype=ID)}
        empty |= {name: np.zeros(0, dtype=dtype) for name, dtype in self.columns.items()}
        return {name: np.concatenate([s[name] for s in [empty, *shards]]) for name in empty}

    def _shard(self, path: Path) -> dict[str, np.ndarray]:
        try:
            shard = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: damaged ({error}): delete it, it will be computed again"
            ) from error
        rows = len(shard.get("id", ()))
        for name in self.columns:
            column = shard.get(name)
            if column is None or len(column) != rows or not np.isfinite(column).all():
                raise UserError(
                    f"{path}: column {name} is incomplete or not finite: delete the file, it will "
                    "be computed again"
                )
        shard["id"] = np.frombuffer(shard["id"].tobytes(), dtype=ID)
        return shard
