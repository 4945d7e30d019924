"""The report's statistics against scipy, against going through all cases, and by simulation."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from harness import ROOT
from scipy import stats

from mrpo_lab.report.simulation import Setting, errors, main, simulate
from mrpo_lab.report.statistics import (
    chi_square,
    clustered_bootstrap,
    crossed_t,
    holm,
    kendall_null,
    mean_tau_test,
    pearson,
    resampled_t,
    sign_flip_p,
    smallest_detectable,
    standard_error,
)

Seeds = list[tuple[Sequence[float], Sequence[float]]]
SIMULATIONS = 400


def tau(x: Sequence[float], y: Sequence[float]) -> float:
    return float(stats.kendalltau(x, y).statistic)


def by_going_through(seeds: Seeds) -> tuple[float, float]:
    """(one-sided, two-sided) p over all matchings of all seeds."""
    total: np.ndarray = np.zeros(1)
    for x, y in seeds:
        taus = [tau(x, order) for order in itertools.permutations(y)]
        total = np.add.outer(total, taus).ravel()
    observed = sum(tau(x, y) for x, y in seeds)
    return (
        float((total >= observed - 1e-9).mean()),
        float((abs(total) >= abs(observed) - 1e-9).mean()),
    )


UNTIED: Seeds = [([1, 4, 2, 3], [1, 3, 2, 4]), ([4, 1, 2, 3], [1, 2, 3, 4])]
TIED: Seeds = [
    ([1, 1, 2, 3], [1, 2, 2, 2]),
    ([1, 2, 2, 3], [3, 1, 2, 2]),
    ([1, 2, 3, 4], [1, 1, 2, 2]),
]
SKEWED: Seeds = [([1, 1, 1, 2, 3], [1, 2, 2, 3, 3])]  # its null is not symmetric
SIX: Seeds = [([1, 2, 2, 4, 5, 6], [2, 1, 3, 3, 6, 5])]


class TestMeanTau:
    @pytest.mark.parametrize("seeds", [UNTIED, TIED, SKEWED, SIX, UNTIED + TIED[:1]])
    def test_equals_going_through_all_matchings(self, seeds: Seeds) -> None:
        test = mean_tau_test(seeds)
        assert test.mean == pytest.approx(np.mean([tau(x, y) for x, y in seeds]))
        assert (test.p_greater, test.p_two_sided) == pytest.approx(by_going_through(seeds))

    @pytest.mark.parametrize("size", [3, 5, 7, 9])
    def test_one_seed_without_ties_is_scipys_exact_test(self, size: int) -> None:
        x = np.random.default_rng(size).permutation(size).tolist()
        exact = stats.kendalltau(x, range(size), method="exact").pvalue
        assert mean_tau_test([(x, range(size))]).p_two_sided == pytest.approx(exact)

    @pytest.mark.parametrize(
        ("total", "published", "right"), [(25, 0.011, 0.018), (21, 0.028, 0.041)]
    )
    def test_published_p_values_left_out_the_ties_of_the_statistic(
        self, total: int, published: float, right: float
    ) -> None:
        """Three seeds, K = 7: their p counts larger means alone. ``total``: sum of S over seeds."""
        untied = (1,) * 7
        null = kendall_null(untied, untied)
        three = np.convolve(np.convolve(null, null), null)
        tail = three[len(three) // 2 + total :]
        assert tail.sum() == pytest.approx(right, abs=5e-4)
        assert tail[1:].sum() == pytest.approx(published, abs=5e-4)

    @pytest.mark.parametrize(("wanted", "right"), [([9, 9, 7], 0.018), ([7, 7, 7], 0.041)])
    def test_mean_tau_test_gives_the_right_ones(self, wanted: list[int], right: float) -> None:
        def with_score(score: int) -> list[int]:
            orders = itertools.permutations(range(7))
            return next(list(o) for o in orders if round(21 * tau(o, range(7))) == score)

        seeds: Seeds = [(with_score(score), range(7)) for score in wanted]
        assert mean_tau_test(seeds).p_greater == pytest.approx(right, abs=5e-4)

    def test_many_seeds_with_ties_of_their_own(self) -> None:
        """Sums of many different fractions: met in the middle, not tabulated."""
        rng = np.random.default_rng(0)
        seeds: Seeds = [
            (rng.integers(0, 5, 7).tolist(), rng.integers(0, 5, 7).tolist()) for _ in range(8)
        ]
        test = mean_tau_test(seeds)
        drawn = np.zeros(20_000)
        for x, y in seeds:
            some = [tau(x, rng.permutation(y).tolist()) for _ in range(2_000)]
            drawn += rng.choice(some, len(drawn))
        simulated = (np.abs(drawn) >= abs(8 * test.mean) - 1e-9).mean()
        assert test.p_two_sided == pytest.approx(simulated, abs=0.03)

    def test_one_matching_equals_going_through_it(self) -> None:
        seeds: Seeds = [([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]), ([1, 2, 2, 4, 5], [1, 2, 3, 5, 4])]
        observed = sum(tau(x, y) for x, y in seeds)
        totals = [
            sum(tau([x[i] for i in order], y) for x, y in seeds)
            for order in itertools.permutations(range(5))
        ]
        expected = np.mean(np.abs(totals) >= abs(observed) - 1e-9)
        assert mean_tau_test(seeds).p_one_matching == pytest.approx(expected)

    def test_repeating_a_seed_is_evidence_for_the_one_and_none_for_the_other(self) -> None:
        seed: Seeds = [([1, 2, 3, 4, 5, 6, 7], [1, 2, 4, 3, 7, 6, 5])]
        once, five = mean_tau_test(seed), mean_tau_test(seed * 5)
        assert five.p_two_sided < once.p_two_sided / 10
        assert five.p_one_matching == pytest.approx(once.p_one_matching)
        assert once.p_one_matching == pytest.approx(once.p_two_sided)

    def test_false_positives_are_as_rare_as_promised(self) -> None:
        rng = np.random.default_rng(1)
        found = 0
        for _ in range(SIMULATIONS):
            seeds: Seeds = [
                (rng.permutation(7).tolist(), rng.integers(0, 5, 7).tolist()) for _ in range(3)
            ]
            found += mean_tau_test(seeds).p_two_sided <= 0.05
        assert found / SIMULATIONS <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)

    def test_without_any_order_there_is_no_tau(self) -> None:
        equal: Seeds = [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2])]
        for seeds in (equal, []):
            test = mean_tau_test(seeds)
            assert math.isnan(test.mean)
            assert math.isnan(test.p_greater)
            assert test.taus == ()
        mixed = mean_tau_test([*equal, ([1, 2, 3], [1, 2, 3])])
        assert [mixed.mean, mixed.p_greater] == pytest.approx([1, 1 / 6])


class TestSignFlip:
    @pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (6, 0), (9, 4), (40, 25)])
    def test_one_seed_is_mcnemars_exact_test(self, better: int, worse: int) -> None:
        differences = np.array([1] * better + [-1] * worse + [0] * 20)
        exact = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert sign_flip_p(differences) == pytest.approx(exact)

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_going_through_all_signs(self, seed: int) -> None:
        differences = np.random.default_rng(seed).integers(-3, 4, 11)
        signs = np.array(list(itertools.product([-1, 1], repeat=11)))
        totals = np.abs(signs @ np.abs(differences))
        assert sign_flip_p(differences) == pytest.approx((totals >= abs(differences.sum())).mean())

    def test_two_methods_that_do_the_same(self) -> None:
        assert sign_flip_p(np.zeros(50, dtype=int)) == 1.0


def overlapping(
    rng: np.random.Generator, effect: float, seeds: int = 5, pool: int = 400, size: int = 200
) -> np.ndarray:
    """(pool, seeds) differences in correctness, NaN where a seed does not test a pair. A pair's
    difference is mostly its own, whatever the seed; its mean over all pairs there are is effect."""
    own = rng.choice([-1.0, 0.0, 1.0], pool, p=[0.2 - effect / 2, 0.6, 0.2 + effect / 2])
    again = rng.choice([-1.0, 0.0, 1.0], (pool, seeds), p=[0.2 - effect / 2, 0.6, 0.2 + effect / 2])
    differences = np.where(rng.random((pool, seeds)) < 0.8, own[:, None], again)
    for seed in range(seeds):
        differences[rng.permutation(pool)[size:], seed] = np.nan
    return differences


class TestOverlappingSeeds:
    """All seeds' test sets come from one pool: pairs recur."""

    def test_interval_covers_the_truth_as_often_as_promised(self) -> None:
        rng = np.random.default_rng(0)
        covered = naive = 0
        for _ in range(SIMULATIONS):
            table = overlapping(rng, effect=0.06)
            low, high = np.quantile(
                clustered_bootstrap(table[:, :, None], rng, 500), [0.025, 0.975]
            )
            covered += low <= 0.06 <= high
            seen = table[np.isfinite(table)]
            error = seen.std() / math.sqrt(len(seen))
            naive += abs(seen.mean() - 0.06) <= 1.96 * error
        allowed = 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS)
        assert abs(covered / SIMULATIONS - 0.95) <= allowed
        assert naive / SIMULATIONS < 0.85  # as if each row were an observation of its own

    def test_exact_test_finds_nothing_where_there_is_nothing(self) -> None:
        rng = np.random.default_rng(1)
        found = naive = 0
        for _ in range(SIMULATIONS):
            table = overlapping(rng, effect=0.0)
            found += sign_flip_p(np.nansum(table, axis=1).astype(int)) <= 0.05
            naive += sign_flip_p(table[np.isfinite(table)].astype(int)) <= 0.05
        assert found / SIMULATIONS <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)
        assert naive / SIMULATIONS > 0.15

    def test_finds_what_is_there(self) -> None:
        rng = np.random.default_rng(2)
        found = [
            sign_flip_p(np.nansum(overlapping(rng, effect=0.2), axis=1).astype(int)) <= 0.05
            for _ in range(50)
        ]
        assert np.mean(found) > 0.9


