"""Weightings: against the naive reference implementation, resumed anywhere, refused where wrong.

A new weighting is one row in the table below: the oracle's, resuming and configuration tests run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError
from omegaconf import OmegaConf
from oracles import Matrix, Row
from torch import Tensor

from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.objective.units import in_unit
from mrpo_lab.objective.weighting import (
    ARWC,
    RMC,
    SWCW,
    TSW,
    VAW,
    VDW,
    VSW,
    Context,
    Fixed,
    Grid,
    Single,
    SWCWOneHot,
    Uniform,
    Weighting,
    to_simplex,
)
from mrpo_lab.training.state_file import load_state, save_state

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
tensor = partial(torch.tensor, dtype=torch.float64)


@dataclass(frozen=True)
class Step:
    alpha: Tensor
    undecided: int
    state: dict[str, Any]
    """After the step."""


@dataclass(frozen=True)
class World:
    """All that a weighting meets in a run: validation, one batch a step, and the policy's accuracy
    on the probe before and after each step, as a script."""

    val: Scores
    batches: list[Scores]
    accuracies: Row
    seed: int = 0

    @property
    def slugs(self) -> list[str]:
        return ["anchor", "b", "c", "d"][: self.val.sums.shape[1]]

    def run(
        self, weighting: Weighting, state: dict[str, Any] | None = None, first: int = 0
    ) -> list[Step]:
        """What the trainer does with a weighting, from step `first` on."""
        # A state that is restored knows already what the probe of its next step read before it.
        script = iter([*self.accuracies[2 * first + bool(state) :], 0.5])

        def probe(*subsets: np.ndarray) -> Row:
            return [next(script) for _ in subsets]

        weighting.check(self.slugs, len(self.val))
        # Another generator after a restart: only the state can bring the first one back.
        rng = np.random.default_rng(self.seed + first)
        val = in_unit(self.val, weighting.unit, None)
        weighting.start(Context(self.slugs, val, chosen_first(len(val)), probe, rng))
        if state is not None:
            weighting.load_state_dict(state)
        steps = []
        for given_batch in self.batches[first:]:
            batch = in_unit(given_batch, weighting.unit, None)
            target = chosen_first(len(batch))
            alpha, undecided = to_simplex(weighting.proportions(batch, target), len(batch))
            weighting.after_step(batch, target)
            steps.append(Step(alpha, undecided, weighting.state_dict()))
        return steps


def margins(scores: Scores, length_normalized: bool = True) -> Matrix:
    """d_ik (N, K) by hand."""
    sums, counts = np.array(scores.sums.tolist()), np.array(scores.counts.tolist())
    logps = sums / counts if length_normalized else sums
    return [[chosen - rejected for chosen, rejected in pair] for pair in logps.tolist()]


def scores_of(rows: Matrix) -> Scores:
    """Scores of one token a reply, whose margins are `rows` (N, K)."""
    sums = torch.stack([tensor(rows) - 9, torch.full_like(tensor(rows), -9)], dim=-1)
    return Scores(sums, torch.ones_like(sums, dtype=torch.int64))


def world_of(seed: int) -> World:
    """Quarters of a nat over 1, 2 or 4 tokens: sums are exact, and ties and 0/0 are frequent."""
    rng = np.random.default_rng(seed)
    num_refs, num_val, *sizes = rng.integers(1, [5, 7, 4, 4, 4, 4])

    def scores(rows: int) -> Scores:
        shape = (rows, num_refs, 2)
        sums, counts = rng.integers(-16, 1, shape) / 4, 2 ** rng.integers(0, 3, shape)
        return Scores(torch.from_numpy(sums), torch.from_numpy(counts))

    accuracies = rng.choice([0.25, 0.5, 0.75], 8).tolist()
    return World(scores(num_val), list(map(scores, sizes)), accuracies, seed)


worlds = st.integers(0, 2**32 - 1).map(world_of)


@dataclass(frozen=True)
class Entry:
    """How a row of the table builds its weighting for a world, and the alpha of each step (B, K)
    that the oracle expects there."""

    build: Callable[[World], Weighting]
    expected: Callable[[World], list[Matrix]]


def offline(build: Callable[[World], Weighting], alpha: Callable[[World], Row]) -> Entry:
    """One alpha for every pair of every step."""
    return Entry(build, lambda world: [[alpha(world)] * len(batch) for batch in world.batches])


def on_val(build: Callable[[], Weighting], rule: Callable[[Matrix], Row]) -> Entry:
    return offline(lambda _: build(), lambda world: rule(margins(world.val)))


def past(build: Callable[[], Weighting], rule: Callable[..., Row]) -> Entry:
    """One alpha for the pairs of a step, by the margins of the batches before it."""

    def expected(world: World) -> list[Matrix]:
        history = list(map(margins, world.batches))
        return [
            [rule(history[:step], K=len(world.slugs))] * len(batch)
            for step, batch in enumerate(world.batches)
        ]

    return Entry(lambda _: build(), expected)


def per_pair(length_normalized: bool) -> Entry:
    return Entry(
        lambda _: ARWC(length_normalized),
        lambda world: [
            [oracles.arwc(row) for row in margins(batch, length_normalized)]
            for batch in world.batches
        ],
    )


def thompson(prior: float) -> Entry:
    """The same generator draws each arm's theta, then the probe, at every step."""

    def expected(world: World) -> list[Matrix]:
        rng, alphas = np.random.default_rng(world.seed), []
        a, b = oracles.tsw_prior(len(world.slugs), prior)
        for step, batch in enumerate(world.batches):
            alpha = oracles.tsw_alpha([rng.beta(*arm) for arm in zip(a, b, strict=True)])
            for _ in range(2 if step == 0 else 1):  # its own probe, and the following step's
                rng.choice(len(world.val), 1, replace=False)
            before, after = world.accuracies[2 * step : 2 * step + 2]
            a, b = oracles.tsw_update(a, b, alpha.index(1.0), before, after)
            alphas.append([alpha] * len(batch))
        return alphas

    return Entry(lambda _: TSW(prior=prior, probe_size=1), expected)


