"""Token rows and token counts of texts under one model's tokenizer and template."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mrpo_lab.data.chat import ChatFormat, format_fingerprint, load_format
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.progress import progress
from mrpo_lab.storage.tables import Table

CHUNK = 256
"""Items tokenized at once: as fast as thousands, and long ones take 0.3 MB each meanwhile."""
PATIENCE = 5.0
"""Seconds without a bar: most data sets need no more."""


class Lengths(NamedTuple):
    """Of N items with R replies under one tokenizer, each (N, R)."""

    prompt: np.ndarray
    """Prompt tokens."""
    reply: np.ndarray
    """Reply tokens; 0 where the reply cannot be scored, as when the template refuses the prompt."""
    prefix_broken: np.ndarray
    system_folded: np.ndarray
    """1 where the text had to be bent to fit; see ``TokenRow``."""


@dataclass(frozen=True)
class Tokenization:
    """Loads the tokenizer when it is first needed: counts already stored need none."""

    name: str
    folder: Path
    template: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def format(self) -> ChatFormat:
        return load_format(self.name, self.folder, self.template, self.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        return format_fingerprint(self.folder, self.name, self.template)

    def rows(self, items: Sequence[Item]) -> list[tuple[TokenRow, ...] | None]:
        return list(self.stream(items, range(len(items))))

    def stream(
        self, items: Sequence[Item], which: Sequence[int] | np.ndarray
    ) -> Iterator[tuple[TokenRow, ...] | None]:
        """The rows of ``items[i]`` for i in ``which``."""
        for start in range(0, len(which), CHUNK):
            yield from self.format.rows([items[i] for i in which[start : start + CHUNK]])

    def lengths(self, items: Sequence[Item], ids: np.ndarray) -> Lengths:
        """Token counts of every prompt and reply, counted once per text."""

        def measure(rows: tuple[TokenRow, ...]) -> Iterator[tuple[int, ...]]:
            for row in rows:
                # A reply that nothing precedes has no log-probability for its first token.
                scorable = row.reply_tokens if row.start else 0
                yield row.start, scorable, row.prefix_broken, row.system_folded

        key = {"format": self.fingerprint}
        table = Table.open("lengths", self.name, key, dict.fromkeys(Lengths._fields, "i4"))
        return Lengths(**self._stored(table, items, ids, measure))

    def same_when_cut(self, items: Sequence[Item], ids: np.ndarray, max_tokens: int) -> np.ndarray:
        """(N,) whether within the first ``max_tokens`` tokens an item's first reply is the same as
        another one; what is left of a text is found out once."""

        def measure(rows: tuple[TokenRow, ...]) -> Iterator[tuple[int, ...]]:
            for row in rows:
                digest = hashlib.blake2b(row.ids[:max_tokens].tobytes(), digest_size=8).digest()
                yield (int.from_bytes(digest, signed=True),)

        key = {"format": self.fingerprint, "max_tokens": max_tokens}
        table = Table.open("truncations", self.name, key, {"digest": "i8"})
        digests = self._stored(table, items, ids, measure)["digest"]
        same: np.ndarray = (digests[:, 1:] == digests[:, :1]).any(-1)
        return same

    def _stored(
        self,
        table: Table,
        items: Sequence[Item],
        ids: np.ndarray,
        measure: Callable[[tuple[TokenRow, ...]], Iterable[tuple[int, ...]]],
    ) -> dict[str, np.ndarray]:
        """The table's columns (N, R); of texts that it lacks ``measure`` gives them, a reply at a
        time, and they are added."""
        known, found = table.read(ids)
        missing = np.flatnonzero(~found.all(-1))
        with progress(len(missing), f"tokens of {self.name}", "prompt", delay=PATIENCE) as bar:
            for index, rows in zip(missing, self.stream(items, missing), strict=True):
                for reply, numbers in enumerate(measure(rows or ())):
                    for name, number in zip(known, numbers, strict=True):
                        known[name][index, reply] = number
                bar.update()
        if len(missing):
            table.append(ids[missing], {name: column[missing] for name, column in known.items()})
        return known
