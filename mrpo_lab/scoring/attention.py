"""Attention over a pack: a reply sees its prompt and itself, nothing of other replies or items.

``transformers`` lets a model's attention be replaced by name; all else of the model stays its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mrpo_lab.scoring.packing import Layout, Segment

PREFIX = "packed_or_"
WHOLE = 256
"""Tokens up to which an item is one block: fewer, larger products, though half are of no use."""
BLOCK = 128
"""Queries of a longer item at once. Keys after them are skipped; scores stay in the processor's
cache."""

ALIGNED = 64
"""Slices that begin at a multiple of it are not slower than whole rows."""

# What a model may ask of its attention that is not done here; the model is then scored plainly.
UNKNOWN = ("s_aux", "position_bias")


def install(config: Any) -> None:
    """Let a model with this ``config`` attend to packs when it is given a ``layout``; without one
    it attends as before."""
    own = config._attn_implementation
    name = f"{PREFIX}{own}"
    AttentionInterface.register(name, partial(packed_or_own, own))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation_internal = name


def uninstall(config: Any) -> None:
    config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)


def packed_or_own(
    own: str, module: nn.Module, *heads: Any, layout: Layout | None = None, **how: Any
) -> tuple[Tensor, Tensor | None]:
    """``transformers``' attention interface."""
    if layout is not None:
        query, key, value, _ = heads
        return packed_attention(query, key, value, layout, **how), None
    if own == "eager":  # each model file has its own, of this name
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[own]
    attended: tuple[Tensor, Tensor | None] = attend(module, *heads, **how)
    return attended


