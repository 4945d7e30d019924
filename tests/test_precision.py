"""Losses, gradients and weights against arithmetic with 60 digits, at extreme magnitudes.

Every formula is written once more with mpmath. Bounds are in units of the dtype's rounding, of the
largest number that enters the formula, times its slope: a difference cannot be better than that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from mrpo_lab.objective import losses
from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.objective.weighting import (
    ARWC,
    RMC,
    SWCW,
    VAW,
    VDW,
    Context,
    Weighting,
    to_simplex,
)

mp.dps = 60

Number = Any  # mpmath has no types
MARGINS = (1e-8, 1e-3, 1.0, 30.0, 1e4)
BETAS = (1e-3, 0.1, 5.0, 1e3)
DTYPES = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
ROUNDINGS = 40
"""Bound of an error: this many roundings of the largest number in the formula."""


def softplus(z: Number) -> Number:
    return mpmath.log1p(mpmath.exp(-abs(z))) + max(z, mpf(0))


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
        largest = float(torch.cat([policy[None], refs]).abs().max())
        expected, slope = of(exact(policy)), slopes(of, exact(policy))
        steep = float(sum(map(abs, slope)))
        curved = 2 if link == "ipo" else beta**2
        bound = unit * (abs(expected) + steep * largest) + torch.finfo(dtype).tiny
        assert abs(float(loss) - expected) <= bound, seed
        for found, wanted in zip(gradient.tolist(), slope, strict=True):
            bound = unit * (steep + curved * largest) + torch.finfo(dtype).tiny
            assert abs(found - wanted) <= bound, seed


def clipped(refs: Any, epsilon: Number, adaptive: bool) -> Any:
    replies = range(len(refs[0]))
    means = [abs(mpmath.fsum(ref[i] for ref in refs) / len(refs)) for i in replies]
    radius = [epsilon * m / mpmath.fsum(means) if adaptive else epsilon for m in means]
    bounds = [sorted([(1 + r) * a, (1 - r) * a]) for a, r in zip(refs[0], radius, strict=True)]
    return [[min(max(ref[i], bounds[i][0]), bounds[i][1]) for i in replies] for ref in refs]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_clips(adaptive: bool, dtype: torch.dtype) -> None:
    for seed, (width, epsilon) in enumerate(itertools.product(MARGINS, (1e-3, 0.1, 0.9))):
        refs = -case(seed, width, 1 + seed % 8, 2 + seed % 5, dtype)[1].abs()
        found = losses.ctro(refs[None], epsilon=epsilon, adaptive=adaptive)[0]
        expected = clipped(exact(refs), mpf(epsilon), adaptive)
        for row, wanted_row in zip(found.tolist(), expected, strict=True):
            for value, wanted in zip(row, wanted_row, strict=True):
                assert abs(value - wanted) <= ROUNDINGS * DTYPES[dtype] * abs(wanted), seed


# name: (the weighting, what one pair adds to each reference's proportion)
WEIGHTINGS: dict[str, tuple[Weighting, Callable[[Number], Number]]] = {
    "vdw": (VDW(), abs),
    "vaw": (VAW(), lambda d: mpf(d > 0)),
    "rmc": (RMC(), lambda d: mpf(2 * (d > 0) - 1)),
    "swcw": (SWCW(), abs),
    "arwc": (ARWC(), abs),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("width", MARGINS)
def test_weights(name: str, width: float) -> None:
    """alpha of 1 to 8 references and replies of different lengths, in nats per token."""
    weighting, added = WEIGHTINGS[name]
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, 900, (9, 1 + seed, 2), generator=generator)
        noise = torch.randn(counts.shape, generator=generator, dtype=torch.float64)
        scores, target = Scores(counts * (-1 - width + width * noise), counts), chosen_first(9)
        rng, slugs = np.random.default_rng(seed), [str(k) for k in range(1 + seed)]
        weighting.start(Context(slugs, scores, target, lambda *_: [], rng))
        weighting.after_step(scores, target)
        alpha, _ = to_simplex(weighting.proportions(scores, target), 9)

        sums, tokens = exact(scores.sums), counts.tolist()
        margins = [
            [s[0] / n[0] - s[1] / n[1] for s, n in zip(*pair, strict=True)]
            for pair in zip(sums, tokens, strict=True)
        ]
        each = [[added(d) for d in row] for row in margins]
        if name != "arwc":  # one alpha for all pairs
            each = [[max(mpf(0), mpmath.fsum(c)) for c in zip(*each, strict=True)]] * 9
        largest = float(scores.logps().abs().max())
        for row, wanted in zip(alpha.tolist(), each, strict=True):
            total = mpmath.fsum(wanted)
            for value, share in zip(row, wanted, strict=True):
                expected = share / total if total else mpf(1) / len(wanted)
                rounding = 1 + (largest / total if name not in ("vaw", "rmc") else 0)
                assert abs(value - expected) <= ROUNDINGS * DTYPES[torch.float64] * rounding, seed
