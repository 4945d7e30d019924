"""LoRA without its overhead: the adapter's product is added to the base layer's output in place.

peft adds an adapter's output by separate multiplications and additions of whole activations, in
float32 whatever the model's dtype. Here one operation accumulates the low-rank product where the
base layer wrote its output, in the model's dtype, and no other tensor of that size is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mrpo_lab.scoring.kernels.replacement import set_forward


class AddLowRank(torch.autograd.Function):
    """base + scale * x A^T B^T, written into ``base`` (Hu et al., arXiv 2106.09685, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Float[Tensor, "*n out"],
        x: Float[Tensor, "*n in"],
        a: Float[Tensor, "r in"],
        b: Float[Tensor, "out r"],
        scale: float,
    ) -> Float[Tensor, "*n out"]:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.to(x.dtype).T
        base.view(-1, base.shape[-1]).addmm_(low, b.to(x.dtype).T, alpha=scale)
        ctx.mark_dirty(base)
        ctx.save_for_backward(flat, low, a, b)
        ctx.scale = scale
        return base

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, a, b = ctx.saved_tensors
        above = grads[0].reshape(-1, grads[0].shape[-1])
        below = (above @ b.to(above.dtype)).mul_(ctx.scale)
        dx = (below @ a.to(above.dtype)).view(*grads[0].shape[:-1], -1)
        da, db = below.T @ flat, (above.T @ low).mul_(ctx.scale)
        return grads[0], dx if ctx.needs_input_grad[1] else None, da.to(a), db.to(b), None


add_low_rank: Callable[..., Tensor] = AddLowRank.apply


def fuse(model: nn.Module) -> None:
    """Replace every plain LoRA layer of a peft model by one that uses ``AddLowRank``.

    Layers with dropout, several adapters or a variant of LoRA keep peft's forward. Which layers are
    plain is decided by their structure: before training an adapter adds 0, so numbers tell nothing.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            set_forward(layer, _forward)


def _is_plain(layer: Any) -> bool:
    """Whether the layer adds one low-rank product to its base layer, and does nothing else."""
    if len(layer.lora_A) != 1 or layer.lora_variant or layer.lora_embedding_A:
        return False
    (name,) = layer.lora_A
    return (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and isinstance(layer.lora_A[name], nn.Linear)
        and layer.lora_B[name].bias is None
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return super(type(layer), layer).forward(x, *args, **kwargs)
    name = next(iter(layer.lora_A))
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    base = layer.base_layer(x)
    # Quantized layers return views, in which autograd allows no writing.
    return add_low_rank(base.clone() if base._is_view() else base, x, a, b, layer.scaling[name])
