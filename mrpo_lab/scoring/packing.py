"""Packing: many items as one row without padding, each prompt once, followed by its replies.

The prompt of a pair is computed once instead of twice (Prefix Sharing, arXiv 2410.20305), and no
position is spent on padding. ``attention`` lets each reply attend to its prompt and itself only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mrpo_lab.data.texts import TokenRow

T = TypeVar("T")


class Segment(NamedTuple):
    """Consecutive tokens of a packed row that belong to one reply: the first reply of an item with
    its prompt, every other reply with what it does not share with the first."""

    prefix_start: int
    """Index of the item's first token, where the prefix begins."""
    prefix: int
    """Number of tokens that are not repeated here; 0 for the item's first reply."""
    start: int
    length: int


class PadToMultipleOf(NamedTuple):
    """Each item, and the packed row, is padded to a multiple of these numbers of tokens."""

    item: int
    row: int


NO_PADDING = PadToMultipleOf(item=1, row=1)


@dataclass(frozen=True, eq=False)
class Layout:
    """The segments of a packed row: all that attention has to know of it."""

    segments: tuple[Segment, ...]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def cached(self, make: Callable[..., T], *arguments: Any) -> T:
        """``make(layout, *arguments)``, made once: all layers of a pass ask for the same, and it
        goes with the layout when the pass is over."""
        key = (make, *arguments)
        if key not in self._made:
            self._made[key] = make(self, *arguments)
        made: T = self._made[key]
        return made

    @property
    def tokens(self) -> int:
        """Length of the packed row."""
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Pack:
    """A packed row of N tokens, with n reply tokens among them.

    Replies of an item that are token for token the same are computed once, so that not even
    rounding tells them apart: there are then fewer texts than replies.
    """

    input_ids: Int[Tensor, "1 N"]
    position_ids: Int[Tensor, "1 N"]
    layout: Layout
    predictors: Int[Tensor, " n"]
    """For each reply token the index in the row of the token before it."""
    targets: Int[Tensor, " n"]
    """The reply tokens' ids."""
    owners: Int[Tensor, " n"]
    """For each reply token the index of its text."""
    counts: Int[Tensor, " texts"]
    """Number of reply tokens of each text."""
    replies: Int[Tensor, " replies"]
    """For each reply the index of its text."""


def pack(
    items: Sequence[tuple[TokenRow, ...]],
    device: torch.device,
    pad_to_multiple_of: PadToMultipleOf = NO_PADDING,
) -> Pack:
    """Lay out ``items`` one after the other in a single row.

    A prompt p q r with replies A B and C D, padded to 8 tokens, then a prompt s with E and F::

        index      0 1 2 3 4 5 6 7 | 8 9 10
        token      p q r A B C D D | s E F
        position   0 1 2 3 4 3 4 4 | 0 1 1
        segment    0 0 0 0 0 1 1 1 | 2 2 3     1 continues the prefix p q r, 3 the prefix s
        predicts   . . A B . D . . | E . .     2 predicts C as well, and 8 predicts F

    Padding repeats an item's last token after its last reply, where no other token sees it.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    segments: list[Segment] = []
    counts: list[int] = []
    replies: list[int] = []
    end = 0  # length of the row so far
    for number, rows in enumerate(items, start=1):
        item_start, shared = end, shared_tokens(rows)
        text_numbers: dict[bytes, int] = {}
        for row in rows:
            text = text_numbers.setdefault(row.ids.tobytes(), len(counts))
            replies.append(text)
            if text < len(counts):  # the same as an earlier reply
                continue
            prefix = shared if len(text_numbers) > 1 else 0
            segments.append(Segment(item_start, prefix, end, len(row.ids) - prefix))
            ids.append(row.ids[prefix:])
            positions.append(np.arange(prefix, len(row.ids)))
            before = np.arange(row.start - 1, len(row.ids) - 1)  # positions, not yet indices
            predictors.append(np.where(before < prefix, item_start, end - prefix) + before)
            targets.append(row.ids[row.start :])
            counts.append(row.reply_tokens)
            end += len(row.ids) - prefix
        last = number == len(items)
        padding = -end % (pad_to_multiple_of.row if last else pad_to_multiple_of.item)
        ids.append(ids[-1][-1:].repeat(padding))
        positions.append(positions[-1][-1:].repeat(padding))  # a model may have no later position
        segments[-1] = segments[-1]._replace(length=segments[-1].length + padding)
        end += padding

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
    """Number of leading tokens that all rows of an item share and that belong to no reply."""
    limit = min(row.start for row in rows)
    first = rows[0].ids[:limit]
    for row in rows[1:]:
        differ = np.flatnonzero(first[:limit] != row.ids[:limit])
        limit = int(differ[0]) if len(differ) else limit
    return limit


def packed_tokens(rows: Sequence[TokenRow]) -> int:
    """Number of tokens of an item in a packed row, without padding."""
    texts = {row.ids.tobytes(): row for row in rows}.values()
    shared = shared_tokens(rows) if len(texts) > 1 else 0
    return shared + sum(len(row.ids) - shared for row in texts)


def longest_and_median(costs: Sequence[int] | np.ndarray) -> list[int]:
    """Indices of the costliest item and of the one with the median cost."""
    order = np.argsort(costs, kind="stable")
    return [int(order[-1]), int(order[len(order) // 2])]


def balanced(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of ``costs`` in groups whose costs sum to at most ``budget``, costliest first.

    There are about as few groups as possible, their sums are about the same, and costs within a
    group are alike. An index that alone exceeds the budget makes a group of its own.
    """
    groups: list[list[int]] = []
    left, spent, share = sum(costs), 0, 0.0
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if not groups or spent + costs[index] > budget or spent + costs[index] / 2 > share:
            share = left / -(-left // budget)  # mean cost of the groups still to be filled
            groups.append([])
            spent = 0
        groups[-1].append(index)
        spent += costs[index]
        left -= costs[index]
    return groups
