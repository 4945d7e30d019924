"""Lists of rated replies: the forms of rows that are understood, and what is made of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from mrpo_lab.data.dataset import SPLITS, FileDataset, Prepared
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.rows import Row, as_prompt, checked
from mrpo_lab.data.spool import Items
from mrpo_lab.data.texts import Item
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.objective.labels import Labels

Ratings = dict[str, tuple[float, ...]]


@dataclass(kw_only=True)
class ListDataset(FileDataset):
    """Prompts with any number of replies, each rated by several aspects. Sizes count prompts."""

    aspects: list[str] | None = None
    """Which of the rated aspects to learn from, in this order; null takes all there are."""
    temperature: float = 1.0
    """T of the target softmax(rating / T) of each aspect."""
    max_replies: int | None = None
    """Of a longer list so many replies are drawn with ``pool_seed``, the same for every seed."""
    pairs: str | None = None
    """Read each list as pairs of replies, after the split: best_worst, one pair, or separable, all
    whose targets differ; null keeps lists."""
    by: dict[str, float] | None = None
    """Weight of each aspect in what makes a reply of such a pair the better one; null is equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}")
        if self.max_replies is not None and self.max_replies < 2:
            raise ValueError(f"max_replies must be null or at least 2, got {self.max_replies}")
        if self.pairs not in (None, "best_worst", "separable"):
            raise ValueError(f"pairs must be null, best_worst or separable, got {self.pairs!r}")
        if self.aspects is not None and (not self.aspects or _repeats(self.aspects)):
            raise ValueError(f"aspects must be null or different names, got {self.aspects}")

    def parse(self, row: Row, where: str) -> Item:
        return parse_list(row, where)

    def read(self) -> Items:
        items = super().read()
        found = list(dict.fromkeys(aspect for item in items for aspect in item.ratings))
        self._aspects = self.aspects if self.aspects is not None else found
        unknown = [aspect for aspect in (*self._aspects, *(self.by or {})) if aspect not in found]
        if unknown:
            raise UserError(f"dataset: no reply is rated by {unknown[0]!r}, but by {found}")
        return items

    def usable(self, items: Sequence[Item], counts: Counter[str]) -> Iterator[Item]:
        """Without replies that are there twice, drawn down to ``max_replies``, and without the
        prompts that no aspect is complete for."""
        for item in items:
            different = self._distinct_replies(item)
            counts["repeated_replies"] += len(item.replies) - len(different)
            if self.max_replies is not None and len(different) > self.max_replies:
                different = self._drawn(item, different)
                counts["lists_drawn_from"] += 1
            if len(different) < 2:
                counts["dropped_single_reply"] += 1
                continue
            short = _of(item, different)
            lacking = [
                aspect
                for aspect in self._aspects
                if any(map(math.isnan, short.ratings.get(aspect, (math.nan,))))
            ]
            for aspect in lacking:
                counts[f"lists_without_{aspect}"] += 1
            if len(lacking) == len(self._aspects):
                counts["dropped_unrated"] += 1
                continue
            yield short

    def _distinct_replies(self, item: Item) -> list[int]:
        if not self.drop_identical:
            return list(range(len(item.replies)))
        first = {reply: i for i, reply in reversed(list(enumerate(item.replies)))}
        return sorted(first.values())

    def _drawn(self, item: Item, replies: list[int]) -> list[int]:
        """A function of the prompt and its replies alone: neither their order nor the file's
        counts."""
        assert self.max_replies is not None
        ids = reply_ids([item])[0]
        by_id = sorted(replies, key=lambda reply: ids[reply])
        entropy = int.from_bytes(ids[by_id[0]].ljust(16, b"\0"), "little")
        rng = np.random.default_rng([self.pool_seed, entropy])
        return sorted(by_id[i] for i in rng.choice(len(by_id), self.max_replies, replace=False))

    def labels(self, items: Sequence[Item]) -> Labels:
        width = max(len(item.replies) for item in items)
        ratings = torch.full((len(items), len(self._aspects), width), torch.nan).double()
        for n, item in enumerate(items):
            for a, aspect in enumerate(self._aspects):
                if aspect in item.ratings:
                    ratings[n, a, : len(item.replies)] = torch.tensor(item.ratings[aspect]).double()
        replies = torch.tensor([len(item.replies) for item in items]).unsqueeze(-1)
        present = torch.arange(width) < replies
        return Labels.of_ratings(self._aspects, ratings, present, self.temperature)

    def floor(self, lengths: np.ndarray, present: np.ndarray) -> np.ndarray:
        return np.asarray(np.percentile(lengths[present], self.min_percentile))

    def prepare(
        self, items: Sequence[Item], tokenizers: Sequence[Tokenization], rng: np.random.Generator
    ) -> Prepared:
        lists = super().prepare(items, tokenizers, rng)
        return lists if self.pairs is None else self._as_pairs(lists)

    def _as_pairs(self, lists: Prepared) -> Prepared:
        """Each split's lists as its pairs: no prompt is in two splits that was not before."""
        wanted = self.by or dict.fromkeys(self._aspects, 1.0)
        order = lists.labels.mix(torch.tensor([wanted.get(a, 0.0) for a in self._aspects]).double())
        chosen: list[tuple[int, list[tuple[int, int]]]] = []
        splits, tied, pairs = {}, 0, 0
        for name in SPLITS:
            begin = pairs
            for n in lists.splits[name].tolist():
                found = list(self._pairs(order[n, : len(lists.items[n].replies)].tolist()))
                tied += not found
                pairs += len(found)
                chosen.append((n, found))
            splits[name] = np.arange(begin, pairs)
            if begin == pairs:
                raise UserError(f"dataset.pairs: no two replies of the {name} split differ")
        items = Items.of(
            _of(item, pair, rated=False)
            for n, found in chosen
            for item in [lists.items[n]]
            for pair in found
        )
        counts = {**lists.counts, "lists_all_tied": tied, "pairs": pairs}
        return Prepared(items, Labels.of_pairs(pairs), splits, counts)

    def _pairs(self, order: Sequence[float]) -> Iterator[tuple[int, int]]:
        """(better, worse) by how much each reply is preferred."""
        if self.pairs == "separable":
            for i, j in combinations(range(len(order)), 2):
                if order[i] != order[j]:
                    yield (i, j) if order[i] > order[j] else (j, i)
        elif max(order) > min(order):
            yield order.index(max(order)), order.index(min(order))


