"""A sequence of items whose texts are spooled to disk; only offsets and hashes stay in memory."""

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
"""Size in bytes of the write buffer."""


class Items(Sequence[Item]):
    """A sequence of N items whose texts are in a temporary file.

    ``items[i]`` reads one item from the file. ``items[indices]`` and ``items[start:stop]`` are
    ``Items`` that share the file; no text is copied.

    Attributes:
        aspects: every aspect that rates one of the items as they were written, in the order of
            first appearance.
        prompts: (N,) hashes of the prompts, see ``text_ids``.
        ids: (N, R) hashes of the replies, see ``text_ids``.
        empty: (N,) whether some reply is empty or blank.
        identical: (N,) whether two replies are equal.
        prefix: (N,) whether no two replies are equal, but one is a prefix of another.
    """

    def __init__(self, texts: _TextFile, aspects: tuple[str, ...], *columns: np.ndarray) -> None:
        self._texts, self.aspects, self._columns = texts, aspects, columns
        self._places, self.prompts, self.ids, self.empty, self.identical, self.prefix = columns

    @classmethod
    def from_iterable(cls, items: Iterable[Item]) -> Items:
        """Write ``items`` to a temporary file as they come. ``Items`` are returned as they are.

        Raises:
            UserError: the cache's disk is full or cannot be written to.
        """
        if isinstance(items, Items):
            return items
        texts, ends, odd = _TextFile(), array("q", [0]), bytearray()
        aspects: dict[str, None] = {}

        def written() -> Iterator[Item]:
            for item in items:
                aspects.update(dict.fromkeys(item.ratings))
                content = json.dumps([item.prompt, item.replies, dict(item.ratings)])
                ends.append(ends[-1] + texts.write(content.encode()))
                odd.extend(_oddities(item.replies))
                yield item

        prompts, ids = text_ids(written())
        texts.flush()
        places = np.stack([ends[:-1], ends[1:]], axis=1)
        flags = np.frombuffer(odd, dtype=bool).reshape(-1, 3).T
        return cls(texts, tuple(aspects), places, prompts, ids, *flags)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Items: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> Item | Items:
        places = self._places[index]
        if places.ndim > 1:
            columns = (column[index] for column in self._columns)
            return Items(self._texts, self.aspects, *columns)
        prompt, replies, ratings = json.loads(self._texts.read(*places.tolist()))
        return Item(
            tuple(prompt), tuple(replies), {name: tuple(given) for name, given in ratings.items()}
        )


def _oddities(replies: Sequence[str]) -> tuple[bool, bool, bool]:
    """The flags ``empty``, ``identical`` and ``prefix`` of one item."""
    different = sorted(set(replies))
    identical = len(different) < len(replies)
    prefix = any(longer.startswith(shorter) for shorter, longer in pairwise(different))
    return any(not reply.strip() for reply in replies), identical, prefix and not identical


class _TextFile:
    """An unnamed temporary file in the cache folder, deleted when the last reader is."""

    def __init__(self) -> None:
        self._block = bytearray()
        with cache.writing():
            cache.root().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(  # noqa: SIM115  see __del__
                buffering=0, dir=cache.root()
            )

    def write(self, content: bytes) -> int:
        """Append ``content`` and return its length."""
        self._block += content
        if len(self._block) > BLOCK:
            self.flush()
        return len(content)

    def flush(self) -> None:
        with cache.writing():
            while self._block:
                del self._block[: self._file.write(self._block)]

    def read(self, start: int, stop: int) -> bytes:
        # Not memory-mapped: the pages read would count as resident memory of this process.
        return os.pread(self._file.fileno(), stop - start, start)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
