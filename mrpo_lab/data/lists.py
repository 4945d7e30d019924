"""Lists of rated replies: parsing their rows, preprocessing, labels, and conversion to pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from mrpo_lab.data.dataset import SPLITS, FileDataset, Prepared, count_leaks
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.rows import Row, as_prompt, checked, column_names, separate, shown
from mrpo_lab.data.spool import Items
from mrpo_lab.data.texts import Item
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.objective.labels import Labels


@dataclass(kw_only=True)
class ListDataset(FileDataset):
    """Prompts with any number of replies, each rated by several aspects.

    The sizes ``train``, ``val``, ``test`` and ``pool`` count prompts.
    """

    aspects: list[str] | None = None
    """The aspects to learn from, in this order; null takes all that the data are rated by."""
    temperature: float = 1.0
    """T of each aspect's target, softmax(rating / T)."""
    max_replies: int | None = None
    """Number of replies to draw from a longer list, the same ones for every seed of the runs."""
    pairs: str | None = None
    """Convert each list to pairs of replies after the split: ``best_worst`` makes one pair,
    ``separable`` all pairs whose targets differ; null keeps lists."""
    by: dict[str, float] | None = None
    """Weights of the aspects when deciding which reply of such a pair is better; null is equal."""

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
        self._aspects_of(items)  # an aspect that is not there is an error before anything is scored
        return items

    def _aspects_of(self, items: Items) -> tuple[str, ...]:
        """The aspects to learn from.

        Raises:
            UserError: ``aspects`` or ``by`` names one that rates no reply.
        """
        chosen = items.aspects if self.aspects is None else tuple(self.aspects)
        unknown = [aspect for aspect in (*chosen, *(self.by or {})) if aspect not in items.aspects]
        if unknown:
            raise UserError(
                f"dataset: no reply is rated by {unknown[0]!r}, but by {list(items.aspects)}"
            )
        return chosen

    def preprocess(self, items: Sequence[Item], counts: Counter[str]) -> Iterator[Item]:
        """Drop repeated replies, draw ``max_replies``, and keep the ratings of the chosen aspects.

        Prompts with one reply, or without an aspect that rates all replies, are dropped. The items
        that are left are rated by the same aspects in the same order, all NaN if one is missing.
        """
        items = Items.from_iterable(items)
        aspects = self._aspects_of(items)
        for item in items:
            kept = self._distinct_replies(item)
            counts["repeated_replies"] += len(item.replies) - len(kept)
            if self.max_replies is not None and len(kept) > self.max_replies:
                kept = self._draw_replies(item, kept)
                counts["lists_drawn_from"] += 1
            if len(kept) < 2:
                counts["dropped_single_reply"] += 1
                continue
            ratings = {aspect: _complete_ratings(item, aspect, kept) for aspect in aspects}
            incomplete = [aspect for aspect, found in ratings.items() if math.isnan(found[0])]
            for aspect in incomplete:
                counts[f"lists_without_{aspect}"] += 1
            if len(incomplete) == len(aspects):
                counts["dropped_unrated"] += 1
                continue
            yield replace(item, replies=tuple(item.replies[i] for i in kept), ratings=ratings)

    def without_replies(self, items: Items, which: np.ndarray, counts: Counter[str]) -> Items:
        """The lists without some of their replies; a list that keeps one reply only is dropped."""
        counts["repeated_replies_after_template"] = int(which.sum())

        def kept() -> Iterator[Item]:
            for item, out in zip(items, which, strict=True):
                places = [i for i in range(len(item.replies)) if not out[i]]
                if len(places) < 2:
                    counts["dropped_identical_after_template"] += 1
                    continue
                ratings = {a: tuple(r[i] for i in places) for a, r in item.ratings.items()}
                replies = tuple(item.replies[i] for i in places)
                yield replace(item, replies=replies, ratings=ratings)

        return Items.from_iterable(kept())

    def _distinct_replies(self, item: Item) -> list[int]:
        """Indices of the replies, each text's first; all indices unless ``drop_identical``."""
        if not self.drop_identical:
            return list(range(len(item.replies)))
        first = {reply: i for i, reply in reversed(list(enumerate(item.replies)))}
        return sorted(first.values())

    def _draw_replies(self, item: Item, replies: list[int]) -> list[int]:
        """Draw ``max_replies`` of the replies' indices.

        The draw depends on ``pool_seed`` and the set of texts alone, not on their order in the row
        or the row's place in the file.
        """
        assert self.max_replies is not None
        ids = reply_ids([item])[0]
        by_id = sorted(replies, key=lambda reply: ids[reply])
        entropy = int.from_bytes(ids[by_id[0]].ljust(16, b"\0"), "little")
        rng = np.random.default_rng([self.pool_seed, entropy])
        return sorted(by_id[i] for i in rng.choice(len(by_id), self.max_replies, replace=False))

    def labels(self, items: Items) -> Labels:
        width = max(len(item.replies) for item in items)
        ratings = torch.full((len(items), len(items.aspects), width), torch.nan).double()
        for n, item in enumerate(items):
            for a, aspect in enumerate(items.aspects):
                ratings[n, a, : len(item.replies)] = torch.tensor(item.ratings[aspect]).double()
        replies = torch.tensor([len(item.replies) for item in items]).unsqueeze(-1)
        present = torch.arange(width) < replies
        return Labels.of_ratings(list(items.aspects), ratings, present, self.temperature)

    def reply_length_bound(self, lengths: np.ndarray, present: np.ndarray) -> np.ndarray:
        """One percentile over all replies: replies of a list have no fixed roles."""
        return np.asarray(np.percentile(lengths[present], self.min_percentile))

    def prepare(
        self,
        items: Sequence[Item],
        tokenizers: Sequence[Tokenization],
        rng: np.random.Generator,
        positions: int | None = None,
    ) -> Prepared:
        lists = super().prepare(items, tokenizers, rng, positions)
        return lists if self.pairs is None else self._as_pairs(lists)

    def _as_pairs(self, lists: Prepared) -> Prepared:
        """Convert each split's lists to pairs, so that no prompt enters a second split."""
        aspects = lists.labels.aspects
        by = self.by or dict.fromkeys(aspects, 1.0)
        scores = lists.labels.mix(torch.tensor([by.get(a, 0.0) for a in aspects]).double())
        pairs_of_list: list[tuple[int, list[tuple[int, int]]]] = []
        splits, tied, pairs = {}, 0, 0
        for name in SPLITS:
            begin = pairs
            for n in lists.splits[name].tolist():
                found = list(self._pairs(scores[n, : len(lists.items[n].replies)].tolist()))
                tied += not found
                pairs += len(found)
                pairs_of_list.append((n, found))
            splits[name] = np.arange(begin, pairs)
            if begin == pairs:
                raise UserError(f"dataset.pairs: no two replies of the {name} split differ")

        def items() -> Iterator[Item]:
            for n, found in pairs_of_list:
                item = lists.items[n]
                for better, worse in found:
                    yield Item(item.prompt, (item.replies[better], item.replies[worse]))

        converted = Items.from_iterable(items())
        counts = {**lists.counts, "lists_all_tied": tied, "pairs": pairs}
        counts |= count_leaks(converted, splits)
        return Prepared(converted, Labels.of_pairs(pairs), splits, counts)

    def _pairs(self, scores: Sequence[float]) -> Iterator[tuple[int, int]]:
        """Yield (better, worse) indices of one list's replies, given how far each is preferred."""
        if self.pairs == "separable":
            for i, j in combinations(range(len(scores)), 2):
                if scores[i] != scores[j]:
                    yield (i, j) if scores[i] > scores[j] else (j, i)
        elif max(scores) > min(scores):
            yield scores.index(max(scores)), scores.index(min(scores))