def parse_list(row: Row, where: str) -> Item:
    """A row as a prompt and its replies with their ratings.

    Understood: ``prompt`` (a string or messages), ``responses`` (strings) and ``ratings`` (aspect
    to a number for each response, null where missing); and openbmb/UltraFeedback's
    ``instruction`` and ``completions``, each with ``response`` and ``annotations``.

    Raises:
        UserError: naming ``where`` and what is missing or of the wrong form.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}")
    given, replies, ratings = (row.get(key) for key in ("prompt", "responses", "ratings"))
    if "completions" in row:
        given = row.get("instruction")
        replies, ratings = _completions(row["completions"], where)
    if given is None or not isinstance(replies, list) or not isinstance(ratings, Mapping):
        raise UserError(
            f"{where}: expected prompt, responses (a list) and ratings (aspect to a list), or "
            f"instruction and completions; columns are {', '.join(map(str, row))}"
        )
    if not replies or not all(isinstance(reply, str) for reply in replies):
        raise UserError(f"{where}: responses must be texts, at least one")
    read = {
        str(aspect): _numbers(values, f"{where}: ratings.{aspect}", len(replies))
        for aspect, values in ratings.items()
        if values is not None
    }
    item = Item(as_prompt(given, where), tuple(replies), read)
    return checked(item, where)


def _completions(completions: Any, where: str) -> tuple[list[Any], dict[str, list[Any]]]:
    """Responses and ratings of openbmb/UltraFeedback's form."""
    if not isinstance(completions, list) or not all(isinstance(c, Mapping) for c in completions):
        raise UserError(f"{where}: completions must be a list of objects")
    notes = [completion.get("annotations") or {} for completion in completions]
    aspects = dict.fromkeys(aspect for note in notes for aspect in note)
    ratings = {
        aspect: [(note.get(aspect) or {}).get("Rating") for note in notes] for aspect in aspects
    }
    return [completion.get("response") for completion in completions], ratings


def _numbers(values: Any, where: str, replies: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != replies:
        raise UserError(f"{where}: expected a list of {replies} numbers, one a response")
    return tuple(_number(value, where) for value in values)


def _number(value: Any, where: str) -> float:
    """NaN if there is none: UltraFeedback says N/A."""
    if value is None or value == "N/A":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise UserError(f"{where}: {value!r} is no number")
    return number


def _of(item: Item, replies: Sequence[int], rated: bool = True) -> Item:
    """Some of an item's replies."""
    ratings = {a: tuple(values[i] for i in replies) for a, values in item.ratings.items() if rated}
    return replace(item, replies=tuple(item.replies[i] for i in replies), ratings=ratings)


def _repeats(names: Sequence[str]) -> bool:
    return len(set(names)) < len(names)
