"""Compare methods with the best single reference and with uniform weights, and correlate alpha with
accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mrpo_lab.report.methods import Method
from mrpo_lab.report.reading import RunRecord
from mrpo_lab.report.statistics import (
    MeanTest,
    clustered_bootstrap,
    crossed_t,
    holm,
    mean_tau_test,
    pearson,
    resampled_t,
    sign_flip_p,
    smallest_detectable,
    standard_error,
)
from mrpo_lab.report.study import Study

COMPARED = [
    "dataset",
    "method",
    "against",
    "baseline",
    "seeds",
    "pairs",
    "prompts",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "detectable",
    "low_pairs",
    "high_pairs",
    "p_pairs",
    "p_pairs_holm",
    "p_seeds",
    "p_seeds_holm",
    "wins",
]


def comparisons(study: Study, resamples: int = 2000) -> pd.DataFrame:
    """Compare every method with its baselines, one row for each.

    Columns, beside the methods' labels:
        seeds, pairs, prompts: number of seeds that both have, of different test pairs of these
            seeds, and of their prompts (the pairs, where a run does not know its prompts).
        difference: test accuracy of the method minus that of the baseline, averaged over seeds.
        low, high: 95 % interval of the difference for other seeds and other test pairs.
        p: two-sided p-value for the same, see ``crossed_t``; where the pairs are not known it is
            ``p_seeds``, and the interval that of ``resampled_t``. NaN with one seed.
        detectable: smallest difference that this test finds with 80 % power at level
            0.05 / number of comparisons of the data set.
        low_pairs, high_pairs: 95 % interval over other test pairs alone, for these trained models.
        p_pairs: exact p-value for the same.
        p_seeds: p-value from the accuracy of each seed alone, see ``resampled_t``.
        p_holm, p_pairs_holm, p_seeds_holm: corrected over all comparisons of the data set (Holm
            1979).
        wins: number of seeds in which the method is better.

    Args:
        resamples: number of bootstrap resamples behind ``low_pairs`` and ``high_pairs``.
    """
    tables = [_compare_dataset(study, dataset, resamples) for dataset in study.datasets]
    tables = [table for table in tables if len(table)]
    if not tables:
        return pd.DataFrame(columns=COMPARED)
    return pd.concat(tables, ignore_index=True)[COMPARED]


def _compare_dataset(study: Study, dataset: str, resamples: int) -> pd.DataFrame:
    """The rows of ``comparisons`` for one data set."""
    runs = study.compared[study.compared["dataset"] == dataset]
    by_method: dict[Method, pd.DataFrame] = {
        method: group.set_index("seed") for method, group in runs.groupby("key", sort=False)
    }
    rows: list[dict[str, object]] = []
    tests: list[MeanTest] = []
    batches: dict[tuple[int, ...], list[tuple[int, pd.DataFrame]]] = defaultdict(list)
    for method, against, baseline in _possible(study, dataset, by_method):
        ours, theirs = by_method[method], by_method[baseline]
        seeds = sorted(set(ours.index) & set(theirs.index))
        if not seeds:
            continue
        by_seed = (ours["test"] - theirs["test"]).loc[seeds]
        share = (ours["test_pairs"] / (ours["pool"] - ours["test_pairs"])).loc[seeds].mean()
        over_seeds = resampled_t(by_seed.tolist(), share if np.isfinite(share) else 0.0)
        tests.append(over_seeds)
        rows.append(
            {
                "dataset": dataset,
                "method": method.label,
                "against": against,
                "baseline": baseline.label,
                "seeds": len(seeds),
                "difference": over_seeds.mean,
                "p_seeds": over_seeds.p,
                "wins": int((by_seed > 0).sum()),
            }
        )
        table = _pair_differences(study.records, ours.loc[seeds], theirs.loc[seeds])
        if table is not None:
            batches[tuple(seeds)].append((len(rows) - 1, table))
    rng, prompts = np.random.default_rng(0), _prompts(study.records, runs["source"])
    errors = [0.0] * len(rows)
    for batch in batches.values():
        for number, (test, error) in _by_pairs(rows, batch, prompts, rng, resamples).items():
            tests[number], errors[number] = test, error
    for row, test, error in zip(rows, tests, errors, strict=True):
        row["p"] = test.p
        row["low"], row["high"] = test.interval()
        row["detectable"] = smallest_detectable(
            float(np.maximum(test.standard_error, error)), len(rows), degrees=test.degrees
        )
    table = pd.DataFrame(rows, columns=COMPARED)
    for column in ("p", "p_pairs", "p_seeds"):
        table[f"{column}_holm"] = holm(table[column].astype(float).tolist())
    return table


def _possible(
    study: Study, dataset: str, methods: Iterable[Method]
) -> list[tuple[Method, str, Method]]:
    """Every comparison that can be made: method, kind of baseline, baseline."""
    best, known = study.best_single(dataset), set(methods)
    found = []
    for method in methods:
        if method.is_single:
            continue
        if best is not None:
            found.append((method, "best single reference", best))
        uniform = method.uniform_baseline
        if uniform in known and uniform != method:
            found.append((method, "uniform weights", uniform))
    return found


def _pair_differences(
    records: Mapping[str, RunRecord], ours: pd.DataFrame, theirs: pd.DataFrame
) -> pd.DataFrame | None:
    """Correct under ``ours`` minus correct under ``theirs``, one row per pair and column per seed.

    NaN where a seed does not test a pair; None if the pairs that both test are not known. The index
    is a pair's name and its number among equal pairs: a test set may hold the same pair twice.
    """
    columns = {}
    for seed in ours.index:
        tables = [records[runs.loc[seed, "source"]].pairs for runs in (ours, theirs)]
        right = [_correct(table) for table in tables if table is not None]
        if len(right) < 2 or (both := (right[0] - right[1]).dropna()).empty:
            return None
        columns[seed] = both
    return pd.DataFrame(columns)


def _prompts(records: Mapping[str, RunRecord], sources: Iterable[str]) -> dict[str, str]:
    """The prompt of each test pair, by their names; runs from before it was written lack it."""
    found: dict[str, str] = {}
    for source in sources:
        table = records[source].pairs
        if table is not None and "prompt" in table:
            found.update(zip(table["pair"], table["prompt"], strict=True))
    return found


def _correct(table: pd.DataFrame) -> pd.Series:
    """Whether each test pair is ranked correctly, by name and number among equal pairs."""
    correct = (table["margin"] > 0).astype(float)
    correct.index = pd.MultiIndex.from_arrays(
        [table["pair"], table.groupby("pair").cumcount()], names=["pair", "copy"]
    )
    return correct


def _by_pairs(
    rows: list[dict[str, object]],
    batch: Sequence[tuple[int, pd.DataFrame]],
    prompts: Mapping[str, str],
    rng: np.random.Generator,
    resamples: int,
) -> dict[int, tuple[MeanTest, float]]:
    """Add to ``rows`` the results over test pairs, for comparisons over the same seeds.

    Pairs of one prompt are drawn, and their signs flipped, together.

    Args:
        prompts: the prompt of each pair; a pair that is not there has a prompt of its own.

    Returns:
        By number of the row: the test over seeds and pairs, and the bootstrap standard error over
        pairs alone.
    """
    index = pd.MultiIndex.from_tuples(sorted(set().union(*(table.index for _, table in batch))))
    names = np.array([prompts.get(pair, pair) for pair, _ in index])
    clusters = np.unique(names, return_inverse=True)[1]
    stacked = np.stack([table.reindex(index).to_numpy() for _, table in batch], axis=-1)
    drawn = clustered_bootstrap(stacked, rng, resamples, clusters)
    found = {}
    for column, (number, table) in enumerate(batch):
        values = stacked[:, :, column]
        low, high = np.quantile(drawn[:, column], [0.025, 0.975])
        summed = np.bincount(clusters, weights=np.nansum(values, axis=1))
        rows[number] |= {
            "pairs": table.index.get_level_values("pair").nunique(),
            "prompts": len(np.unique(clusters[np.isfinite(values).any(1)])),
            "low_pairs": float(low),
            "high_pairs": float(high),
            "p_pairs": sign_flip_p(summed.round().astype(int)),
        }
        found[number] = crossed_t(values, clusters), float(drawn[:, column].std(ddof=1))
    return found


def alphas(record: RunRecord) -> dict[str, float]:
    """Weight of each reference: alpha averaged over steps; under Thompson sampling the posterior
    mean at the end."""
    posterior = record.series("bandit/mean")
    if posterior:
        return {slug: float(column.dropna().iloc[-1]) for slug, column in posterior.items()}
    references = record.result.get("references", {})
    published = _by_reference(references, "posterior_mean")
    return published or _by_reference(references, "mean_alpha")


def _by_reference(references: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float]:
    return {slug: float(found[key]) for slug, found in references.items() if key in found}


def own_accuracies(record: RunRecord) -> dict[str, float]:
    """Test accuracy of each reference itself, on this run's test pairs."""
    return _by_reference(record.result.get("references", {}), "test_accuracy")


