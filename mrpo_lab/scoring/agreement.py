"""Whether two ways to compute the same replies agree, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Tolerance(NamedTuple):
    """How far two ways to compute the same replies may be apart.

    Rounding makes about 1e-6 nats per token in float32. In 16 bits it differs with the shape of
    every matrix product: in SmolLM2 by 0.02 in the mean and by 0.3 for single tokens, with both
    ways equally far from float32. A token that sees what it must not changes more.
    """

    scores: float
    """Mean difference in nats per token."""
    gradient: float
    """Norm of the difference of two gradients, as a share of the norm of one."""


TOLERANCE = Tolerance(scores=1e-3, gradient=1e-2)
TOLERANCE_16_BIT = Tolerance(scores=0.1, gradient=0.2)


def difference(
    one: Float[Tensor, " replies"],
    other: Float[Tensor, " replies"],
    counts: Int[Tensor, " replies"],
) -> float:
    """Mean absolute difference of two sets of scores of the same replies, in nats per token."""
    return float((one - other).abs().sum() / counts.sum())


def gradient_difference(
    one: Float[Tensor, " replies"],
    other: Float[Tensor, " replies"],
    parameters: Sequence[nn.Parameter],
) -> float:
    """Norm of the difference of the gradients of two sums of scores, as a share of the second's;
    0 if both are 0. The parameters' own gradients are left as they are."""
    gradients = [
        torch.autograd.grad(scores.sum(), parameters, allow_unused=True, materialize_grads=True)
        for scores in (one, other)
    ]
    pairs = list(zip(*gradients, strict=True))
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
    whole = sum(float(b.double().square().sum()) for _, b in pairs)
    return (apart / whole) ** 0.5 if whole else float(apart > 0)


def logits_agree(one: Tensor, other: Tensor, is_16_bit: bool) -> bool:
    """Whether two ways to compute logits agree, up to rounding. Numbers that are not finite pass:
    they are found where scores are."""
    near = 0.05 if is_16_bit else 0.01
    return not float((one - other).abs().mean()) > near * float(one.abs().mean())