GIVEN = [2.0, 0.0, 1.0, 5.0]
WEIGHTINGS = {
    "uniform": offline(lambda _: Uniform(), lambda world: oracles.uniform(len(world.slugs))),
    "single": offline(lambda _: Single(), lambda world: oracles.single(0, len(world.slugs))),
    "single_last": offline(
        lambda world: Single(world.slugs[-1]),
        lambda world: oracles.single(len(world.slugs) - 1, len(world.slugs)),
    ),
    "fixed": offline(
        lambda world: Fixed(GIVEN[: len(world.slugs)]),
        lambda world: oracles.fixed(GIVEN[: len(world.slugs)]),
    ),
    "vdw": on_val(VDW, oracles.vdw),
    "vaw": on_val(VAW, oracles.vaw),
    "rmc": on_val(RMC, oracles.rmc),
    "vsw": on_val(VSW, oracles.vsw),
    "grid_1": on_val(partial(Grid, 1), partial(oracles.grid, m=1)),
    "grid_4": on_val(partial(Grid, 4), partial(oracles.grid, m=4)),
    "arwc": per_pair(length_normalized=True),
    "arwc_summed": per_pair(length_normalized=False),
    "swcw_1": past(SWCW, oracles.swcw),
    "swcw_3": past(partial(SWCW, 3), partial(oracles.swcw, window=3)),
    "swcw_oh": past(SWCWOneHot, partial(oracles.swcw_oh, anchor=0)),
    "swcw_oh_3": past(partial(SWCWOneHot, 3), partial(oracles.swcw_oh, anchor=0, window=3)),
    "tsw_5": thompson(5.0),
    "tsw_half": thompson(0.5),
}
weightings = pytest.mark.parametrize("name", WEIGHTINGS)