def single_accuracies(study: Study, dataset: str, seed: int) -> dict[str, float]:
    """Test accuracy of single-reference DPO with each reference, for one seed."""
    runs = study.compared
    here = runs[(runs["dataset"] == dataset) & (runs["kind"] == "single") & (runs["seed"] == seed)]
    return dict(zip(here["reference"], here["test"], strict=True))


def target_of(study: Study, run: Any, target: str) -> dict[str, float]:
    """Accuracies that a run's weights are correlated with; see ``alpha_correlations``."""
    if target == "own":
        return own_accuracies(study.records[str(run.source)])
    return single_accuracies(study, str(run.dataset), int(run.seed))


def alpha_correlations(study: Study, target: str) -> pd.DataFrame:
    """Kendall's tau-b and Pearson's correlation of each method's alpha with ``target``, averaged
    over seeds.

    Args:
        target: ``own`` for the references' own test accuracy (the paper's Table 1), ``single`` for
            the test accuracy of single-reference DPO with them (Table 2).
    """
    rows = []
    multi = study.compared[study.compared["kind"] == "multi"]
    for (dataset, method), runs in multi.groupby(["dataset", "method"], sort=False):
        pairs = []
        for run in runs.itertuples():
            pairs.append((alphas(study.records[str(run.source)]), target_of(study, run, target)))
        rows.append({"dataset": dataset, "method": method, **_correlation(pairs)})
    return _correlation_table(rows)


