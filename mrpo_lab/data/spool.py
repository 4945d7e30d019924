"""Items by the million: their texts are on disk, in memory where each stands and what it is."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

from mrpo_lab.data.ids import text_ids
from mrpo_lab.data.texts import Item
from mrpo_lab.storage import cache

BLOCK = 1 << 20
"""Bytes written at once."""


class Items(Sequence[Item]):
    """``items[i]`` reads an item; ``items[slice or indices]`` are some of them, nothing copied.

    ``prompts`` (N,) and ``ids`` (N, R) are hashes of the texts, as ``text_ids`` has them. Of each
    item's replies ``empty`` says that one is, ``identical`` that two are the same text, and
    ``prefix`` that none are but one begins another.
    """

    def __init__(self, texts: _Texts, *columns: np.ndarray) -> None:
        self._texts, self._columns = texts, columns
        self._places, self.prompts, self.ids, self.empty, self.identical, self.prefix = columns

    @classmethod
    def of(cls, items: Iterable[Item]) -> Items:
        """Written as they come; what is written already stays where it is.

        Raises:
            UserError: the cache's disk is full or cannot be written to.
        """
        if isinstance(items, Items):
            return items
        texts, ends, odd = _Texts(), array("q", [0]), bytearray()

        def written() -> Iterator[Item]:
            for item in items:
                content = json.dumps([item.prompt, item.replies, dict(item.ratings)])
                ends.append(ends[-1] + texts.write(content.encode()))
                odd.extend(_oddities(item.replies))
                yield item

        prompts, ids = text_ids(written())
        texts.flush()
        places = np.stack([ends[:-1], ends[1:]], axis=1)
        return cls(texts, places, prompts, ids, *np.frombuffer(odd, dtype=bool).reshape(-1, 3).T)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Items: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> Item | Items:
        places = self._places[index]
        if places.ndim > 1:
            return Items(self._texts, *(column[index] for column in self._columns))
        prompt, replies, ratings = json.loads(self._texts.read(*places.tolist()))
        return Item(
            tuple(prompt), tuple(replies), {name: tuple(given) for name, given in ratings.items()}
        )


def _oddities(replies: Sequence[str]) -> tuple[bool, bool, bool]:
    different = sorted(set(replies))
    identical = len(different) < len(replies)
    prefix = any(longer.startswith(shorter) for shorter, longer in pairwise(different))
    return any(not reply.strip() for reply in replies), identical, prefix and not identical


class _Texts:
    """A file without a name, in the cache, where there is room: gone when nobody reads it."""

    def __init__(self) -> None:
        self._block = bytearray()
        with cache.writing():
            cache.root().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(  # noqa: SIM115  see __del__
                buffering=0, dir=cache.root()
            )

    def write(self, content: bytes) -> int:
        self._block += content
        if len(self._block) > BLOCK:
            self.flush()
        return len(content)

    def flush(self) -> None:
        with cache.writing():
            while self._block:
                del self._block[: self._file.write(self._block)]

    def read(self, start: int, stop: int) -> bytes:
        # Not mapped into memory: what is read would count as this process's own.
        return os.pread(self._file.fileno(), stop - start, start)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
