"""SwiGLU that keeps its two factors' inputs for the backward pass, and no product of them: nor does
the projection that the product goes through."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
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
    they are first evaluated, stay as they are. Not for gradient checkpointing, which keeps less."""
    for layer in model.modules():
        parts = [getattr(layer, f"{part}_proj", None) for part in ("gate", "up", "down")]
        if all(type(part) is nn.Linear for part in parts):
            gate: Any = parts[0]
            sample = torch.linspace(-2, 3, gate.in_features).to(gate.weight)[None]
            if torch.equal(_forward(layer, sample), layer(sample)):
                layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    product = swiglu(gate, up)
    with _computed_again(product, gate.detach(), up.detach()):
        down: Tensor = layer.down_proj(product)
    return down


def _computed_again(product: Tensor, gate: Tensor, up: Tensor) -> AbstractContextManager[Any]:
    """Where ``product`` would be kept for the backward pass, keep its shape."""
    if not product.requires_grad:
        return nullcontext()
    address = product.data_ptr()

    def keep(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == address else saved

    def give(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else silu(gate).mul_(up).view(kept)

    return saved_tensors_hooks(keep, give)
