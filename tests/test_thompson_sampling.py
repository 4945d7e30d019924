"""Thompson sampling on its own terms; test_weightings.py compares its steps with the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import Row
from scipy.stats import beta as beta_distribution

from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.objective.weighting import TSW, Context

SLUGS = ["anchor", "b", "c"]
BATCH = Scores(-torch.ones(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.int64))
CHOSEN = chosen_first(1)


def start(prior: float = 5.0, seed: int = 0) -> tuple[TSW, Row]:
    """A sampler of three arms, and what its probe will read, first to last."""
    weighting, readings = TSW(prior, probe_size=1), list[float]()

    def probe(*subsets: np.ndarray) -> Row:
        return [readings.pop(0) if readings else 0.5 for _ in subsets]

    rng = np.random.default_rng(seed)
    weighting.start(Context(SLUGS, BATCH, CHOSEN, probe, rng))
    return weighting, readings


def play(sampler: tuple[TSW, Row], after: Row) -> int:
    """A step from accuracy 0.5 to what `after` says of the drawn arm, which is returned."""
    weighting, readings = sampler
    arm = int(weighting.proportions(BATCH, CHOSEN).argmax())
    readings.append(after[arm])
    weighting.after_step(BATCH, CHOSEN)
    return arm


@pytest.mark.parametrize(("after", "rewarded"), [(0.51, True), (0.5, False), (0.49, False)])
def test_only_a_strict_rise_rewards_and_only_the_drawn_arm(after: float, rewarded: bool) -> None:
    sampler = start(prior=2.0)
    arm = play(sampler, [after] * 3)
    state, one_more = sampler[0].state_dict(), [2.0 + (k == arm) for k in range(3)]
    assert state["successes"] == (one_more if rewarded else [2.0] * 3)
    assert state["failures"] == ([2.0] * 3 if rewarded else one_more)


def test_metrics_are_of_the_last_step() -> None:
    sampler = start(prior=2.0)
    arm = play(sampler, [0.75] * 3)
    assert sampler[0].metrics() == {
        "bandit/arm": arm,
        "bandit/probe_before": 0.5,
        "bandit/probe_after": 0.75,
        **{f"bandit/mean/{s}": 0.6 if k == arm else 0.5 for k, s in enumerate(SLUGS)},
    }


def test_draws_a_probe_of_its_size_for_every_step() -> None:
    """Read before and after its own step; a pass after a step reads two probes at once."""
    weighting, log, rng = TSW(probe_size=3), list[list[tuple[int, ...]]](), np.random.default_rng(0)
    val = Scores(-torch.ones(9, 3, 2), torch.ones(9, 3, 2, dtype=torch.int64))

    def probe(*subsets: np.ndarray) -> Row:
        log.append([tuple(subset.tolist()) for subset in subsets])
        return [0.5] * len(subsets)

    weighting.start(Context(SLUGS, val, chosen_first(9), probe, rng))
    for _ in range(3):
        weighting.proportions(BATCH, CHOSEN)
        weighting.after_step(BATCH, CHOSEN)
    (first,), (again, second), (once_more, third), _ = log
    assert (again, once_more) == (first, second)
    assert len({first, second, third}) == 3
    for drawn in (first, second, third):
        assert len(set(drawn)) == 3
        assert set(drawn) <= set(range(9))


def test_draws_arms_as_often_as_their_beta_is_the_largest() -> None:
    """P(arm k) = integral of its density times the other arms' distribution functions; 4,000
    draws have a standard deviation of at most 0.008."""
    weighting, _ = start()
    successes, failures = [8.0, 5.0, 2.0], [6.0, 5.0, 1.0]
    weighting.load_state_dict(
        weighting.state_dict() | {"successes": successes, "failures": failures}
    )
    arms = [int(weighting.proportions(BATCH, CHOSEN).argmax()) for _ in range(4000)]
    grid = (np.arange(2000) + 0.5) / 2000
    betas = [beta_distribution(a, b) for a, b in zip(successes, failures, strict=True)]
    for k, arm in enumerate(betas):
        below = np.prod([other.cdf(grid) for other in betas if other is not arm], axis=0)
        expected = float((arm.pdf(grid) * below).mean())
        assert arms.count(k) / 4000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("best", [0, 1, 2])
@pytest.mark.parametrize("prior", [5.0, 10.0])
def test_finds_the_best_arm(best: int, prior: float) -> None:
    """Arms raise the accuracy in 80, 50 and 30 of 100 steps; chance would take each in 1/3."""
    chance, shares = np.roll([0.8, 0.5, 0.3], best), []
    for seed in range(3):
        sampler = start(prior, seed)
        luck = np.random.default_rng(seed).random((300, 3)) < chance
        arms = [play(sampler, after) for after in (0.5 + 0.1 * luck).tolist()]
        assert set(arms[:50]) == {0, 1, 2}
        shares.append(arms[-100:].count(best) / 100)
    assert np.mean(shares) > 0.8
