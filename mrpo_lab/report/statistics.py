"""Statistics of the study as pure functions of arrays, each with its source.

Another seed *and* other test pairs: ``crossed_t``, and ``resampled_t`` where only the accuracy of
each seed is known. Other test pairs alone, for models that are trained: ``clustered_bootstrap``,
``sign_flip_p``. Which reference is which: ``mean_tau_test``. All seeds' test sets come from one
pool and overlap, so a pair that several seeds test is one observation, and so are the pairs of one
prompt: they are resampled, or their signs flipped, together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import combinations, permutations, product

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

TOLERANCE = 1e-9
"""Values of a statistic that differ by less are equal: sums of fractions are rounded."""
MOST = 8
"""Most references whose permutations are enumerated, 8! = 40,320."""


@dataclass(frozen=True)
class TauTest:
    """Kendall's tau-b averaged over seeds, with its p-values."""

    mean: float
    taus: tuple[float, ...]
    """One for each seed in which tau is defined."""
    p_greater: float
    """P(T >= mean): one-sided, ties of the statistic included."""
    p_two_sided: float
    """P(|T| >= |mean|)."""
    p_one_matching: float
    """Two-sided, from permutations of the references that are the same in all seeds.

    NaN if there are more than ``MOST`` references, or if seeds have different numbers of them."""