def packed_attention(
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 G N D"],
    value: Float[Tensor, "1 G N D"],
    layout: Layout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> Float[Tensor, "1 N H D"]:
    """Attention within the layout; G divides H where heads share keys and values.

    Raises:
        NotImplementedError: the model wants something that this attention does not do.
    """
    unknown = [name for name in UNKNOWN if other.get(name) is not None]
    if unknown or dropout:
        raise NotImplementedError(f"attention has {unknown[0] if unknown else 'dropout'}")
    how = How(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or layout.tokens,
        softcap=softcap,
    )
    attended = block_attention(query[0], key[0], value[0], layout, how)
    return attended.transpose(0, 1)[None]


class How(NamedTuple):
    """What a layer's attention is like."""

    scale: float
    window: int
    """How many positions back a query sees, its own included."""
    softcap: float | None
    """Bound of the scores, reached by tanh."""


class BlockAttention(torch.autograd.Function):
    """softmax(q k' scale) v, block by block, of which nothing is kept.

    Forward by torch's fused kernel. Its backward pass does not use a processor's bfloat16: that is
    done by plain matrix products, twice as fast or more, with the softmax computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "H N D"],
        key: Float[Tensor, "G N D"],
        value: Float[Tensor, "G N D"],
        layout: Layout,
        how: How,
    ) -> Float[Tensor, "H N D"]:
        ctx.how, ctx.blocks = how, blocks(layout, how.window, query.dtype, query.device)
        ctx.save_for_backward(query, key, value)
        # Laid out by token, as the projection that follows reads it.
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1]).transpose(0, 1)
        for block in ctx.blocks:
            q, k, v = query[:, block.rows], block.keys(key), block.keys(value)
            if how.softcap is None:
                out[:, block.rows] = nn.functional.scaled_dot_product_attention(
                    q[None], k[None], v[None], block.mask, scale=how.scale, enable_gqa=True
                )[0]
            else:
                p = block.softmax(_scores(block.queries(query, len(key)) * how.scale, k, how))
                out[:, block.rows] = (p @ v).reshape(len(query), -1, value.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        how: How = ctx.how
        query = query * how.scale
        dquery = torch.empty_like(query)
        dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            q, k, v = block.queries(query, len(key)), block.keys(key), block.keys(value)
            dout = block.queries(grads[0], len(key))
            scores = _scores(q, k, how)
            slope = None if how.softcap is None else 1 - (scores / how.softcap).square()
            p, dp = block.softmax(scores), dout @ v.transpose(1, 2)
            ds = _softmax_backward(dp, p, -1, p.dtype, grad_input=dp)
            ds = ds if slope is None else ds.mul_(slope)
            dquery[:, block.rows] = (ds @ k).reshape(len(query), -1, query.shape[-1])
            block.add(dkey, ds.transpose(1, 2) @ q)
            block.add(dvalue, p.transpose(1, 2) @ dout)
        return dquery.mul_(how.scale), dkey, dvalue, None, None


_softmax_backward = torch.ops.aten._softmax_backward_data.out
block_attention: Callable[..., Tensor] = BlockAttention.apply


@dataclass(frozen=True)
class Block:
    """Some queries of one item, and the keys that they see."""

    rows: slice
    prefix: slice
    own: slice
    """Keys: tokens that stand elsewhere in the item, then those among the queries."""
    mask: Float[Tensor, "m S"]
    """-inf where a query must not look, else 0."""
    first: int
    """All queries may look at the keys before this one."""

    def queries(self, heads: Float[Tensor, "H N D"], groups: int) -> Float[Tensor, "G m D"]:
        """Of the H // G heads that share keys, one after the other."""
        return heads[:, self.rows].reshape(groups, -1, heads.shape[-1])

    def keys(self, heads: Float[Tensor, "G N D"]) -> Float[Tensor, "G S D"]:
        own = heads[:, self.own]
        return torch.cat([heads[:, self.prefix], own], dim=1) if self._shared else own

    def add(self, heads: Float[Tensor, "G N D"], gradient: Float[Tensor, "G S D"]) -> None:
        """The inverse of ``keys``."""
        if self._shared:
            heads[:, self.prefix].add_(gradient[:, : self._shared])
        heads[:, self.own].add_(gradient[:, self._shared :])

    def softmax(self, scores: Float[Tensor, "G m S"]) -> Float[Tensor, "G m S"]:
        """Over the keys that each query may see, in place; torch computes 16 bits' in float32."""
        by_query = scores.view(len(scores), -1, *self.mask.shape)
        by_query[..., self.first :].add_(self.mask[:, self.first :])
        return torch.softmax(scores, -1, out=scores)

    @property
    def _shared(self) -> int:
        return int(self.prefix.stop - self.prefix.start)


@lru_cache(maxsize=8)  # all layers of a pass ask for the same, and so does its backward pass
def blocks(
    layout: Layout, window: int, dtype: torch.dtype, device: torch.device
) -> tuple[Block, ...]:
    """All queries of the layout: a short item's at once, a long one's some at a time."""
    found = []
    for _, group in groupby(layout.segments, key=lambda segment: segment.prefix_start):
        item = tuple(group)
        all_of_it = slice(item[0].start, item[-1].start + item[-1].length)
        short = all_of_it.stop - all_of_it.start <= WHOLE
        spans = [(all_of_it, slice(0, 0), all_of_it)] if short else _spans(item, window)
        for rows, prefix, own in spans:
            hidden = _hidden(item, rows, np.r_[prefix, own], window)
            first = int(hidden.any(0).argmax()) if hidden.any() else hidden.shape[1]
            mask = torch.from_numpy(np.where(hidden, -np.inf, 0)).to(device, dtype)
            found.append(Block(rows, prefix, own, mask, first // ALIGNED * ALIGNED))
    return tuple(found)


def _spans(item: tuple[Segment, ...], window: int) -> Iterator[tuple[slice, slice, slice]]:
    """(queries, keys of the prefix, keys of their own segment) of a long item."""
    for prefix_start, prefix, start, length in item:
        for first in range(0, length, BLOCK):
            last = min(length, first + BLOCK)
            oldest = max(0, prefix + first - window + 1)  # position of the first key in the window
            yield (
                slice(start + first, start + last),
                slice(prefix_start + min(oldest, prefix), prefix_start + prefix),
                slice(start + max(0, oldest - prefix), start + last),
            )


def _hidden(
    item: tuple[Segment, ...], rows: slice, keys: np.ndarray, window: int
) -> Bool[np.ndarray, "m S"]:
    """Which keys (places in the pack) the queries ``rows`` must not look at."""
    lengths = [segment.length for segment in item]
    position = np.concatenate([segment.prefix + np.arange(segment.length) for segment in item])
    prefix = np.repeat([segment.prefix for segment in item], lengths)
    owner = np.repeat(np.arange(len(item)), lengths)
    q, k = np.r_[rows][:, None] - item[0].start, keys - item[0].start
    same_row = (owner[q] == owner[k]) | ((owner[k] == 0) & (position[k] < prefix[q]))
    back = position[q] - position[k]
    hidden: np.ndarray = ~(same_row & (back >= 0) & (back < window))
    return hidden


def _scores(q: Float[Tensor, "G m D"], k: Float[Tensor, "G S D"], how: How) -> Tensor:
    scores = q @ k.transpose(1, 2)
    return scores if how.softcap is None else how.softcap * torch.tanh(scores / how.softcap)
