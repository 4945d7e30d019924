"""Replacing a layer's forward, on the condition that its numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def replace_forward(
    layer: nn.Module, forward: Callable[[Tensor], Tensor], sample: Tensor, tolerance: float
) -> None:
    """Let ``layer`` compute ``forward`` from now on, if on ``sample`` both give the same numbers.

    Args:
        tolerance: largest relative difference; 0 asks for the same bits.
    """
    try:
        same = torch.allclose(forward(sample), layer(sample), rtol=tolerance, atol=0)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return  # the layer takes or returns something else than one tensor
    if same:
        layer.forward = forward