@weightings
class TestEveryWeighting:
    @settings(max_examples=60, deadline=None)
    @given(world=worlds)
    def test_agrees_with_the_oracle_at_every_step(self, name: str, world: World) -> None:
        found = [step.alpha for step in world.run(WEIGHTINGS[name].build(world))]
        close(found, [tensor(alpha) for alpha in WEIGHTINGS[name].expected(world)])

    @settings(max_examples=8, deadline=None)
    @given(world=worlds)
    def test_continues_identically_from_any_state(
        self, name: str, world: World, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """A fresh one from a file; the same one back from a state that it may have spoilt since."""
        file = tmp_path_factory.getbasetemp() / f"{name}.safetensors"
        weighting = WEIGHTINGS[name].build(world)
        whole = world.run(weighting)
        for first, step in enumerate(whole, start=1):
            save_state(file, step.state)
            fresh = WEIGHTINGS[name].build(world)
            for other, state in ((fresh, load_state(file)), (weighting, step.state)):
                resumed = world.run(other, state, first)
                assert len(resumed) == len(whole) - first
                for ours, theirs in zip(resumed, whole[first:], strict=True):
                    assert torch.equal(ours.alpha, theirs.alpha)
                    assert ours.undecided == theirs.undecided


def alpha_of(weighting: Weighting, val: Matrix, *batches: Matrix) -> list[Step]:
    """The steps on batches of these margins."""
    return World(scores_of(val), list(map(scores_of, batches or [val])), []).run(weighting)


SAME = [[0.0, 0.0], [0.0, 0.0]]
"""Margins of two pairs whose replies are the same text: no reference separates them."""


class TestTies:
    """0/0 is uniform and counted; which of equals is taken."""

    @pytest.mark.parametrize("weighting", [VDW(), VAW(), RMC(), VSW(), ARWC(), ARWC(False)])
    def test_without_any_margin(self, weighting: Weighting) -> None:
        (step,) = alpha_of(weighting, SAME)
        assert step.alpha.tolist() == [[0.5, 0.5]] * 2
        assert step.undecided == 2

    def test_arwc_counts_only_the_pairs_without_margins(self) -> None:
        (step,) = alpha_of(ARWC(), SAME, [[0.0, 0.0], [1.0, -3.0]])
        assert step.alpha.tolist() == [[0.5, 0.5], [0.25, 0.75]]
        assert step.undecided == 1

    def test_swcw_counts_a_window_without_margins_but_not_its_first_step(self) -> None:
        steps = alpha_of(SWCW(), SAME, [[1.0, 3.0]], SAME, [[1.0, 3.0]])
        assert [step.alpha[0].tolist() for step in steps] == [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]
        assert [step.undecided for step in steps] == [0, 0, 1]

    def test_swcw_one_hot_takes_the_first_of_equals(self) -> None:
        steps = alpha_of(SWCWOneHot(), SAME, [[1.0, 2.0, -2.0]], [[-1.0, 1.0, 1.0]], [[0.0] * 3])
        assert [step.alpha[0].argmax() for step in steps] == [0, 1, 0]

    def test_a_tie_is_ranked_wrong(self) -> None:
        """Reference 0 is right twice and ties once, reference 1 is right once."""
        val = [[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]
        assert alpha_of(VAW(), val)[0].alpha[0].tolist() == pytest.approx([2 / 3, 1 / 3])
        assert alpha_of(RMC(), val)[0].alpha[0].tolist() == [1.0, 0.0]
        assert scores_of(val).accuracy(chosen_first(3)).tolist() == pytest.approx([2 / 3, 1 / 3])

    @pytest.mark.parametrize("seed", range(8))
    def test_grid_on_equal_references_is_lexicographic(self, seed: int) -> None:
        """Every point is the same mixture, but for the rounding of sums."""
        val = [[d] * 3 for d in np.random.default_rng(seed).normal(size=8).tolist()]
        assert alpha_of(Grid(6), val)[0].alpha[0].tolist() == [0.0, 0.0, 1.0]

    def test_grid_ranks_an_exact_tie_wrong(self) -> None:
        """(1/6, 5/6) ties on both pairs, though 5 fl(1/6) - fl(5/6) is not 0. Each other point has
        one pair right; those of lowest loss are (0, 1), which comes first, and (2/6, 4/6)."""
        val = [[5.0, -1.0], [-5.0, 1.0]]
        assert alpha_of(Grid(6), val)[0].alpha[0].tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("k", range(4))
    def test_grid_looks_at_every_point(self, k: int) -> None:
        """Only reference k is ever right; 969 points are more than are looked at at once."""
        val = [[1.0 if j == k else -20.0 for j in range(4)]]
        assert alpha_of(Grid(16), val)[0].alpha[0].tolist() == oracles.single(k, 4)

    def test_grid_takes_the_lower_loss_of_equal_accuracies(self) -> None:
        """All points rank the pair right; the first reference does so by the larger margin."""
        assert alpha_of(Grid(2), [[2.0, 1.0]])[0].alpha[0].tolist() == [1.0, 0.0]


class TestToSimplex:
    @settings(max_examples=60, deadline=None)
    @given(
        arrays(np.float64, (3, 4), elements=st.one_of(st.just(0.0), st.floats(0, 1e300))),
        st.booleans(),
    )
    def test_divides_by_the_sum_and_counts_rows_of_zeros(
        self, rows: np.ndarray, shared: bool
    ) -> None:
        """A 0 stays exactly 0; one row may be shared by all pairs, and counts for each of them."""
        proportions = torch.from_numpy(rows[:1] if shared else rows)
        alpha, undecided = to_simplex(proportions, 3)
        expected = [oracles.arwc(row) for row in proportions.expand(3, 4).tolist()]
        close(alpha, tensor(expected))
        decided = (proportions.sum(-1, keepdim=True) > 0).expand(3, 1)
        assert ((alpha == 0) == (tensor(expected) == 0)).all()
        assert undecided == 3 - int(decided.sum())

    @pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, 1.7e308])
    def test_refuses_what_is_no_weight(self, wrong: float) -> None:
        """1.7e308 is finite, but a sum with it is not."""
        with pytest.raises(ValueError, match="weights must be finite and not negative, got"):
            to_simplex(tensor([[1.0, 1.0], [wrong, 1.7e308]]), 2)

    def test_refuses_a_vector_by_name(self) -> None:
        with pytest.raises(TypeCheckError, match="typechecking parameter 'proportions'"):
            to_simplex(torch.ones(3), 3)


