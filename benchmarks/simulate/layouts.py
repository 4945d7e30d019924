"""What a forward pass computes when the items of a step are laid out in one way or another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from mrpo_lab.data.texts import Replies, TokenRow
from mrpo_lab.scoring.packing import NO_PADDING, PadToMultipleOf, balanced, pack, packed_tokens
from mrpo_lab.scoring.padding import collate

CPU = torch.device("cpu")


class Pass(NamedTuple):
    """The size of one forward pass."""

    tokens: int
    """Number of tokens computed, padding included."""
    pairs: int
    """Number of pairs of a query and a key that attention computes, in each head."""
    replies: int
    """Number of reply positions, which alone meet the output embedding."""


class Layout(NamedTuple):
    """A way to lay out items in a forward pass."""

    name: str
    cost: Callable[[Replies], int]
    """Number of tokens of an item, as far as one item can tell: what budgets limit."""
    lay_out: Callable[[Sequence[Replies], PadToMultipleOf], Pass]
    """The pass that some items make."""

    def passes(
        self, items: Sequence[Replies], budget: int, padding: PadToMultipleOf = NO_PADDING
    ) -> list[Pass]:
        """The passes in which a step or an evaluation computes ``items``.

        Args:
            budget: most tokens of a pass; a longer item makes one of its own.
            padding: of packs; see ``pack``.
        """
        groups = balanced([self.cost(item) for item in items], budget)
        return [self.lay_out([items[i] for i in group], padding) for group in groups]


def _padded(items: Sequence[Replies], _: PadToMultipleOf, masked: bool) -> Pass:
    """With a mask every query meets every key; without, a causal kernel leaves out later keys."""
    batch = collate([row for item in items for row in item], CPU)
    rows, width = batch.input_ids.shape
    pairs = rows * width * (width if masked else width + 1) // (1 if masked else 2)
    return Pass(rows * width, pairs, int(batch.is_reply.sum()))


def _packed(items: Sequence[Replies], padding: PadToMultipleOf) -> Pass:
    packed = pack(items, CPU, padding)
    pairs = sum(
        s.length * s.prefix + s.length * (s.length + 1) // 2 for s in packed.layout.segments
    )
    return Pass(packed.layout.tokens, pairs, len(packed.targets))


def _packed_alone(items: Sequence[Replies], padding: PadToMultipleOf) -> Pass:
    return _packed([(row,) for item in items for row in item], padding)


def _padded_tokens(item: Replies) -> int:
    return len(item) * max(len(row.ids) for row in item)


def _row_tokens(item: Replies) -> int:
    return sum(len(row.ids) for row in item)


MASKED = Layout("padded with mask", _padded_tokens, partial(_padded, masked=True))
PADDED = Layout("padded", _padded_tokens, partial(_padded, masked=False))
PACKED = Layout("packed", _row_tokens, _packed_alone)
SHARED = Layout("packed, shared prompt", packed_tokens, _packed)
LAYOUTS = (MASKED, PADDED, PACKED, SHARED)


def rows_of(lengths: Sequence[int]) -> Replies:
    """Token rows of one item with these lengths: the prompt's, then each reply's.

    Tokens are the reply's number, so that no two replies are the same and the prompt is shared.
    """
    prompt, *replies = lengths
    return tuple(
        TokenRow(np.repeat(np.array([0, number], dtype=np.int32), [prompt, length]), prompt)
        for number, length in enumerate(replies, start=1)
    )


def items_of(lengths: Iterable[Sequence[int]]) -> list[Replies]:
    """Token rows of several items."""
    return [rows_of(item) for item in lengths]
