"""SwiGLU that keeps its two factors' inputs for the backward pass, and no product of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu


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


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Let every layer that computes down(silu(gate(x)) * up(x)), and nothing else, compute it this
    way: one is taken over only if its numbers are the same. Quantised layers, which may change when
    they are first evaluated, stay as they are."""
    for layer in model.modules():
        parts = [getattr(layer, f"{part}_proj", None) for part in ("gate", "up", "down")]
        if all(type(part) is nn.Linear for part in parts):
            gate: Any = parts[0]
            sample = torch.linspace(-2, 3, gate.in_features).to(gate.weight)[None]
            if torch.equal(_forward(layer, sample), layer(sample)):
                layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    down: Tensor = layer.down_proj(swiglu(layer.gate_proj(x), layer.up_proj(x)))
    return down
