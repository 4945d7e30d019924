"""Packed attention on a GPU, by torch's flash attention for sequences of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mrpo_lab.scoring.attention import AttentionOptions
from mrpo_lab.scoring.packing import Layout

DTYPES = (torch.bfloat16, torch.float16)
"""The types in which flash attention computes."""
CAPABILITY = (8, 0)
"""The oldest compute capability of a GPU that has it: Ampere."""
HEAD_DIMENSION = 256
"""The largest dimension of a head that it takes."""

flash_attention: Callable[..., Any] = varlen_attn
"""The kernel. Tests put a function with the same signature in its place, where there is no GPU."""


class Sequences(NamedTuple):
    """The segments of a packed row as S sequences of queries, each with keys of its own.

    A segment's keys are the part of the prompt that it shares, followed by the segment itself. The
    kernel lets the last query see all keys, the one before it all but one, and so on: the prompt is
    seen by every query.
    """

    keys: Int[Tensor, " K"] | None
    """Indices into the packed row of the keys of all sequences; None if they are the row itself."""
    query_ends: Int[Tensor, " S+1"]
    """0, and where each sequence's queries end."""
    key_ends: Int[Tensor, " S+1"]
    most_queries: int
    most_keys: int


def sequences(layout: Layout, device: torch.device) -> Sequences:
    """The sequences of a packed row. None is empty, and their queries are the whole row in order:
    the kernel hangs or gives gradients that are nan otherwise."""
    queries = [segment.length for segment in layout.segments]
    keys = [
        np.r_[s.prefix_start : s.prefix_start + s.prefix, s.start : s.start + s.length]
        for s in layout.segments
    ]

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    shared = any(segment.prefix for segment in layout.segments)
    return Sequences(
        keys=torch.from_numpy(np.concatenate(keys)).to(device) if shared else None,
        query_ends=ends(queries),
        key_ends=ends([len(indices) for indices in keys]),
        most_queries=max(queries),
        most_keys=max(map(len, keys)),
    )


def varlen_attention(
    query: Float[Tensor, "H N D"],
    key: Float[Tensor, "G N D"],
    value: Float[Tensor, "G N D"],
    layout: Layout,
    options: AttentionOptions,
) -> Float[Tensor, "H N D"]:
    """softmax(q k^T scale) v over the keys that ``layout`` lets each query see.

    Raises:
        NotImplementedError: the kernel does not compute this on this device.
    """
    refuse_unsupported(query, options)
    found = layout.cached(sequences, query.device)
    q, k, v = (heads.transpose(0, 1) for heads in (query, key, value))
    if found.keys is not None:
        k, v = k.index_select(0, found.keys), v.index_select(0, found.keys)
    attended: Tensor = flash_attention(
        q,
        k,
        v,
        found.query_ends,
        found.key_ends,
        found.most_queries,
        found.most_keys,
        scale=options.scale,
        window_size=(-1 if options.window >= layout.tokens else options.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended.transpose(0, 1)


def refuse_unsupported(query: Float[Tensor, "H N D"], options: AttentionOptions) -> None:
    """Raise an error, before the kernel does, where it has no code for a model or a GPU.

    Raises:
        NotImplementedError: says why.
    """
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"flash attention takes 16 bits, and the model has {query.dtype}")
    if query.shape[-1] > HEAD_DIMENSION:
        raise NotImplementedError(f"a head has {query.shape[-1]} dimensions, over {HEAD_DIMENSION}")
    if options.softcap is not None:
        raise NotImplementedError("flash attention has no soft cap")
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < CAPABILITY:
        raise NotImplementedError("flash attention needs a GPU of compute capability 8.0")