SLUGS = ["anchor", "b", "c", "d", "e", "f", "g"]


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: Fixed([-1.0, 2.0]), r"weights must be finite and not negative, got \[-1"),
        (lambda: Fixed([math.inf, 2.0]), r"weights must be finite and not negative, got \[inf"),
        (lambda: Fixed([0.0, 0.0]), r"weights must not all be 0, got \[0"),
        (lambda: Fixed([1.0, 2.0]).check(SLUGS, 9), "weights has 2 numbers for the 7 references"),
        (lambda: Single("nobody").check(SLUGS, 9), "slug: no reference is called 'nobody'.*anchor"),
        (lambda: SWCW(window=0), "window must be 1 or more, got 0"),
        (lambda: SWCWOneHot(window=-1), "window must be 1 or more, got -1"),
        (lambda: TSW(prior=0.0), "prior must be greater than 0, got 0"),
        (lambda: TSW(probe_size=0), "probe_size must be 1 or more, got 0"),
        (lambda: TSW(probe_size=10).check(SLUGS, 9), "probe_size is 10, but there are 9"),
        (lambda: VSW(relative_ridge=0.0), "relative_ridge must be greater than 0 .* got 0"),
        (lambda: VDW(unit="word"), "unit must be one of token, .*, got 'word'"),
        (lambda: Grid(resolution=0), "resolution must be 1 or more, got 0"),
        (lambda: Grid(20).check(SLUGS, 9), "20 with 7 references is 230,230 grid points.*200,000"),
    ],
)
def test_wrong_values_are_refused(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()


def test_values_at_their_limits_are_accepted() -> None:
    TSW(prior=1e-3, probe_size=9).check(SLUGS, 9)
    Grid(19).check(SLUGS, 9)  # 177,100 points
    Fixed([0.0] * 6 + [1e-9]).check(SLUGS, 9)


def test_vsw_with_another_ridge_is_at_its_optimum() -> None:
    """The objective's slope is 0 where w > 0, and not below 0 where w = 0; the oracle's is with
    ridge 1e-4, whose part is replaced. Of margins whose mean square is 1, the ridge is relative
    to 1."""
    val, ridge = [[1.0, 0.5, -1.0], [3.0, -0.25, 0.0], [-0.5, 1.0, 0.25]], 0.1
    rms = math.sqrt(sum(d * d for row in val for d in row) / 9)
    val = [[d / rms for d in row] for row in val]
    weighting = VSW(ridge)
    alpha_of(weighting, val)
    w = weighting.proportions(scores_of(val), chosen_first(len(val)))[0].tolist()
    slopes = [
        g + 2 * (ridge - 1e-4) * x for g, x in zip(oracles.vsw_gradient(w, val), w, strict=True)
    ]
    assert w[0] > 0 < w[1]
    assert slopes[:2] == pytest.approx([0.0, 0.0], abs=1e-8)
    assert w[2] == 0 < slopes[2]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_vsw_does_not_depend_on_the_scale_of_margins(scale: float) -> None:
    rng = np.random.default_rng(3)
    val = rng.normal([0.3, 0.1, -0.2], 1.0, (40, 3))
    expected = alpha_of(VSW(0.01), val.tolist())[0].alpha[0]
    close(alpha_of(VSW(0.01), (scale * val).tolist())[0].alpha[0], expected)


def test_every_shipped_weighting_has_a_row() -> None:
    files = (Path(__file__).parents[1] / "conf" / "weighting").glob("*.yaml")
    shipped: list[Any] = [OmegaConf.load(file) for file in sorted(files)]
    world = World(scores_of([[0.0]]), [], [])
    rows = {type(entry.build(world)).__name__ for entry in WEIGHTINGS.values()}
    assert {node["_target_"] for node in shipped} == {f"mrpo_lab.{row}" for row in rows}
