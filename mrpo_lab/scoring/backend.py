"""What a device computes with: the one place where a GPU and a CPU are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mrpo_lab.scoring.attention import block_attention
from mrpo_lab.scoring.packing import NO_PADDING, PadToMultipleOf
from mrpo_lab.scoring.varlen import varlen_attention


class Backend(NamedTuple):
    """The attention, the padding and the sizes that suit a device."""

    name: str
    """What messages call the attention over packed rows."""
    attend: Callable[..., Tensor] | None
    """That attention, ``(query, key, value, layout, options)``; None if rows are to be padded."""
    pad_to_multiple_of: PadToMultipleOf
    """How packed rows are padded."""
    logits_at_once: int
    """Number of logits (positions times vocabulary) in memory at once. Smaller chunks read the
    weights of the output embedding more often."""
    softmax_at_once: int
    """Number of logits of which the float32 softmax is taken at once."""
    fuses_layers: bool
    """Whether ``kernels.fuse`` replaces layers: its functions were written for CPUs."""


CPU = Backend(
    name="packed rows, attention in blocks",
    attend=block_attention,
    pad_to_multiple_of=NO_PADDING,
    logits_at_once=2**23,
    softmax_at_once=2**20,  # 4 MiB, which fit into a processor's cache
    fuses_layers=True,
)
CPU_16_BIT = CPU._replace(
    # oneDNN compiles a kernel for every shape of a product and keeps a thousand of them, at 2 ms
    # and 0.7 MB each: few distinct shapes.
    pad_to_multiple_of=PadToMultipleOf(item=8, row=64),
)
GPU = Backend(
    name="packed rows, flash varlen",
    attend=varlen_attention,
    pad_to_multiple_of=PadToMultipleOf(item=1, row=256),  # the allocator reuses equal shapes
    logits_at_once=2**28,
    softmax_at_once=2**26,
    fuses_layers=False,
)
DETERMINISTIC_GPU = GPU._replace(name="padded rows", attend=None)
"""The backward passes of flash attention of variable lengths, and of the selection of keys, add up
in an order that differs from run to run."""


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a model with weights of ``dtype`` on ``device``."""
    if device.type == "cuda":
        return DETERMINISTIC_GPU if torch.are_deterministic_algorithms_enabled() else GPU
    return CPU_16_BIT if dtype.itemsize == 2 else CPU