class TestBootstrap:
    def test_standard_error_of_one_seed_is_the_formula(self) -> None:
        values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 500)
        drawn = clustered_bootstrap(values[:, None, None], np.random.default_rng(1), 4000)
        assert drawn.std() == pytest.approx(values.std() / math.sqrt(500), rel=0.05)
        assert drawn.mean() == pytest.approx(values.mean(), abs=0.005)

    def test_estimate_is_the_mean_of_the_seeds_means(self) -> None:
        table = np.full((4, 2, 1), np.nan)
        table[:3, 0, 0], table[3:, 1, 0] = 1.0, 0.0
        drawn = clustered_bootstrap(np.repeat(table, 50, axis=0), np.random.default_rng(0), 500)
        assert drawn == pytest.approx(np.full((500, 1), 0.5))

    def test_comparisons_share_the_draws(self) -> None:
        one = np.random.default_rng(0).choice([-1.0, 1.0], (60, 2, 1))
        drawn = clustered_bootstrap(np.concatenate([one, -one], -1), np.random.default_rng(3), 300)
        assert drawn[:, 0] == pytest.approx(-drawn[:, 1])

    def test_pairs_of_one_prompt_are_drawn_together(self) -> None:
        """Pairs that repeat each other four times are worth no more than one of them."""
        values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 300)
        once = clustered_bootstrap(values[:, None, None], np.random.default_rng(1), 2000)
        clusters = np.repeat(np.arange(300), 4)
        four = np.repeat(values, 4)[:, None, None]
        drawn = clustered_bootstrap(four, np.random.default_rng(1), 2000, clusters)
        assert drawn == pytest.approx(once, abs=1e-6)

    def test_comparisons_may_test_different_pairs(self) -> None:
        values = np.full((40, 1, 2), np.nan)
        values[:20, 0, 0], values[20:, 0, 1] = 1.0, -1.0
        drawn = clustered_bootstrap(values, np.random.default_rng(0), 250)
        assert drawn == pytest.approx(np.broadcast_to([1.0, -1.0], (250, 2)))


