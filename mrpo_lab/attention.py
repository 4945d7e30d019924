"""Attention over a pack: a reply sees its prompt and itself, nothing of other replies or items.

``transformers`` lets a model's attention be replaced by name; all else of the model stays its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mrpo_lab.packing import Layout

PREFIX = "packed_or_"
BLOCK = 128
"""Queries at once. Keys after a block are skipped; its scores stay in the processor's cache."""

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
    """softmax(q k' scale) v, block by block; the backward pass computes the softmax again.

    Plain matrix products: on CPUs, where torch's fused kernel does not use bfloat16's speed, two to
    three times as fast in bfloat16, as fast in float32, and as small.
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
        query = query * how.scale
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.how = layout, how
        # Laid out by token, as the projection that follows reads it.
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1]).transpose(0, 1)
        for block in blocks(layout, how.window):
            q, k, v = block.queries(query, len(key)), block.keys(key), block.keys(value)
            p = _softmax(_scores(q, k, how), block, how.window)
            out[:, block.rows] = (p @ v).reshape(len(query), -1, value.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        how: How = ctx.how
        dquery = torch.empty_like(query)
        dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
        for block in blocks(ctx.layout, how.window):
            q, k, v = block.queries(query, len(key)), block.keys(key), block.keys(value)
            dout = block.queries(grads[0], len(key))
            scores = _scores(q, k, how)
            slope = None if how.softcap is None else 1 - (scores / how.softcap).square()
            p = _softmax(scores, block, how.window)
            ds = torch._softmax_backward_data(dout @ v.transpose(1, 2), p, -1, p.dtype)
            ds = ds if slope is None else ds * slope
            dquery[:, block.rows] = (ds @ k).reshape(len(query), -1, query.shape[-1])
            block.add(dkey, ds.transpose(1, 2) @ q)
            block.add(dvalue, p.transpose(1, 2) @ dout)
        return dquery.mul_(how.scale), dkey, dvalue, None, None


block_attention: Callable[..., Tensor] = BlockAttention.apply


class Block:
    """Some queries of one segment, and the keys that they see: of its prefix, then its own."""

    def __init__(self, rows: slice, prefix: slice, own: slice) -> None:
        if prefix.stop == own.start:  # as with an item's first reply: no need to put together
            prefix, own = slice(prefix.start, prefix.start), slice(prefix.start, own.stop)
        self.rows, self.prefix, self.own = rows, prefix, own
        self.shared = prefix.stop - prefix.start
        self.size = rows.stop - rows.start

    def queries(self, heads: Float[Tensor, "H N D"], groups: int) -> Float[Tensor, "G m D"]:
        """Of the H // G heads that share keys, one after the other."""
        return heads[:, self.rows].reshape(groups, -1, heads.shape[-1])

    def keys(self, heads: Float[Tensor, "G N D"]) -> Float[Tensor, "G S D"]:
        own = heads[:, self.own]
        return torch.cat([heads[:, self.prefix], own], dim=1) if self.shared else own

    def add(self, heads: Float[Tensor, "G N D"], gradient: Float[Tensor, "G S D"]) -> None:
        """The inverse of ``keys``."""
        if self.shared:
            heads[:, self.prefix] += gradient[:, : self.shared]
        heads[:, self.own] += gradient[:, self.shared :]


def blocks(layout: Layout, window: int) -> Iterator[Block]:
    for prefix_start, prefix, start, length in layout.segments:
        for first in range(0, length, BLOCK):
            last = min(length, first + BLOCK)
            oldest = max(0, prefix + first - window + 1)  # position of the first key in the window
            yield Block(
                slice(start + first, start + last),
                slice(prefix_start + min(oldest, prefix), prefix_start + prefix),
                slice(start + max(0, oldest - prefix), start + last),
            )


def _scores(q: Float[Tensor, "G m D"], k: Float[Tensor, "G S D"], how: How) -> Tensor:
    scores = q @ k.transpose(1, 2)
    return scores if how.softcap is None else how.softcap * torch.tanh(scores / how.softcap)


def _softmax(scores: Float[Tensor, "G m S"], block: Block, window: int) -> Float[Tensor, "G m S"]:
    """Over the keys that each query may see; torch computes 16 bits' in float32."""
    groups, _, keys = scores.shape
    by_query = scores.view(groups, -1, block.size, keys)
    recent = keys - block.size
    by_query[..., recent:] += _future(block.size, scores.dtype, scores.device)
    if keys > window:
        by_query += _beyond(block.size, keys, window, scores.dtype, scores.device)
    return torch.softmax(scores, -1)


@cache
def _future(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "m m"]:
    """-inf where a key comes after the query."""
    return torch.full((size, size), -torch.inf, dtype=dtype, device=device).triu(1)


def _beyond(
    size: int, keys: int, window: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "m S"]:
    """-inf where a key is ``window`` or more positions before the query."""
    hidden = torch.full((size, keys), -torch.inf, dtype=dtype, device=device)
    return hidden.tril(keys - size - window)
