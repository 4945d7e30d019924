"""Attention over a packed row: a reply attends to its prompt and itself, and to nothing else.

transformers lets the attention of a model be replaced by name; the rest of the model is its own.
This is the only module that touches private names of transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
"""Items of at most this many tokens are one block. That computes twice the scores that are needed,
but in fewer and larger matrix products."""
BLOCK = 128
"""Number of queries in a block of a longer item. Keys after the block are skipped, and its scores
fit into the processor's cache."""

ALIGNED = 64
"""The mask is added from a multiple of this many keys on: unaligned slices are slower."""

UNSUPPORTED = ("s_aux", "position_bias")
"""Arguments of transformers' attention interface that are not implemented here."""


def install(config: Any) -> None:
    """Make a model with this ``config`` use packed attention whenever it is called with a
    ``layout``, and its own attention otherwise."""
    own = config._attn_implementation
    name = f"{PREFIX}{own}"
    AttentionInterface.register(name, partial(packed_or_own, own))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation_internal = name


def uninstall(config: Any) -> None:
    """Undo ``install``."""
    config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)


def packed_or_own(
    own: str,
    module: nn.Module,
    *heads: Any,
    layout: Layout | None = None,
    attend: Callable[..., Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls for each layer's attention; ``own`` is the model's."""
    if layout is not None:
        query, key, value, _ = heads
        attend = attend or block_attention
        return packed_attention(query, key, value, layout, attend, **options), None
    if own == "eager":  # every model file has a function of this name
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[own]
    attended: tuple[Tensor, Tensor | None] = function(module, *heads, **options)
    return attended


def packed_attention(
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 G N D"],
    value: Float[Tensor, "1 G N D"],
    layout: Layout,
    attend: Callable[..., Tensor],
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> Float[Tensor, "1 N H D"]:
    """softmax(q k^T scaling) v over the keys that ``layout`` lets each query see.

    H query heads share G key and value heads, where G divides H. ``attend`` is what the device
    computes it with, as ``Backend.attend``.

    Raises:
        NotImplementedError: the model uses dropout or another option that is not implemented here,
            or ``attend`` does not compute it on this device.
    """
    unsupported = [name for name in UNSUPPORTED if other.get(name) is not None]
    if unsupported or dropout:
        raise NotImplementedError(f"attention has {unsupported[0] if unsupported else 'dropout'}")
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or layout.tokens,
        softcap=softcap,
    )
    attended = attend(query[0], key[0], value[0], layout, options)
    return attended.transpose(0, 1)[None]


class AttentionOptions(NamedTuple):
    """Options of one layer's attention."""

    scale: float
    """Factor of the products of queries and keys."""
    window: int
    """Number of positions that a query sees, counted back from its own, which is included."""
    softcap: float | None
    """If given, scores are ``softcap * tanh(scores / softcap)``."""


class BlockAttention(torch.autograd.Function):
    """softmax(q k^T scale) v, block by block; no scores are kept for the backward pass.

    The forward pass uses torch's fused kernel. The backward pass computes the softmax again and
    uses plain matrix products: torch's fused one does not use the bfloat16 instructions of a CPU
    and takes twice as long or more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "H N D"],
        key: Float[Tensor, "G N D"],
        value: Float[Tensor, "G N D"],
        layout: Layout,
        options: AttentionOptions,
    ) -> Float[Tensor, "H N D"]:
        ctx.options = options
        ctx.blocks = layout.cached(blocks, options.window, query.dtype, query.device)
        ctx.save_for_backward(query, key, value)
        # In memory tokens come before heads, as the projection that follows reads them.
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1]).transpose(0, 1)
        for block in ctx.blocks:
            q, k, v = query[:, block.rows], block.keys(key), block.keys(value)
            if options.softcap is None:
                out[:, block.rows] = nn.functional.scaled_dot_product_attention(
                    q[None], k[None], v[None], block.mask, scale=options.scale, enable_gqa=True
                )[0]
            else:
                scaled = block.queries(query, len(key)) * options.scale
                p = block.softmax(_scores(scaled, k, options.softcap))
                out[:, block.rows] = (p @ v).reshape(len(query), -1, value.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        options: AttentionOptions = ctx.options
        query = query * options.scale
        dquery = torch.empty_like(query)
        dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            q, k, v = block.queries(query, len(key)), block.keys(key), block.keys(value)
            dout = block.queries(grads[0], len(key))
            scores = _scores(q, k, options.softcap)
            slope = None
            if options.softcap is not None:  # the derivative of tanh
                slope = 1 - (scores / options.softcap).square()
            p, dp = block.softmax(scores), dout @ v.transpose(1, 2)
            ds = _softmax_backward(dp, p, -1, p.dtype, grad_input=dp)
            ds = ds if slope is None else ds.mul_(slope)
            dquery[:, block.rows] = (ds @ k).reshape(len(query), -1, query.shape[-1])
            block.add(dkey, ds.transpose(1, 2) @ q)
            block.add(dvalue, p.transpose(1, 2) @ dout)
        return dquery.mul_(options.scale), dkey, dvalue, None, None


_softmax_backward = torch.ops.aten._softmax_backward_data.out
block_attention: Callable[..., Tensor] = BlockAttention.apply


@dataclass(frozen=True)
class Block:
    """m queries of one item and the S keys that they may see, as slices of the packed row."""

    rows: slice
    """The queries."""
    prefix: slice
    """Keys in the shared part of the prompt, if it lies outside ``own``."""
    own: slice
    """Keys in the queries' own segment."""
    mask: Float[Tensor, "m S"]
    """Added to the scores: -inf where a query must not see a key, else 0."""
    first: int
    """Index of a key; every query sees all keys before it, so that the mask there is 0."""

    def queries(self, heads: Float[Tensor, "H N D"], groups: int) -> Float[Tensor, "G m D"]:
        """The block's queries, those of the H // G heads that share keys one after the other."""
        return heads[:, self.rows].reshape(groups, -1, heads.shape[-1])

    def keys(self, heads: Float[Tensor, "G N D"]) -> Float[Tensor, "G S D"]:
        """The block's keys, or values."""
        own = heads[:, self.own]
        return torch.cat([heads[:, self.prefix], own], dim=1) if self._shared else own

    def add(self, heads: Float[Tensor, "G N D"], gradient: Float[Tensor, "G S D"]) -> None:
        """Add the gradient of ``keys(heads)`` to the gradient of ``heads``, in place."""
        if self._shared:
            heads[:, self.prefix].add_(gradient[:, : self._shared])
        heads[:, self.own].add_(gradient[:, self._shared :])

    def softmax(self, scores: Float[Tensor, "G m S"]) -> Float[Tensor, "G m S"]:
        """The softmax over the keys that each query sees, in place. torch computes it in float32,
        also for ``scores`` in 16 bits."""
        by_query = scores.view(len(scores), -1, *self.mask.shape)
        by_query[..., self.first :].add_(self.mask[:, self.first :])
        return torch.softmax(scores, -1, out=scores)

    @property
    def _shared(self) -> int:
        return int(self.prefix.stop - self.prefix.start)


def blocks(
    layout: Layout, window: int, dtype: torch.dtype, device: torch.device
) -> tuple[Block, ...]:
    """The blocks of a packed row: one for each short item, several for a long one."""
    found = []
    for _, group in groupby(layout.segments, key=lambda segment: segment.prefix_start):
        item = tuple(group)
        whole = slice(item[0].start, item[-1].start + item[-1].length)
        short = whole.stop - whole.start <= WHOLE
        spans = [(whole, slice(0, 0), whole)] if short else _spans(item, window)
        for rows, prefix, own in spans:
            hidden = _hidden(item, rows, np.r_[prefix, own], window)
            first = int(hidden.any(0).argmax()) if hidden.any() else hidden.shape[1]
            mask = torch.from_numpy(np.where(hidden, -np.inf, 0)).to(device, dtype)
            found.append(Block(rows, prefix, own, mask, first // ALIGNED * ALIGNED))
    return tuple(found)


def _spans(item: tuple[Segment, ...], window: int) -> Iterator[tuple[slice, slice, slice]]:
    """(queries, keys in the prefix, keys in their own segment) of each block of a long item."""
    for prefix_start, prefix, start, length in item:
        for first in range(0, length, BLOCK):
            last = min(length, first + BLOCK)
            # Position of the first key in the first query's window.
            oldest = max(0, prefix + first - window + 1)
            yield (
                slice(start + first, start + last),
                slice(prefix_start + min(oldest, prefix), prefix_start + prefix),
                slice(start + max(0, oldest - prefix), start + last),
            )


def _hidden(
    item: tuple[Segment, ...], rows: slice, keys: np.ndarray, window: int
) -> Bool[np.ndarray, "m S"]:
    """Whether query i of ``rows`` must not see key j of ``keys``; both are indices into the packed
    row."""
    lengths = [segment.length for segment in item]
    position = np.concatenate([segment.prefix + np.arange(segment.length) for segment in item])
    prefix = np.repeat([segment.prefix for segment in item], lengths)
    owner = np.repeat(np.arange(len(item)), lengths)
    q, k = np.r_[rows][:, None] - item[0].start, keys - item[0].start
    same_row = (owner[q] == owner[k]) | ((owner[k] == 0) & (position[k] < prefix[q]))
    back = position[q] - position[k]
    hidden: np.ndarray = ~(same_row & (back >= 0) & (back < window))
    return hidden


def _scores(
    q: Float[Tensor, "G m D"], k: Float[Tensor, "G S D"], softcap: float | None
) -> Float[Tensor, "G m S"]:
    scores = q @ k.transpose(1, 2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