class TestCrossed:
    """Seeds and pairs as two crossed sources of chance."""

    def test_test_sets_without_overlap_leave_the_t_test_of_seeds(self) -> None:
        rng = np.random.default_rng(0)
        table = np.full((300, 3), np.nan)
        for seed in range(3):
            table[100 * seed : 100 * (seed + 1), seed] = rng.choice([-1.0, 0, 1], 100) + seed
        test, theirs = crossed_t(table), stats.ttest_1samp(np.nanmean(table, axis=0), 0.0)
        assert (test.degrees, test.p) == pytest.approx((2, theirs.pvalue))
        assert test.interval() == pytest.approx(tuple(theirs.confidence_interval()))

    def test_seeds_that_all_say_the_same_leave_the_t_test_of_pairs(self) -> None:
        values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 300, p=[0.2, 0.5, 0.3])
        test, theirs = crossed_t(np.tile(values[:, None], 3)), stats.ttest_1samp(values, 0.0)
        assert (test.degrees, test.p) == pytest.approx((299, theirs.pvalue))

    def test_complete_table_has_the_variance_of_the_crossed_analysis_of_variance(self) -> None:
        """(MS seeds + MS pairs - MS residual) / (N S), Clark's (1973) quasi-F."""
        rng = np.random.default_rng(1)
        table = rng.normal(size=(60, 1)) + 0.4 * rng.normal(size=(1, 4)) + rng.normal(size=(60, 4))
        pairs, seeds = table.shape
        rows, columns, mean = table.mean(1), table.mean(0), table.mean()
        residuals = table - rows[:, None] - columns + mean
        residual = (residuals**2).sum() / ((pairs - 1) * (seeds - 1))
        squares = pairs * columns.var(ddof=1) + seeds * rows.var(ddof=1) - residual
        expected = math.sqrt(squares / (pairs * seeds))
        assert crossed_t(table).standard_error == pytest.approx(expected)

    def test_pairs_that_repeat_each_other_count_once_if_they_share_a_prompt(self) -> None:
        table = overlapping(np.random.default_rng(2), effect=0.05, seeds=3)
        tested = table[np.isfinite(table).any(1)]
        four = np.repeat(tested, 4, axis=0)
        once, clusters = crossed_t(tested), np.repeat(np.arange(len(tested)), 4)
        assert crossed_t(four, clusters) == once
        assert crossed_t(four).standard_error < once.standard_error

    def test_few_pairs_on_which_all_seeds_agree_by_chance(self) -> None:
        """Every seed sees one pair of six: no seed differs, and yet little is known."""
        table = np.full((18, 3), np.nan)
        for seed in range(3):
            table[6 * seed : 6 * (seed + 1), seed] = [1, 0, 0, 0, 0, 0]
        test = crossed_t(table)
        assert test.mean == pytest.approx(1 / 6)
        assert test.p > 0.05

    def test_what_cannot_be_said_is_nan(self) -> None:
        for table in (np.ones((9, 1)), np.full((5, 3), np.nan), np.ones((1, 3)), np.ones((0, 3))):
            assert math.isnan(crossed_t(table).p)
        assert crossed_t(np.zeros((9, 3))).p == 1.0
        assert math.isnan(crossed_t(np.ones((9, 3))).p)  # no spread at all to judge by

    @pytest.mark.parametrize("seeds", [3, 5])
    @pytest.mark.parametrize("noise", [0.0, 0.03])
    def test_errs_as_often_as_promised(self, seeds: int, noise: float) -> None:
        """With and without training noise; the test over pairs alone takes noise for an effect."""
        setting = Setting(seeds, noise, pool=1400, test=200)
        rates = errors(setting, SIMULATIONS, np.random.default_rng(seeds))
        allowed = 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)
        assert 0.01 <= rates["p"] <= 0.05 + allowed
        assert abs(rates["coverage"] - 0.95) <= allowed + 0.01

    def test_seeds_that_agree_by_luck_do_not_add_degrees_of_freedom(self) -> None:
        rng, setting = np.random.default_rng(3), Setting(3, 0.0, pool=700, test=100)
        found = np.array([crossed_t(simulate(setting, 0.0, rng)).p < 0.05 for _ in range(2000)])
        assert found.mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(found))

    def test_pairs_alone_take_training_noise_for_an_effect(self) -> None:
        setting = Setting(5, 0.06, pool=1400, test=200)
        rates = errors(setting, SIMULATIONS, np.random.default_rng(1))
        assert rates["p"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)
        assert rates["p (pairs)"] > 4 * rates["p"]

    def test_simulated_studies_have_the_effect_that_they_say(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [np.nanmean(simulate(Setting(3, 0.02), 0.03, rng)) for _ in range(100)]
        assert np.mean(drawn) == pytest.approx(0.03, abs=4 * np.std(drawn) / 10)
        table = simulate(Setting(3, 0.0, per_prompt=4), 0.0, rng)
        by_prompt = np.isfinite(table).reshape(-1, 4, 3)
        assert (by_prompt.all(1) == by_prompt.any(1)).all()
        assert np.isfinite(table).sum(0).tolist() == [1000, 1000, 1000]

    def test_script_prints_the_table_of_the_page(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--studies", "2"]) == 0
        printed = capsys.readouterr().out.splitlines()
        page = (ROOT / "docs" / "report.md").read_text().splitlines()
        settings = [line.split(" | ")[:3] for line in printed[2:]]
        assert (
            settings
            == [line.split(" | ")[:3] for line in page[page.index(printed[1]) + 1 :]][
                : len(settings)
            ]
        )


class TestArms:
    def test_chi_square_is_the_formula(self) -> None:
        counts = np.array([[30, 20], [25, 35], [0, 0], [10, 30]])
        kept = counts[[0, 1, 3]]
        expected = np.outer(kept.sum(1), kept.sum(0)) / kept.sum()
        statistic = ((kept - expected) ** 2 / expected).sum()
        test = chi_square(counts)
        assert (test.statistic, test.degrees) == pytest.approx((statistic, 2))
        assert test.p == pytest.approx(stats.chi2.sf(statistic, 2))
        assert test.smallest_expected == pytest.approx(expected.min())

    @pytest.mark.parametrize("counts", [[[3, 4]], [[3, 0], [5, 0]], [[0, 0], [0, 0]]])
    def test_nothing_to_test(self, counts: list[list[int]]) -> None:
        assert math.isnan(chi_square(np.array(counts)).p)

    def test_pearson(self) -> None:
        x, y = [0.1, 0.2, 0.7], [0.5, 0.6, 0.9]
        assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert math.isnan(pearson([1 / 3, 1 / 3, 1 / 3 + 1e-16], y))


class TestSeeds:
    def test_without_overlap_it_is_the_t_test(self) -> None:
        values = [0.01, 0.03, -0.01, 0.02]
        theirs = stats.ttest_1samp(values, 0.0)
        test = resampled_t(values, 0.0)
        assert test.mean == pytest.approx(0.0125)
        assert test.p == pytest.approx(theirs.pvalue)
        assert test.standard_error == pytest.approx(standard_error(values))

    def test_overlap_widens_by_nadeau_and_bengios_factor(self) -> None:
        values = [0.01, 0.03, -0.01, 0.02, 0.0]
        factor = resampled_t(values, 0.2).standard_error / resampled_t(values, 0.0).standard_error
        assert factor == pytest.approx(math.sqrt((1 / 5 + 0.2) / (1 / 5)))

    @pytest.mark.parametrize("values", [[0.02], [0.01, 0.01, 0.01]])
    def test_nothing_is_said_where_nothing_varies(self, values: list[float]) -> None:
        test = resampled_t(values, 0.2)
        assert test.mean == pytest.approx(values[0])
        assert math.isnan(test.p)

    def test_standard_error(self) -> None:
        assert standard_error([1.0, 2.0, 3.0, math.nan]) == pytest.approx(1 / math.sqrt(3))
        assert math.isnan(standard_error([1.0]))


class TestManyComparisons:
    def test_holm(self) -> None:
        """By hand: 0.01 * 3, 0.02 * 2, and not below what came before."""
        assert holm([0.02, 0.01, 0.03]).tolist() == pytest.approx([0.04, 0.03, 0.04])
        assert holm([0.5, math.nan, 0.01])[[0, 2]].tolist() == pytest.approx([0.5, 0.02])
        assert math.isnan(holm([math.nan])[0])
        assert len(holm([])) == 0

    def test_smallest_detectable_with_few_degrees_of_freedom(self) -> None:
        effect = smallest_detectable(0.02, degrees=4)
        rng = np.random.default_rng(0)
        errors = 0.02 * np.sqrt(rng.chisquare(4, 40_000) / 4)
        p = 2 * stats.t.sf(np.abs(rng.normal(effect, 0.02, 40_000)) / errors, 4)
        assert (p <= 0.05).mean() == pytest.approx(0.8, abs=0.03)  # Bloom's is an approximation

    @pytest.mark.parametrize("tests", [1, 10])
    def test_smallest_detectable_is_detected_four_times_in_five(self, tests: int) -> None:
        effect = smallest_detectable(0.02, tests)
        estimates = np.random.default_rng(0).normal(effect, 0.02, 20_000)
        p = 2 * stats.norm.sf(np.abs(estimates) / 0.02)
        assert (p <= 0.05 / tests).mean() == pytest.approx(0.8, abs=0.01)