def mean_tau_test(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> TauTest:
    """Test of the mean over seeds of tau-b(x, y), x and y over K references.

    Null: in every seed, independently, all K! ways to match x with y are equally likely, given the
    ties in each. Its distribution is computed exactly, by counting and convolution. A seed in
    which x or y are all equal has no tau and is left out.
    """
    lattices: dict[float, list[np.ndarray]] = defaultdict(list)
    taus = []
    for x, y in pairs:
        scale = _tau_scale(x, y)
        if scale > 0:
            taus.append(float(stats.kendalltau(x, y).statistic))
            lattices[scale].append(kendall_null(_groups(x), _groups(y)))
    if not taus:
        return TauTest(math.nan, (), math.nan, math.nan, math.nan)
    # Within a scale the statistic is an integer, so that probabilities of its sums are convolved.
    parts = []
    for scale, nulls in lattices.items():
        probabilities = reduce(np.convolve, nulls)
        reach = len(probabilities) // 2
        parts.append((np.arange(-reach, reach + 1) / scale, probabilities))
    total = sum(taus)
    return TauTest(
        total / len(taus),
        tuple(taus),
        _tail(parts, total),
        _tail(parts, abs(total)) + _tail([(-v[::-1], p[::-1]) for v, p in parts], abs(total))
        if abs(total) > TOLERANCE
        else 1.0,
        _one_matching([(x, y) for x, y in pairs if _tau_scale(x, y) > 0]),
    )


def _groups(values: Sequence[float]) -> tuple[int, ...]:
    """Number of elements with each distinct value, by rising value."""
    return tuple(np.unique(values, return_counts=True)[1].tolist())


@lru_cache(maxsize=1024)
def kendall_null(groups: tuple[int, ...], values: tuple[int, ...]) -> np.ndarray:
    """Probabilities of S = concordant - discordant pairs from -K(K-1)/2 to K(K-1)/2, over all
    ways to match x with y, given how many share each value of x (``groups``) and y (``values``).

    References are taken by rising x, one group of equal x after another. The state is how many of
    each value of y are still free; a group's share of S is decided by what it takes and what it
    leaves. Counts are exact integers.
    """
    ways: dict[tuple[int, ...], dict[int, int]] = {values: {0: 1}}
    for size in groups:
        following: dict[tuple[int, ...], dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for free, scores in ways.items():
            for taken in _take(free, size):
                left = tuple(f - t for f, t in zip(free, taken, strict=True))
                share = _concordance(taken, left)
                choices = math.prod(map(math.comb, free, taken))
                for score, count in scores.items():
                    following[left][score + share] += count * choices
        ways = following
    (scores,) = ways.values()
    reach, total = math.comb(sum(groups), 2), sum(scores.values())
    return np.array([scores.get(s, 0) / total for s in range(-reach, reach + 1)])


def _one_matching(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Two-sided p of the mean tau-b over all K! permutations of the references, applied to all
    seeds alike.

    A reference is the same model in every seed, so its accuracies and most of its weights hardly
    change between seeds. Seeds are then not independent, and the p-value of ``mean_tau_test`` is
    too small. This one is valid for any dependence between seeds.
    """
    size = len(pairs[0][0])
    if size > MOST or any(len(x) != size for x, _ in pairs):
        return math.nan
    relabelled = np.array(list(permutations(range(size))))
    total = np.zeros(len(relabelled))
    for x, y in pairs:
        order, goal = (np.sign(np.subtract.outer(v, v)) for v in (x, y))
        for i, j in combinations(range(size), 2):
            concordance = order[relabelled[:, i], relabelled[:, j]] * goal[i, j]
            total += concordance / _tau_scale(x, y)
    return float((np.abs(total) >= abs(total[0]) - TOLERANCE).mean())


def _take(free: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    """All ways to take ``size`` elements of those that are free, as counts of each value."""
    if not free:
        if size == 0:
            yield ()
        return
    for first in range(min(free[0], size) + 1):
        for rest in _take(free[1:], size - first):
            yield (first, *rest)


def _concordance(lower: Sequence[int], upper: Sequence[int]) -> int:
    """Concordant minus discordant pairs between two groups, given as counts of rising values."""
    return sum(
        n * m * ((j > i) - (j < i))
        for (i, n), (j, m) in product(enumerate(lower), enumerate(upper))
    )


def _tau_scale(x: Sequence[float], y: Sequence[float]) -> float:
    """The denominator of tau-b = S / scale; 0 if all of x or all of y are equal."""
    pairs = math.comb(len(x), 2)
    tied = [sum(math.comb(n, 2) for n in _groups(v)) for v in (x, y)]
    return math.sqrt((pairs - tied[0]) * (pairs - tied[1]))


def _tail(parts: Sequence[tuple[np.ndarray, np.ndarray]], least: float) -> float:
    """P(sum of independent discrete variables >= least); each is (rising values, probabilities).

    The sums over two halves of the variables are tabulated and then combined.
    """
    halves = [_sum(parts[0::2]), _sum(parts[1::2])]
    (values, chances), (others, other_chances) = halves
    survival = np.append(np.cumsum(other_chances[::-1])[::-1], 0.0)
    at = np.searchsorted(others, least - values - TOLERANCE)
    return float(min(1.0, chances @ survival[at]))


def _sum(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Distribution of a sum of independent discrete variables: rising values, probabilities."""
    values: np.ndarray = np.zeros(1)
    chances: np.ndarray = np.ones(1)
    for more, more_chances in parts:
        kept = more_chances > 0
        sums = np.round(np.add.outer(values, more[kept]), 10).ravel()
        values, place = np.unique(sums, return_inverse=True)
        chances = np.bincount(place.ravel(), np.multiply.outer(chances, more_chances[kept]).ravel())
    return values, chances


def sign_flip_p(differences: np.ndarray) -> float:
    """Exact two-sided p-value of sum(differences) = 0 if each sign is equally likely to be + or -.

    With one seed this is McNemar's exact test (Edwards 1948), otherwise its generalization to pairs
    that several seeds test.

    Args:
        differences: integers (N,): for each pair, the number of seeds in which one method ranks it
            correctly minus that of the other method.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.int64))
    observed = int(abs(np.sum(differences)))
    chances = np.ones(1)
    for size in range(1, int(sizes.max(initial=0)) + 1):
        number = int((sizes == size).sum())
        spread = np.zeros(2 * size * number + 1)
        spread[:: 2 * size] = stats.binom.pmf(np.arange(number + 1), number, 0.5)
        chances = np.convolve(chances, spread)
    sums = np.arange(len(chances)) - len(chances) // 2
    return float(min(1.0, chances[np.abs(sums) >= observed].sum()))


def clustered_bootstrap(
    differences: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 2000,
    clusters: np.ndarray | None = None,
) -> np.ndarray:
    """Resample the mean differences (resamples, M) of M comparisons.

    Clusters of pairs are drawn with replacement, each with all its pairs and all seeds that test
    them (cluster bootstrap; Davison and Hinkley 1997, section 3.8). The estimate is the mean over
    seeds of each seed's mean over its pairs.

    Args:
        differences: (N, S, M) for N pairs, S seeds and M comparisons, NaN where a seed does not
            test a pair.
        clusters: (N,) the cluster that each pair belongs to, numbered from 0; by default each pair
            is a cluster.
    """
    totals, numbers = _by_cluster(differences, clusters)
    size, shape = len(totals), totals.shape[1:]
    sums, counts = (x.reshape(size, -1).astype(np.float32) for x in (totals, numbers))
    estimates = []
    for _ in range(0, resamples, 250):
        drawn = rng.multinomial(size, np.full(size, 1 / size), size=250).astype(np.float32)
        means = (drawn @ sums) / np.maximum(drawn @ counts, 1)
        estimates.append(means.reshape(250, *shape).mean(1))
    return np.concatenate(estimates)[:resamples]


def _by_cluster(
    differences: np.ndarray, clusters: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the differences in each cluster and their number; NaN is left out."""
    tested = np.isfinite(differences).astype(float)
    values = np.nan_to_num(differences)
    if clusters is None:
        return values, tested
    sums = np.zeros((int(clusters.max(initial=-1)) + 1, *differences.shape[1:]))
    counts = np.zeros_like(sums)
    np.add.at(sums, clusters, values)
    np.add.at(counts, clusters, tested)
    return sums, counts


@dataclass(frozen=True)
class MeanTest:
    """A mean difference with the standard error and degrees of freedom of its t-test.

    ``standard_error`` and ``p`` (two-sided) are NaN where the seeds do not say them.
    """

    mean: float
    standard_error: float
    degrees: float
    p: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the mean."""
        reach = float(stats.t.ppf((1 + level) / 2, self.degrees)) * self.standard_error
        return self.mean - reach, self.mean + reach


def crossed_t(differences: np.ndarray, clusters: np.ndarray | None = None) -> MeanTest:
    """Test of the mean difference over other seeds and other test pairs at once.

    Seeds and clusters of pairs (prompts) are two crossed random effects (Clark 1973; Judd, Westfall
    and Kenny 2012). With s^2 the variance of the S seeds' means, and C (S, S) the covariance that
    these means have from the pairs, estimated over clusters, the variance of their mean is
    s^2 / S + c, where c is the mean of C off the diagonal: what seeds share because they test the
    same pairs. It is the variance with two-way clustering (Cameron, Gelbach and Miller 2011), and
    unbiased however much the test sets overlap. Degrees of freedom are Satterthwaite's (1946); for
    them alone, s^2 is not taken to be smaller than what the pairs explain of it, as it would often
    be by luck with three seeds. ``python -m mrpo_lab.report.simulation`` shows how often it errs.

    Args:
        differences: (N, S) for N pairs and S seeds, NaN where a seed does not test a pair.
        clusters: (N,) the cluster that each pair belongs to, numbered from 0; by default each pair
            is a cluster.
    """
    sums, counts = _by_cluster(differences, clusters)
    sizes = counts.sum(0)
    if not len(sums) or not sizes.all():
        return MeanTest(math.nan, math.nan, math.nan, math.nan)
    means = sums.sum(0) / sizes
    mean, seeds, number = float(means.mean()), len(means), int((counts.sum(1) > 0).sum())
    if seeds < 2 or number < 2:
        return MeanTest(mean, math.nan, math.nan, math.nan)
    shares = (sums - counts * means) / sizes
    covariance = shares.T @ shares * number / (number - 1)
    alone = float(np.trace(covariance)) / seeds
    shared = (float(covariance.sum()) - seeds * alone) / (seeds * (seeds - 1))
    shared, explained = max(shared, 0.0), max(alone - shared, 0.0)
    spread = float(means.var(ddof=1))
    if spread <= TOLERANCE**2:  # seeds agree exactly, as few pairs make them: pairs tell the spread
        spread = explained
    parts = max(spread, explained) / seeds, shared
    if sum(parts) <= TOLERANCE**2:  # the methods differ alike on all pairs
        return MeanTest(mean, 0.0, math.nan, math.nan if abs(mean) > TOLERANCE else 1.0)
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (number - 1))
    error = math.sqrt(spread / seeds + shared)
    return MeanTest(mean, error, degrees, float(2 * stats.t.sf(abs(mean) / error, degrees)))


def resampled_t(differences: Sequence[float], test_share: float) -> MeanTest:
    """Corrected resampled t-test, two-sided (Nadeau and Bengio 2003, eq. 10).

    It needs only one difference for each seed. All seeds draw their test pairs from one pool, so
    that these overlap, differences of seeds are correlated, and the variance s^2 / S is too small;
    s^2 (1 / S + test_share) is used instead.

    Args:
        differences: one for each of S seeds.
        test_share: test / (pool - test), the number of test pairs over that of all other pairs of
            the pool. It is the ratio of the paper if training uses all other pairs. Test over
            training pairs is far too much if training uses few.
    """
    values = np.asarray(differences, dtype=float)
    mean, seeds = float(values.mean()), len(values)
    if seeds < 2:
        return MeanTest(mean, math.nan, math.nan, math.nan)
    error = math.sqrt(float(values.var(ddof=1)) * (1 / seeds + test_share))
    if error <= TOLERANCE:  # all seeds are alike, so there is no spread to test against
        return MeanTest(mean, error, seeds - 1, math.nan)
    return MeanTest(mean, error, seeds - 1, float(2 * stats.t.sf(abs(mean / error), seeds - 1)))


@dataclass(frozen=True)
class ContingencyTest:
    """Pearson's chi-square test of independence."""

    statistic: float
    degrees: int
    p: float
    smallest_expected: float
    """The test is approximate, and doubtful if this expected count is below 5 (Cochran 1954)."""


def chi_square(counts: np.ndarray) -> ContingencyTest:
    """Chi-square test of whether rows of counts (A, B) have the same proportions (Pearson 1900).

    Rows and columns without any count are left out; with fewer than two rows or columns left there
    is nothing to test, and p is NaN.
    """
    table = np.asarray(counts, dtype=float)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    if min(table.shape) < 2:
        return ContingencyTest(math.nan, 0, math.nan, math.nan)
    found = stats.chi2_contingency(table, correction=False)
    return ContingencyTest(
        float(found.statistic),
        int(found.dof),
        float(found.pvalue),
        float(found.expected_freq.min()),
    )


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; NaN if all of x or all of y are equal."""
    if min(np.ptp(x), np.ptp(y)) <= TOLERANCE:
        return math.nan
    return float(stats.pearsonr(x, y).statistic)


def smallest_detectable(
    standard_error: float, tests: int = 1, level: float = 0.05, degrees: float = math.inf
) -> float:
    """Smallest difference that a test finds with 80 % power at two-sided ``level`` / ``tests``.

    (t_{1 - level / (2 tests)} + t_0.8) standard errors, with quantiles of Student's distribution of
    ``degrees``, by default the normal one (Bloom 1995).
    """
    quantiles = stats.t.ppf([1 - level / (2 * tests), 0.8], degrees)
    return float(quantiles.sum() * standard_error)


def holm(ps: Sequence[float]) -> np.ndarray:
    """Adjust p-values for their number (Holm 1979); NaN stays NaN and is not counted."""
    values = np.asarray(ps, dtype=float)
    known = np.isfinite(values)
    adjusted = np.full(len(values), np.nan)
    if known.any():
        adjusted[known] = multipletests(values[known], method="holm")[1]
    return adjusted


def standard_error(values: Sequence[float]) -> float:
    """s / sqrt(n) over the values that are finite; NaN if there are fewer than two."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    return float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
