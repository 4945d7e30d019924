"""RMSNorm in half the passes over memory, and nothing kept for the backward pass but its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

SAME = 1e-6
"""Relative: the sum of squares rounds in float32. In 16 bits one rounding more is far beyond it."""


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times ``weight``."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*n H"], weight: Float[Tensor, " H"], eps: float
    ) -> Float[Tensor, "*n H"]:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = (wide * inverse).to(x.dtype)
        return normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide = x.float()
        above = (grads[0] * weight).float()
        along = torch.linalg.vecdot(above, wide).unsqueeze(-1)
        along.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return above.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


rms_norm: Callable[..., Tensor] = RMSNorm.apply


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Let every frozen layer that computes this, by whatever name, compute it this way.

    Model families have classes of their own for it, some with weights around 0 instead of 1: the
    effective weight is read off, and a layer is taken over only if its numbers are the same.
    """
    for layer in model.modules():
        eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
        weight = getattr(layer, "weight", None)
        if (
            isinstance(eps, float)
            and isinstance(weight, nn.Parameter)
            and not weight.requires_grad
            and type(layer).__name__.endswith("RMSNorm")
        ):
            sample = torch.linspace(-2, 3, len(weight), device=weight.device).to(weight.dtype)
            flat = torch.full_like(sample, 1024.0)  # beside it eps is nothing: normalised to 1
            effective = layer(flat)
            if torch.allclose(rms_norm(sample, effective, eps), layer(sample), SAME, 0):
                layer.forward = partial(_forward, effective, eps)


def _forward(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    return rms_norm(x, weight, eps)
