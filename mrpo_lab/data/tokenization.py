"""Token rows and token counts of texts under one model's tokenizer and template."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mrpo_lab.data.chat import ChatFormat, format_fingerprint, load_format
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.progress import progress
from mrpo_lab.storage import cache
from mrpo_lab.storage.tables import Table

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the stored numbers: increase it when their meaning changes. 1 counted texts whose
system message the template had dropped."""
CONFIG_KEYS = ("model_type", "tokenizer_class", "auto_map", "transformers_version")
"""What transformers reads in config.json to choose the tokenizer's class."""
CHUNK = 256
"""Number of items tokenized at once. As fast as thousands; a long item takes 0.3 MB of memory."""
BAR_DELAY = 5.0
"""Seconds before a progress bar appears; most data sets need no more."""


class Lengths(NamedTuple):
    """Token counts of N items with up to R replies under one tokenizer, each (N, R)."""

    prompt: np.ndarray
    """Number of prompt tokens."""
    reply: np.ndarray
    """Number of reply tokens; 0 where the reply cannot be scored, for instance because the template
    refuses the prompt."""
    prefix_broken: np.ndarray
    """1 where ``TokenRow.prefix_broken``, else 0."""
    system_folded: np.ndarray
    """1 where ``TokenRow.system_folded``, else 0."""
    digest: np.ndarray
    """A hash of the tokens of prompt and reply: equal where a template makes two replies the same.
    0 where the item cannot be rendered."""


@dataclass(frozen=True)
class Tokenization:
    """A model's tokenizer and chat template, loaded at first use.

    Token counts that are already in the cache are read without loading them.
    """

    name: str
    folder: Path
    template: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def format(self) -> ChatFormat:
        return load_format(self.name, self.folder, self.template, self.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tokenizer's files and the template; see ``format_fingerprint``."""
        return format_fingerprint(self.folder, self.name, self.template, self.trust_remote_code)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What token counts depend on besides the texts.

        The keys of scores have the fingerprint alone, beside a hash of the whole config.json.
        """
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            read = {name: config[name] for name in CONFIG_KEYS if name in config}
        except (OSError, ValueError, TypeError, RecursionError):
            read = {}  # the tokenizer's loader will say what is wrong
        return {"format": self.fingerprint, "config": read, "version": FORMAT}

    def rows(self, items: Sequence[Item]) -> list[tuple[TokenRow, ...] | None]:
        """The token rows of each item; None where the template refuses the prompt."""
        return list(self.stream(items, range(len(items))))

    def stream(
        self, items: Sequence[Item], which: Sequence[int] | np.ndarray
    ) -> Iterator[tuple[TokenRow, ...] | None]:
        """The token rows of ``items[i]`` for each index i in ``which``, tokenized in chunks."""
        for start in range(0, len(which), CHUNK):
            yield from self.format.rows([items[i] for i in which[start : start + CHUNK]])

    def lengths(self, items: Sequence[Item], ids: np.ndarray) -> Lengths:
        """Token counts of every prompt and reply; each text is counted once and then cached.

        Args:
            ids: (N, R), from ``reply_ids(items)``.
        """

        def measure(rows: tuple[TokenRow, ...]) -> Iterator[tuple[int, ...]]:
            for row in rows:
                # Without a token before it, the reply's first token has no log-probability.
                scorable = row.reply_tokens if row.start else 0
                yield (
                    row.start,
                    scorable,
                    row.prefix_broken,
                    row.system_folded,
                    hash_tokens(row.ids),
                )

        columns = {**dict.fromkeys(Lengths._fields, "i4"), "digest": "i8"}
        table = Table.open("lengths", self.name, self.key, columns)
        self._announce_old_counts(table)
        return Lengths(**self._stored(table, items, ids, measure))

    def identical_after_truncation(
        self, items: Sequence[Item], ids: np.ndarray, max_tokens: int
    ) -> np.ndarray:
        """Whether truncation to ``max_tokens`` makes an item's first reply equal another one, (N,).

        The truncated tokens of each text are hashed once and then cached.
        """

        def measure(rows: tuple[TokenRow, ...]) -> Iterator[tuple[int, ...]]:
            for row in rows:
                yield (hash_tokens(row.ids[:max_tokens]),)

        key = {**self.key, "max_tokens": max_tokens}
        table = Table.open("truncations", self.name, key, {"digest": "i8"})
        digests = self._stored(table, items, ids, measure)["digest"]
        same: np.ndarray = (digests[:, 1:] == digests[:, :1]).any(-1)
        return same

    def _announce_old_counts(self, table: Table) -> None:
        """Log if an older format of the same counts is passed over."""
        if any(table.folder.glob("*.safetensors")):
            return
        for file in (cache.root() / "lengths").glob("*/key.json"):
            try:
                key = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if key.get("format") == self.fingerprint and key.get("version", 1) < FORMAT:
                logger.info(
                    "%s: tokens are counted anew, since counts in an older format (%s) may lack "
                    "system messages",
                    self.name,
                    file.parent,
                )
                return

    def _stored(
        self,
        table: Table,
        items: Sequence[Item],
        ids: np.ndarray,
        measure: Callable[[tuple[TokenRow, ...]], Iterable[tuple[int, ...]]],
    ) -> dict[str, np.ndarray]:
        """The columns of ``table``, each (N, R), after adding the texts that it lacks.

        ``measure`` turns the token rows of an item into one tuple of numbers per reply.
        """
        known, found = table.read(ids)
        missing = np.flatnonzero(~found.all(-1))
        with progress(len(missing), f"tokens of {self.name}", "prompt", delay=BAR_DELAY) as bar:
            for index, rows in zip(missing, self.stream(items, missing), strict=True):
                for reply, numbers in enumerate(measure(rows or ())):
                    for name, number in zip(known, numbers, strict=True):
                        known[name][index, reply] = number
                bar.update()
        if len(missing):
            table.append(ids[missing], {name: column[missing] for name, column in known.items()})
        return known


def hash_tokens(ids: np.ndarray) -> int:
    """A 64-bit hash of tokens, signed."""
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
