"""Numbers per reply, computed once: content-addressed tables that only ever grow.

A table is a folder of shards. A shard is one safetensors file, written whole under another name
and renamed, so that readers see all of it or nothing and writers never meet. A row belongs to one
prompt and one reply, found by the hash of their text: data sets, pools, splits, pairs and lists
that overlap share their rows. The oldest row counts: a number that was read once never changes.
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
NONE = b""
"""In place of the id of a reply that a shorter list does not have: its numbers are 0."""


@dataclass(frozen=True)
class Table:
    """Columns of numbers for replies, under a key that holds all that changes them."""

    folder: Path
    columns: Mapping[str, str]
    """Name to numpy dtype; a column holds one number per reply."""

    @classmethod
    def open(
        cls, kind: str, name: str, key: Mapping[str, Any], columns: Mapping[str, str]
    ) -> Table:
        """The table of ``key`` in the cache. ``key.json`` beside its shards says what it is, and
        under which ``name`` it was first opened, which is no part of the key."""
        content = {**key, "columns": dict(columns)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache.root() / kind / digest
        text = json.dumps({"first_opened_as": name, **content}, indent=2)
        with cache.writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "key.json").exists():
                write_whole(folder / "key.json", text.encode())
        return cls(folder, columns)

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(column name to numbers, found) for ``ids`` of any shape; 0 where not found. ``NONE``
        counts as found.

        Raises:
            UserError: a shard is truncated or holds numbers that are not finite.
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
        """Add rows as one shard. A row already there may be added again and stays as it is.

        Raises:
            UserError: a number is not finite.
        """
        for name in self.columns:
            if not np.isfinite(values[name]).all():
                raise UserError(f"{self.folder}: {name} not finite: try dtype=bfloat16 or float32")
        there = ids != NONE
        raw = np.frombuffer(ids[there].tobytes(), dtype=np.uint8)
        shard = {"id": raw.reshape(-1, ID.itemsize)}
        for name, dtype in self.columns.items():
            shard[name] = np.ascontiguousarray(values[name][there], dtype=dtype)
        name = f"{time.time_ns():020}-{uuid.uuid4().hex}.safetensors"  # sorts by age
        write_whole(self.folder / name, save(shard))

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Held by the one process that fills the table; the others wait here and then read."""
        lock = FileLock(self.folder / ".lock")
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