def parse_list(row: Row, where: str) -> Item:
    """Parse a row of a list: a prompt and its replies with their ratings.

    Accepted forms: ``prompt`` (a string or messages), ``responses`` (strings) and ``ratings``
    (aspect to a number for each response, null where missing); and openbmb/UltraFeedback's
    ``instruction`` and ``completions``, each with ``response`` and ``annotations``.

    Raises:
        UserError: something is missing or of another form; names ``where``.
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
            f"instruction and completions; columns are {column_names(row)}"
        )
    if not replies or not all(isinstance(reply, str) for reply in replies):
        raise UserError(f"{where}: responses must be texts, at least one")
    read = {
        str(aspect): _numbers(values, f"{where}: ratings.{shown(str(aspect))}", len(replies))
        for aspect, values in ratings.items()
        if values is not None
    }
    named = {f"responses[{i}]": reply for i, reply in enumerate(replies)}
    prompt, texts = separate(list(as_prompt(given, where)), named, where)
    return checked(Item(as_prompt(prompt, where), tuple(texts), read), where)


def _completions(completions: Any, where: str) -> tuple[list[Any], dict[str, list[Any]]]:
    """The responses and ratings in the ``completions`` of openbmb/UltraFeedback."""
    if not isinstance(completions, list) or not all(isinstance(c, Mapping) for c in completions):
        raise UserError(f"{where}: completions must be a list of objects")
    notes = [completion.get("annotations") or {} for completion in completions]
    if not all(isinstance(note, Mapping) for note in notes):
        raise UserError(f"{where}: annotations must be objects, one for each aspect")
    aspects = dict.fromkeys(aspect for note in notes for aspect in note)
    ratings = {}
    for aspect in aspects:
        given = [note.get(aspect) or {} for note in notes]
        if not all(isinstance(each, Mapping) for each in given):
            raise UserError(f"{where}: annotations.{shown(aspect)} must be an object with a Rating")
        ratings[aspect] = [each.get("Rating") for each in given]
    return [completion.get("response") for completion in completions], ratings


def _numbers(values: Any, where: str, replies: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != replies:
        raise UserError(f"{where}: expected a list of {replies} numbers, one a response")
    return tuple(_number(value, where) for value in values)


def _number(value: Any, where: str) -> float:
    """Parse one rating; NaN where it is null or, as in UltraFeedback, ``N/A``."""
    if value is None or value == "N/A":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise UserError(f"{where}: {repr(value)[:40]} is no number or too large")
    return number


def _complete_ratings(item: Item, aspect: str, replies: Sequence[int]) -> tuple[float, ...]:
    """An aspect's ratings of some of the item's replies, all NaN if one of them is missing."""
    given = item.ratings.get(aspect)
    ratings = tuple(given[i] for i in replies) if given else (math.nan,)
    return (math.nan,) * len(replies) if any(map(math.isnan, ratings)) else ratings


def _repeats(names: Sequence[str]) -> bool:
    return len(set(names)) < len(names)
