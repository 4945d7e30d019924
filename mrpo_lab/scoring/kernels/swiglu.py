"""SwiGLU that keeps its two inputs for the backward pass, and no product of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from mrpo_lab.scoring.kernels.replacement import replace_forward

TOLERANCE = 0.0
"""The forward pass does the same operations in the same order, so every bit must be the same."""


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer, arXiv 2002.05202); the backward pass computes silu(gate) again."""

    @staticmethod
    def forward(
        ctx: Any, gate: Float[Tensor, "*n F"], up: Float[Tensor, "*n F"]
    ) -> Float[Tensor, "*n F"]:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return dgate, silu(gate).mul_(grads[0])


swiglu: Callable[..., Tensor] = SwiGLU.apply


def fuse(model: nn.Module) -> None:
    """Replace every layer that computes down(silu(gate(x)) * up(x)), and nothing else.

    The three projections must be plain linear layers, or such layers with LoRA. Quantized ones may
    change when they are first evaluated, so a layer that has them stays as it is.
    """
    for layer in model.modules():
        parts = [getattr(layer, f"{part}_proj", None) for part in ("gate", "up", "down")]
        linear: list[Any] = [getattr(part, "base_layer", part) for part in parts]  # without LoRA
        if all(type(part) is nn.Linear for part in linear):
            sample = torch.linspace(-2, 3, linear[0].in_features).to(linear[0].weight)[None]
            replace_forward(layer, _forward, sample, TOLERANCE)


def _forward(layer: Any, x: Tensor) -> Tensor:
    down: Tensor = layer.down_proj(swiglu(layer.gate_proj(x), layer.up_proj(x)))
    return down
