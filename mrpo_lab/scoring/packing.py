"""Items as one row without padding: each prompt once, then its replies, item after item.

A pair's prompt is computed once instead of twice (Prefix Sharing, arXiv 2410.20305), and no
position is spent on padding. ``attention`` lets each reply see its prompt and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mrpo_lab.data.texts import TokenRow


class Segment(NamedTuple):
    """Consecutive tokens of the pack: an item's prompt with its first reply, or another reply,
    which continues the ``prefix`` tokens that stand at the item's start."""

    prefix_start: int
    prefix: int
    start: int
    length: int


class Multiples(NamedTuple):
    """What an item's tokens, and the pack's, are filled up to a multiple of."""

    item: int
    pack: int


ONE = Multiples(item=1, pack=1)
"""Nothing is filled up."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Who sees whom in a pack: all that attention has to know."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Pack:
    """N tokens of several items, with n reply tokens among them."""

    input_ids: Int[Tensor, "1 N"]
    position_ids: Int[Tensor, "1 N"]
    layout: Layout
    predictors: Int[Tensor, " n"]
    """Where in the pack the token before each reply token stands."""
    targets: Int[Tensor, " n"]
    owners: Int[Tensor, " n"]
    """To which text, counted through the pack, each reply token belongs."""
    counts: Int[Tensor, " texts"]
    """Reply tokens of each."""
    replies: Int[Tensor, " replies"]
    """Which text each reply is: replies of an item that are the same are computed once, so that
    not even rounding tells them apart."""


def pack(
    items: Sequence[tuple[TokenRow, ...]],
    device: torch.device,
    multiples: Multiples = ONE,
) -> Pack:
    """Lay out ``items`` one after the other, filled up by tokens after their last replies."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    segments: list[Segment] = []
    counts: list[int] = []
    replies: list[int] = []
    end = 0
    for number, rows in enumerate(items, start=1):
        first, shared = end, shared_tokens(rows)
        known: dict[bytes, int] = {}
        for row in rows:
            text = row.ids.tobytes()
            replies.append(known.setdefault(text, len(counts)))
            if replies[-1] < len(counts):
                continue
            prefix = shared if len(known) > 1 else 0
            segments.append(Segment(first, prefix, end, len(row.ids) - prefix))
            ids.append(row.ids[prefix:])
            positions.append(np.arange(prefix, len(row.ids)))
            before = np.arange(row.start - 1, len(row.ids) - 1)  # in the row's own positions
            predictors.append(np.where(before < prefix, first, end - prefix) + before)
            targets.append(row.ids[row.start :])
            counts.append(row.reply_tokens)
            end += len(row.ids) - prefix
        spare = -end % (multiples.pack if number == len(items) else multiples.item)
        ids.append(ids[-1][-1:].repeat(spare))
        positions.append(positions[-1][-1:].repeat(spare))  # beyond it a model may have none
        segments[-1] = segments[-1]._replace(length=segments[-1].length + spare)
        end += spare

    def tensor(parts: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return Pack(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        layout=Layout(tuple(segments)),
        predictors=tensor(predictors),
        targets=tensor(targets),
        owners=tensor([np.repeat(np.arange(len(counts)), counts)]),
        counts=tensor([np.array(counts)]),
        replies=tensor([np.array(replies)]),
    )


def shared_tokens(rows: Sequence[TokenRow]) -> int:
    """How many tokens of an item's rows are the same in all of them, and no reply's."""
    limit = min(row.start for row in rows)
    first = rows[0].ids[:limit]
    for row in rows[1:]:
        differ = np.flatnonzero(first[:limit] != row.ids[:limit])
        limit = int(differ[0]) if len(differ) else limit
    return limit


def packed_tokens(rows: Sequence[TokenRow]) -> int:
    """Tokens that an item takes in a pack."""
    texts = {row.ids.tobytes(): row for row in rows}.values()
    shared = shared_tokens(rows) if len(texts) > 1 else 0
    return shared + sum(len(row.ids) - shared for row in texts)


def longest_and_median(costs: Sequence[int] | np.ndarray) -> list[int]:
    """Indices of two items that stand for all."""
    order = np.argsort(costs, kind="stable")
    return [int(order[-1]), int(order[len(order) // 2])]


def balanced(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in as few groups as ``budget`` allows, of like cost within and about the same sum,
    costliest first. An index that alone exceeds the budget makes a group of its own."""
    groups: list[list[int]] = []
    left, spent, share = sum(costs), 0, 0.0
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if not groups or spent + costs[index] > budget or spent + costs[index] / 2 > share:
            share = left / -(-left // budget)  # of the groups that are still to be filled
            groups.append([])
            spent = 0
        groups[-1].append(index)
        spent += costs[index]
        left -= costs[index]
    return groups
