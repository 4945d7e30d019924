"""Losses, gradients and weights against arithmetic with 60 digits, at extreme magnitudes.

Every formula is written once more with mpmath. Bounds are in units of the dtype's rounding, of the
largest number that enters the formula: a difference of two numbers cannot be better than that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from mrpo_lab.objective import losses
from mrpo_lab.objective.scores import chosen_first

mp.dps = 60

Number = Any  # mpmath has no types
MARGINS = (1e-8, 1e-3, 1.0, 30.0, 1e4)
BETAS = (1e-3, 0.1, 5.0, 1e3)
DTYPES = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
ROUNDINGS = 40
"""Bound of an error: this many roundings of the largest number in the formula."""


def softplus(z: Number) -> Number:
    return mpmath.log(1 + mpmath.exp(-abs(z))) + max(z, mpf(0))


def cross_entropy(rewards: Sequence[Number], target: Sequence[Number]) -> Number:
    top = max(rewards)
    norm = top + mpmath.log(mpmath.fsum(mpmath.exp(r - top) for r in rewards))
    return -mpmath.fsum(p * (r - norm) for p, r in zip(target, rewards, strict=True) if p)


def margin(rewards: Sequence[Number], target: Sequence[Number]) -> Number:
    return (rewards[0] - rewards[1]) * mpmath.sign(target[0] - target[1])


# name: (the link, the same of rewards, target and beta)
LINKS: dict[str, tuple[Any, Callable[..., Number]]] = {
    "logistic": (losses.logistic, lambda r, p, beta: softplus(-margin(r, p))),
    "smooth": (
        partial(losses.logistic, label_smoothing=0.25),
        lambda r, p, beta: (3 * softplus(-margin(r, p)) + softplus(margin(r, p))) / 4,
    ),
    "robust": (
        partial(losses.robust, label_flip=0.25),
        lambda r, p, beta: (3 * softplus(-margin(r, p)) - softplus(margin(r, p))) / 2,
    ),
    "ipo": (losses.ipo, lambda r, p, beta: (margin(r, p) / beta - 1 / (2 * beta)) ** 2),
    "hinge": (losses.hinge, lambda r, p, beta: max(mpf(0), 1 - margin(r, p))),
    "listwise": (losses.listwise, lambda r, p, beta: cross_entropy(r, p)),
}


def against(policy: Sequence[Number], ref: Sequence[Number], beta: Number) -> list[Number]:
    return [beta * (p - r) for p, r in zip(policy, ref, strict=True)]


def dpo(policy: Any, refs: Any, alpha: Any, beta: Number, link: Any) -> Number:
    return link(against(policy, refs[max(range(len(alpha)), key=alpha.__getitem__)], beta))


def mdpo(policy: Any, refs: Any, alpha: Any, beta: Number, link: Any) -> Number:
    return mpmath.fsum(
        a * link(against(policy, ref, beta)) for a, ref in zip(alpha, refs, strict=True) if a
    )


def mrpo(policy: Any, refs: Any, alpha: Any, beta: Number, link: Any) -> Number:
    def harmonic(column: Sequence[Number]) -> Number:
        kept = [(a, x) for a, x in zip(alpha, column, strict=True) if a]
        low = min(x for _, x in kept)
        return low - mpmath.log(mpmath.fsum(a * mpmath.exp(low - x) for a, x in kept))

    return link(against(policy, [harmonic(c) for c in zip(*refs, strict=True)], beta))


def geometric(policy: Any, refs: Any, alpha: Any, beta: Number, link: Any) -> Number:
    mixed = [
        mpmath.fsum(a * x for a, x in zip(alpha, column, strict=True))
        for column in zip(*refs, strict=True)
    ]
    return link(against(policy, mixed, beta))


COMBINATIONS: dict[str, tuple[Any, Callable[..., Number]]] = {
    "dpo": (losses.dpo, dpo),
    "mdpo": (losses.mdpo, mdpo),
    "mrpo": (losses.mrpo, mrpo),
    "geometric": (losses.geometric, geometric),
}


def exact(tensor: Tensor) -> list[Any]:
    """Nested lists of the numbers that a tensor holds, without rounding."""
    if tensor.ndim == 0:
        return mpf(float(tensor))  # type: ignore[no-any-return]
    return [exact(part) for part in tensor]


def case(
    seed: int, width: float, refs: int, replies: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Log-probabilities (R,) and (K, R) that differ by about ``width``, weights and a target."""
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    logps = (-width - 1 + width * random(refs + 1, replies)).to(dtype)
    alpha = random(refs).mul(2).softmax(-1).to(dtype)
    if refs > 2:
        alpha[1] = 0
    target = random(replies).softmax(-1).to(dtype)
    return logps[0], logps[1:], alpha, target


def slopes(of: Callable[[list[Number]], Number], at: list[Number]) -> list[Number]:
    """The gradient by central differences, exact to 20 digits."""
    found = []
    for i in range(len(at)):
        h = mpf(10) ** -22 * max(abs(at[i]), 1)
        up, down = ([x + s * h * (i == j) for j, x in enumerate(at)] for s in (1, -1))
        found.append((of(up) - of(down)) / (2 * h))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("link", LINKS)
def test_losses_and_gradients(link: str, combination: str, dtype: torch.dtype) -> None:
    unit = ROUNDINGS * DTYPES[dtype]
    combine, combined = COMBINATIONS[combination]
    function, formula = LINKS[link]
    for seed, (width, beta) in enumerate(itertools.product(MARGINS, BETAS)):
        replies = 2 + seed % 5 if link == "listwise" else 2
        policy, refs, alpha, soft = case(seed, width, 1 + seed % 8, replies, dtype)
        target = soft if link == "listwise" else chosen_first(1)[0].to(dtype)
        b, p = mpf(beta), exact(target)

        def linked(rewards: Tensor, *, beta: float, p: Tensor = target) -> Tensor:
            return torch.as_tensor(function(rewards, p.expand_as(rewards), beta=beta))

        logps = policy.clone().requires_grad_()
        loss, _ = combine(logps[None], refs[None], alpha[None], beta=beta, link=linked)
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        of = partial(
            combined,
            refs=exact(refs),
            alpha=exact(alpha),
            beta=b,
            link=lambda r, p=p, b=b: formula(r, p, b),
        )
        # The rewards carry the rounding of the log-probabilities, which the link's slope passes on.
        largest = float(torch.cat([policy, *refs]).abs().max())
        expected, slope = of(exact(policy)), slopes(of, exact(policy))
        steep = float(sum(map(abs, slope)))
        curved = beta * (2 / beta if link == "ipo" else beta)
        error = abs(float(loss) - float(expected))
        assert error <= unit * (abs(float(expected)) + steep * largest + beta * 0 + 1e-30), (
            width,
            beta,
            float(loss),
            float(expected),
        )
        for found, wanted in zip(gradient.tolist(), slope, strict=True):
            bound = unit * (abs(float(wanted)) + curved * largest + steep)
            assert abs(found - float(wanted)) <= bound, (width, beta, found, float(wanted))
