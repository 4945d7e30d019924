"""Samplers of lambda: their distributions, their states, and what they refuse."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from mrpo_lab.objective.aspect_weighting import (
    DirichletLambda,
    FixedLambda,
    LambdaContext,
    LambdaSampler,
    LearnedLambda,
    TableLambda,
    row_effects,
)

ASPECTS = ["a", "b", "c"]
ROWS = [{"a": 1.0}, {"a": 1.0, "c": 3.0}, {"b": 2.0, "c": 2.0}]
IN_ORDER: list[list[float]] = [[1, 0, 0], [0.25, 0, 0.75], [0, 0.5, 0.5]]


def started(
    sampler: LambdaSampler,
    seed: int = 0,
    loss: Callable[[np.ndarray], float] = lambda subset: 0.0,
) -> LambdaSampler:
    sampler.check(ASPECTS, 50)
    sampler.start(LambdaContext(ASPECTS, np.random.default_rng(seed), loss, 50))
    return sampler


def drawn(sampler: LambdaSampler, number: int) -> np.ndarray:
    return torch.stack([sampler.draw() for _ in range(number)]).numpy()


class TestDistributions:
    def test_fixed(self) -> None:
        assert drawn(started(FixedLambda()), 2).tolist() == [[1 / 3] * 3] * 2
        assert drawn(started(FixedLambda({"c": 3, "a": 1})), 1).tolist() == [[0.25, 0, 0.75]]

    @pytest.mark.parametrize("c", [0.5, {"a": 4.0, "b": 1.0, "c": 0.5}])
    def test_dirichlet(self, c: Any) -> None:
        sampler = started(DirichletLambda(c))
        found = drawn(sampler, 4000)
        alpha = [c[aspect] for aspect in ASPECTS] if isinstance(c, dict) else [c] * 3
        assert found.sum(1) == pytest.approx(1)
        for aspect in range(3):  # each component is a beta variable
            beta = scipy.stats.beta(alpha[aspect], sum(alpha) - alpha[aspect])
            assert scipy.stats.kstest(found[:, aspect], beta.cdf).pvalue > 1e-3
        assert found.mean(0) == pytest.approx(sampler.mean_lambda(ASPECTS).numpy(), abs=0.02)

    def test_table(self) -> None:
        sampler = started(TableLambda(ROWS, [1, 0, 3]))
        found = Counter(map(tuple, drawn(sampler, 4000).tolist()))
        assert set(found) == {(1, 0, 0), (0, 0.5, 0.5)}
        assert scipy.stats.binomtest(found[1, 0, 0], 4000, 0.25).pvalue > 1e-3
        assert sampler.mean_lambda(ASPECTS).tolist() == [0.25, 0.375, 0.375]
        equal = started(TableLambda(ROWS))
        found_rows = np.unique(drawn(equal, 100), axis=0)
        assert np.array_equal(found_rows, np.unique(IN_ORDER, axis=0))

    def test_where_a_policy_is_tried(self) -> None:
        points = FixedLambda(condition=True, grid=2).points(ASPECTS)
        corners_and_edges = [[0, 0, 1], [0, 0.5, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
        assert points.tolist() == [*corners_and_edges, [0.5, 0.5, 0], [1, 0, 0]]
        assert FixedLambda({"b": 1}).points(ASPECTS).tolist() == [[0, 1, 0]]


class World:
    """A validation loss that falls by a different amount for each row, with noise, and by a trend
    that all rows share: most in the first steps."""

    def __init__(
        self, drops: Sequence[float], noise: float, trend: float = 0.0, seed: int = 1
    ) -> None:
        self.drops, self.noise, self.trend, self.steps = drops, noise, trend, 0
        self.rng = np.random.default_rng(seed)
        self.loss, self.probes = 1.0, list[list[int]]()

    def probe(self, subset: np.ndarray) -> float:
        self.probes.append(subset.tolist())
        return self.loss

    def step(self, row: int) -> None:
        self.loss -= self.drops[row] + self.noise * self.rng.normal()
        self.loss -= self.trend / (1 + self.steps / 10)
        self.steps += 1


def pulls(sampler: LearnedLambda, world: World, steps: int) -> list[int]:
    table = sampler.mean_lambda(ASPECTS), torch.tensor(IN_ORDER).double()
    chosen = []
    for _ in range(steps):
        weights = sampler.draw()
        chosen.append(int((table[1] - weights).abs().sum(-1).argmin()))
        world.step(chosen[-1])
        sampler.after_step()
    return chosen


class TestLearned:
    def test_finds_the_row_under_which_the_loss_falls_most(self) -> None:
        world = World([0.01, 0.03, 0.02], noise=0.02)
        sampler = LearnedLambda(ROWS, probe_size=7)
        started(sampler, loss=world.probe)
        chosen = pulls(sampler, world, 400)
        assert sorted(chosen[:3]) == [0, 1, 2]  # each once, then by what they gave
        assert Counter(chosen[200:])[1] > 150
        for before, after in zip(world.probes[::2], world.probes[1::2], strict=True):
            assert before == after  # the reward is of one probe, drawn without replacement
            assert len(set(before)) == 7
            assert max(before) < 50

    def test_does_not_settle_on_equals(self) -> None:
        world = World([0.02, 0.02, 0.02], noise=0.02)
        sampler = LearnedLambda(ROWS, probe_size=1)
        started(sampler, loss=world.probe)
        assert min(Counter(pulls(sampler, world, 600)).values()) > 30

    def test_finds_the_best_row_below_a_trend(self) -> None:
        """Early rewards are large whatever the row. Compared as they are, the best row was used in
        0.64 of the steps."""
        shares = []
        for seed in range(12):
            world = World([0.0, 0.02, 0.0], noise=0.02, trend=0.2, seed=seed)
            sampler = LearnedLambda(ROWS, probe_size=1)
            started(sampler, seed=seed, loss=world.probe)
            shares.append(pulls(sampler, world, 200).count(1) / 200)
        assert np.mean(shares) > 0.8

    def test_effects_and_trend_are_told_apart(self) -> None:
        """Without noise, the fit is exact; the covariance is that of least squares."""
        steps = np.log1p(np.arange(40))
        rows = [0] * 5 + [1] * 5 + [2, 0, 1] * 10
        trend = 0.3 - 0.1 * steps + 0.01 * steps**2
        rewards = np.array([0.5, 0.2, 0.1])[rows] + trend
        mean, covariance = row_effects(rows, rewards.tolist(), 3)
        assert mean - mean[0] == pytest.approx([0, -0.3, -0.4], abs=1e-5)
        assert np.abs(covariance).max() < 1e-9

    def test_a_state_of_version_0_1_is_refused(self) -> None:
        sampler = LearnedLambda(ROWS, probe_size=1)
        started(sampler)
        with pytest.raises(ValueError, match="not corrected for the trend"):
            sampler.load_state_dict({"rng": {}, "pulls": [], "sums": [], "squares": 0.0})

    def test_default_table(self) -> None:
        sampler = LearnedLambda(probe_size=1)
        found = drawn(started(sampler), 1)
        assert found[0].tolist() in [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 3] * 3]


SAMPLERS: dict[str, Callable[[], LambdaSampler]] = {
    "fixed": FixedLambda,
    "dirichlet": DirichletLambda,
    "table": partial(TableLambda, ROWS),
    "learned": partial(LearnedLambda, ROWS, probe_size=5),
}


@pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_state_brings_back_what_follows(build: Callable[[], LambdaSampler]) -> None:
    def steps(sampler: LambdaSampler, world: World, number: int) -> list[list[float]]:
        found = []
        for _ in range(number):
            found.append(sampler.draw().tolist())
            world.step(0)
            sampler.after_step()
        return found

    one, world = build(), World([0.01], noise=0.1)
    started(one, loss=world.probe)
    steps(one, world, 7)
    state, loss, noise = one.state_dict(), world.loss, world.rng.bit_generator.state
    expected = steps(one, world, 5)
    other = build()
    started(other, seed=99, loss=world.probe)
    other.load_state_dict(state)
    world.loss, world.rng.bit_generator.state = loss, noise
    assert steps(other, world, 5) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedLambda({"d": 1}), "no aspect is called 'd'; choose from a, b, c"),
        (lambda: FixedLambda({"a": -1}), "must be finite, not negative and not all 0"),
        (lambda: FixedLambda({"a": 0}), "not all 0"),
        (lambda: FixedLambda(grid=0), "grid must be 1 or more, got 0"),
        (lambda: FixedLambda(condition=True, grid=99), "more than 1,000 points for 3 aspects"),
        (lambda: DirichletLambda(0), "concentration must be greater than 0, got 0"),
        (lambda: DirichletLambda({"a": 1, "b": 1}), "concentration: give one for c too"),
        (lambda: TableLambda([]), "rows: give at least one"),
        (lambda: TableLambda(ROWS, [1, 2]), "probabilities must be 3 numbers"),
        (lambda: TableLambda([{"x": 1}]), "no aspect is called 'x'"),
        (lambda: LearnedLambda(probe_size=51), "probe_size is 51, but there are 50"),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], LambdaSampler], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().check(ASPECTS, 50)


def test_one_aspect_is_no_trade_off() -> None:
    with pytest.raises(ValueError, match="preference is the only aspect"):
        DirichletLambda().check(["preference"], 50)