def accuracy_correlations(study: Study) -> pd.DataFrame:
    """Kendall's tau-b and Pearson's correlation between the references' own test accuracy and that
    of single-reference DPO with them, averaged over seeds."""
    rows = []
    for dataset in study.datasets:
        runs = study.compared[study.compared["dataset"] == dataset]
        pairs = []
        for seed, group in runs.groupby("seed"):
            own: dict[str, float] = {}
            for source in group["source"]:
                own |= own_accuracies(study.records[source])
            pairs.append((own, single_accuracies(study, dataset, int(str(seed)))))
        name = "references' own accuracy"
        rows.append({"dataset": dataset, "method": name, **_correlation(pairs)})
    return _correlation_table(rows)


def _correlation(pairs: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, object]:
    """Test the correlation over seeds in which at least three references have both numbers."""
    shared = [(x, y, [slug for slug in x if slug in y]) for x, y in pairs]
    usable = [
        ([x[s] for s in slugs], [y[s] for s in slugs]) for x, y, slugs in shared if len(slugs) > 2
    ]
    test = mean_tau_test(usable)
    linear = [r for r in (pearson(x, y) for x, y in usable) if np.isfinite(r)]
    numbers = sorted({len(x) for x, _ in usable})
    return {
        "tau": test.mean,
        "seeds": len(test.taus),
        "references": "-".join(map(str, numbers)),
        "p_greater": test.p_greater,
        "p_two_sided": test.p_two_sided,
        "p_one_matching": test.p_one_matching,
        "lowest": min(test.taus, default=np.nan),
        "highest": max(test.taus, default=np.nan),
        "pearson": float(np.mean(linear or [np.nan])),
        "pearson_se": standard_error(linear),
        "why": _why_undefined(pairs, usable) if not test.taus else "",
    }


def _why_undefined(pairs: Sequence[object], usable: Sequence[object]) -> str:
    if not pairs:
        return "no runs"
    if not usable:
        return "fewer than three references have both numbers"
    return "all weights or all accuracies are equal"


def _correlation_table(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """A table of correlations, with two-sided p-values corrected over each data set (Holm 1979)."""
    table = pd.DataFrame(
        rows,
        columns=[
            "dataset",
            "method",
            "tau",
            "lowest",
            "highest",
            "seeds",
            "references",
            "p_greater",
            "p_two_sided",
            "p_holm",
            "p_one_matching",
            "pearson",
            "pearson_se",
            "why",
        ],
    )
    for _, group in table.groupby("dataset"):
        adjusted = holm(group["p_two_sided"].astype(float).tolist())
        table["p_holm"] = table["p_holm"].astype(float)
        table.loc[group.index, "p_holm"] = adjusted
    return table
