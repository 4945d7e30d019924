"""Filter preference data, draw a fixed pool, and split the pool once per seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from mrpo_lab.data.duplicates import (
    as_scalars,
    identical_after_truncation,
    same_when_rendered,
    seen_before,
    token_counts,
)
from mrpo_lab.data.reading import read_rows
from mrpo_lab.data.rows import Row, parse_item
from mrpo_lab.data.spool import Items
from mrpo_lab.data.texts import Item
from mrpo_lab.data.tokenization import Lengths, Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.objective.labels import Labels
from mrpo_lab.storage.tables import NONE

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Prepared:
    """A data set after filtering, drawing the pool, and splitting it."""

    items: Items
    """The pool of N items."""
    labels: Labels
    """Ratings and targets of their replies."""
    splits: Mapping[str, np.ndarray]
    """Indices into the pool for each of ``SPLITS``."""
    counts: dict[str, int]
    """How many rows were read, were unusual, and were dropped by each filter."""

    @property
    def ids(self) -> np.ndarray:
        """The ids of the replies, (N, R); see ``reply_ids``."""
        return self.items.ids

    def fingerprint(self) -> str:
        """A hash of texts, labels and splits: a run is only resumed on the data it began with."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids).tobytes())
        digest.update(self.labels.targets.contiguous().numpy().tobytes())
        for name in SPLITS:
            digest.update(f"{name} {len(self.splits[name])}".encode())
            digest.update(self.splits[name].astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


@dataclass(kw_only=True)
class Dataset(ABC):
    """Preference pairs: which are eligible, and how they are split. Subclasses yield the rows."""

    train: int | float | None
    """Number of pairs, or a share of the pool if below 1; null takes what val and test leave."""
    val: int | float
    test: int | float
    pool: int | None = None
    """Number of eligible pairs to draw, the same for every seed of the runs; null takes all."""
    pool_seed: int = 858
    max_tokens: int = 1024
    """Largest number of tokens in prompt + reply, under every tokenizer in use."""
    min_percentile: float = 0.0
    """Drop pairs whose prompt is no longer than this percentile of the prompts' lengths, then pairs
    with such a reply."""
    drop_identical: bool = True
    """Drop pairs whose replies are the same text, which no reference can tell apart, or become so
    under the template of a model in use."""
    drop_duplicates: bool = True
    """Keep one of several equal pairs, so that none is in both the train and the test split."""
    split_by: str | None = None
    """``prompt`` puts all pairs of a prompt into one split, of sizes as near as can be to those
    asked for; null splits pair by pair, as in the paper."""

    def __post_init__(self) -> None:
        sizes = {"train": self.train, "val": self.val, "test": self.test}
        for name, size in sizes.items():
            if size is not None and not (0 < size < 1 or (1 <= size < inf and size == int(size))):
                raise ValueError(f"{name} must be a number of pairs or a share, got {size}")
        if self.pool is not None and self.pool < 3:
            raise ValueError(f"pool must be null or at least 3, got {self.pool}")
        if not 0 <= self.pool_seed < 2**32:
            raise ValueError(
                f"pool_seed must be 0 or more and below 2 to the power of 32, got {self.pool_seed}"
            )
        if not 0 <= self.min_percentile < 50:
            raise ValueError(f"min_percentile must be in [0, 50), got {self.min_percentile}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.split_by not in (None, "prompt"):
            raise ValueError(f"split_by must be null or prompt, got {self.split_by!r}")

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield (where, row); ``where`` names the row's file and line in error messages."""

    def read(self) -> Items:
        """Read and parse every row.

        Raises:
            UserError: there is no row, or one is malformed.
        """
        items = Items.from_iterable(self.parse(row, where) for where, row in self.rows())
        if not items:
            raise UserError("dataset: no rows")
        return items

    def parse(self, row: Row, where: str) -> Item:
        """Parse one row; ``where`` names it in error messages."""
        return parse_item(row, where)

    def labels(self, items: Items) -> Labels:
        """The labels of preprocessed items."""
        return Labels.of_pairs(len(items))

    def prepare(
        self,
        items: Sequence[Item],
        tokenizers: Sequence[Tokenization],
        rng: np.random.Generator,
        positions: int | None = None,
    ) -> Prepared:
        """Filter the items, draw the pool, and split the pool with ``rng``.

        Args:
            items: what ``read`` returned.
            tokenizers: those of the policy and of all references; a pair must fit every one.
            positions: smallest number of positions of these models; longer pairs are dropped.

        Raises:
            UserError: no pair is left, or too few for the pool or the splits.
        """
        counts: Counter[str] = Counter(rows=len(items))
        preprocessed = Items.from_iterable(self.preprocess(items, counts))
        distinct = self._distinct(preprocessed, counts)
        measured = token_counts(distinct, tokenizers)
        again = same_when_rendered(distinct.ids, measured)
        counts["identical_after_template"] = int(again.any(-1).sum())
        if self.drop_identical and again.any():
            distinct = self.without_replies(distinct, again, counts)
            measured = token_counts(distinct, tokenizers)
        keep = self._eligible(distinct, tokenizers, measured, counts, positions)
        counts["eligible"] = len(keep)
        if not len(keep):
            raise UserError(f"dataset: no pairs left after filtering: {describe(counts)}")
        if self.pool is not None:
            if self.pool > len(keep):
                raise UserError(
                    f"dataset.pool is {self.pool}, but only {len(keep)} pairs are eligible "
                    f"({describe(counts)}): lower pool, train, val and test"
                )
            # With numpy's legacy generator, as in the authors' code. It seeds once and draws the
            # pools of three data sets in turn; of these, only HelpSteer2's can be drawn again here.
            draw = np.random.RandomState(self.pool_seed).choice(len(keep), self.pool, replace=False)
            keep = keep[draw]
        pool = distinct[keep]
        if self.split_by is None:
            splits = self._split(len(pool), rng)
        else:
            splits = self._split_prompts(pool.prompts, rng)
        counts.update(count_leaks(pool, splits))
        return Prepared(pool, self.labels(pool), splits, dict(counts))

    def preprocess(self, items: Sequence[Item], counts: Counter[str]) -> Iterable[Item]:
        """Change or drop items ahead of the filters that all data sets share; add to ``counts``."""
        return items

    def _distinct(self, items: Items, counts: Counter[str]) -> Items:
        """Count unusual replies; drop identical and duplicate pairs where asked."""
        duplicate = seen_before(items.ids)
        counts["empty_replies"] = int(items.empty.sum())
        counts["identical_replies"] = int(items.identical.sum())
        counts["prefix_replies"] = int(items.prefix.sum())
        counts["duplicates"] = int(duplicate.sum())
        dropped = (items.identical & self.drop_identical) | (duplicate & self.drop_duplicates)
        counts["dropped_identical_or_duplicate"] = int(dropped.sum())
        return items[~dropped]

    def without_replies(self, items: Items, which: np.ndarray, counts: Counter[str]) -> Items:
        """The items without some of their replies; a pair that lacks one is dropped.

        Args:
            which: (N, R) the replies to leave out.
        """
        dropped = np.asarray(which.any(-1))
        counts["dropped_identical_after_template"] = int(dropped.sum())
        return items[~dropped]

    def _eligible(
        self,
        items: Items,
        tokenizers: Sequence[Tokenization],
        measured: Sequence[Lengths],
        counts: Counter[str],
        positions: int | None = None,
    ) -> np.ndarray:
        """Indices of the items that pass the filters of 2512.10040 (appendix), in its order."""
        for tokenizer, m in zip(tokenizers, measured, strict=True):
            if len(items) and not m.reply.any():
                raise UserError(
                    f"dataset: the chat template of {tokenizer.name} renders none of "
                    f"{len(items)} pairs, since it refuses them or loses texts of their messages: "
                    "give the model another template"
                )
        prompts = np.stack([m.prompt.max(-1) for m in measured]).max(0)  # (N,)
        totals = np.stack([m.prompt + m.reply for m in measured]).max(0)  # (N, R)
        replies = np.stack([m.reply for m in measured])  # (tokenizers, N, R)
        counts["prefix_broken"] = sum(int(m.prefix_broken.any(-1).sum()) for m in measured)
        counts["system_folded"] = sum(int(m.system_folded.any(-1).sum()) for m in measured)
        present = items.ids != NONE
        keep = np.arange(len(items))

        def drop(name: str, passes: np.ndarray) -> None:
            nonlocal keep
            counts[f"dropped_{name}"] = int((~passes).sum())
            keep = keep[passes]

        drop("unscorable", ((replies.min(0) > 0) | ~present).all(-1) & (prompts > 0))
        longest = replies.max(0)
        if self.min_percentile and len(keep):
            drop("short_prompt", prompts[keep] > np.percentile(prompts[keep], self.min_percentile))
        if self.min_percentile and len(keep):
            bound = self.reply_length_bound(longest[keep], present[keep])
            drop("short_reply", ((longest[keep] > bound) | ~present[keep]).all(-1))
        cut = keep[((totals > self.max_tokens) | ~present)[keep].all(-1)]
        counts["identical_after_truncation"] = identical_after_truncation(
            items[cut],
            tokenizers,
            [Lengths(*(column[cut] for column in m)) for m in measured],
            self.max_tokens,
        )
        drop("too_long", (totals[keep] <= self.max_tokens).all(-1))
        if positions is not None and positions < self.max_tokens:
            drop("longer_than_a_model", (totals[keep] <= positions).all(-1))
        return keep

    def reply_length_bound(self, lengths: np.ndarray, present: np.ndarray) -> np.ndarray:
        """The number of tokens that every reply must exceed, broadcastable to (N, R).

        Chosen and rejected replies have a percentile each.

        Args:
            lengths: (N, R) token counts.
            present: (N, R) whether there is such a reply.
        """
        return np.asarray(np.percentile(lengths, self.min_percentile, axis=0))

    def _split(self, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Split the indices 0 to ``size`` - 1 at random."""
        train, val, _, rest = self._sizes(size)
        # Train from the front, test from the back: a smaller train leaves val and test unchanged.
        order = rng.permutation(size)
        return {
            "train": order[:train],
            "val": order[rest : rest + val],
            "test": order[rest + val :],
        }

    def _sizes(self, size: int) -> tuple[int, int, int, int]:
        """The sizes of train, val and test, and what val and test leave of ``size``."""
        val, test = (round(n * size) if n < 1 else int(n) for n in (self.val, self.test))
        rest = size - val - test
        share = self.train is not None and self.train < 1
        train = (
            rest if self.train is None else round(self.train * size) if share else int(self.train)
        )
        if min(train, val, test) < 1 or train > rest:
            raise UserError(
                f"dataset: {size} eligible pairs are too few for train={self.train}, "
                f"val={self.val}, test={self.test}: lower these sizes"
            )
        return train, val, test, rest

    def _split_prompts(
        self, prompts: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Split pairs at random so that all pairs of a prompt are in one split.

        Args:
            prompts: (N,) hashes of the prompts.
        """
        train, val, test, _ = self._sizes(len(prompts))
        order = rng.permutation(len(prompts))
        _, first, group = np.unique(prompts[order], return_index=True, return_inverse=True)
        sizes, left = np.bincount(group), np.argsort(first)  # prompts, in the order of the draw
        chosen = {}
        for name, wanted in (("test", test), ("val", val), ("train", train)):
            taken = left
            if name != "train" or self.train is not None:
                taken = left[nearest_sum(sizes[left].tolist(), wanted)]
            left = left[~np.isin(left, taken)]
            chosen[name] = order[np.isin(group, taken)]
            if not len(chosen[name]):
                raise UserError(
                    f"dataset: split_by=prompt leaves nothing for {name}: {len(prompts)} pairs "
                    f"have only {len(sizes)} prompts, up to {sizes.max()} pairs each"
                )
        return {name: chosen[name] for name in SPLITS}


@dataclass(kw_only=True)
class FileDataset(Dataset):
    """Pairs from a hub data set, a local copy of one, or a local file; see ``read_rows``."""

    path: str
    split: str = "train"
    config: str | None = None
    """Configuration of a hub data set, or of a folder in its layout, that has several."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        return read_rows(self.path, self.split, self.config)


def describe(counts: Mapping[str, int]) -> str:
    """Counts as text, ``rows 3,048, empty replies 5, ...``, without the zeros."""
    return ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if n)


def nearest_sum(sizes: Sequence[int], wanted: int) -> list[int]:
    """Indices of ``sizes`` whose sum, greater than 0, is as near to ``wanted`` as can be.

    They are the first ones but for the last few, which are chosen so that the sum fits.
    """
    largest, total, start = max(sizes, default=0), 0, 0
    while start < len(sizes) and total + max(4096, 64 * largest) <= wanted:
        total += sizes[start]
        start += 1
    gap = wanted - total
    known = np.zeros(gap + largest + 1, dtype=bool)  # the sums that the others can have
    last = np.zeros(len(known), dtype=int)  # by which of them each sum was reached first
    known[0] = True
    for index in range(start, len(sizes)):
        if known[gap]:
            break
        new = np.flatnonzero(known[: -sizes[index]] & ~known[sizes[index] :]) + sizes[index]
        known[new], last[new] = True, index
    sums = [int(s) for s in np.flatnonzero(known) if s + total]
    left = min(sums, key=lambda s: abs(s - gap), default=0)
    picked = []
    while left:
        picked.append(int(last[left]))
        left -= sizes[picked[-1]]
    return [*range(start), *picked]


def count_leaks(items: Items, splits: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many test pairs have a prompt that is also in the train split, and how many are in it."""
    trained, tested = splits["train"], splits["test"]
    rows = as_scalars(items.ids)
    return {
        "test_prompts_in_train": int(np.isin(items.prompts[tested], items.prompts[trained]).sum()),
        "test_pairs_in_train": int(np.isin(rows[tested], rows[trained]).sum()),
    }
