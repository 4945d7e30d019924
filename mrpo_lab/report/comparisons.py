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
    clustered_bootstrap,
    holm,
    mean_tau_test,
    resampled_t,
    sign_flip_p,
    smallest_detectable,
)
from mrpo_lab.report.study import Study

COMPARED = [
    "dataset",
    "method",
    "against",
    "baseline",
    "seeds",
    "pairs",
    "difference",
    "low",
    "high",
    "p_pairs",
    "p_pairs_holm",
    "p_seeds",
    "p_seeds_holm",
    "detectable",
    "wins",
]


def comparisons(study: Study, resamples: int = 2000) -> pd.DataFrame:
    """Compare every method with its baselines, one row for each.

    Columns, beside the methods' labels:
        seeds, pairs: number of seeds that both have, and of test pairs of these seeds.
        difference: test accuracy of the method minus that of the baseline, averaged over seeds.
        low, high: 95 % interval of the difference over the test pairs that could have been drawn.
        p_pairs: exact p-value over test pairs, for these trained models.
        p_seeds: p-value over seeds.
        p_pairs_holm, p_seeds_holm: corrected over all comparisons of the data set (Holm 1979).
        detectable: smallest difference found with 80 % power at level 0.05 / number of comparisons.
        wins: number of seeds in which the method is better.

    Args:
        resamples: number of bootstrap resamples behind ``low``, ``high`` and ``detectable``.
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
    rows = []
    errors: dict[int, float] = {}
    batches: dict[tuple[int, ...], list[tuple[int, pd.DataFrame]]] = defaultdict(list)
    for method, against, baseline in _possible(study, dataset, by_method):
        ours, theirs = by_method[method], by_method[baseline]
        seeds = sorted(set(ours.index) & set(theirs.index))
        if not seeds:
            continue
        by_seed = (ours["test"] - theirs["test"]).loc[seeds]
        share = float((ours["test_pairs"] / ours["train_pairs"]).loc[seeds].mean())
        over_seeds = resampled_t(by_seed.tolist(), share if np.isfinite(share) else 0.0)
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
    rng = np.random.default_rng(0)
    for batch in batches.values():
        errors |= _by_pairs(rows, batch, rng, resamples)
    for number, error in errors.items():
        rows[number]["detectable"] = smallest_detectable(error, tests=len(rows))
    table = pd.DataFrame(rows, columns=COMPARED)
    for column in ("p_pairs", "p_seeds"):
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

    NaN where a seed does not test a pair; None if the pairs of a run are not known.
    """
    columns = {}
    for seed in ours.index:
        tables = [records[runs.loc[seed, "source"]].pairs for runs in (ours, theirs)]
        if any(table is None for table in tables):
            return None
        right = [(t.set_index("pair")["margin"] > 0).astype(float) for t in tables if t is not None]
        columns[seed] = (right[0] - right[1]).dropna()
    return pd.DataFrame(columns)


def _by_pairs(
    rows: list[dict[str, object]],
    batch: Sequence[tuple[int, pd.DataFrame]],
    rng: np.random.Generator,
    resamples: int,
) -> dict[int, float]:
    """Add to ``rows`` the results over test pairs, for comparisons over the same seeds.

    Returns:
        Bootstrap standard error of the difference, by number of the row.
    """
    tables = [table for _, table in batch]
    pairs = sorted(set().union(*(table.index for table in tables)))
    stacked = np.stack([table.reindex(pairs).to_numpy() for table in tables], axis=-1)
    drawn = clustered_bootstrap(stacked, rng, resamples)
    errors = {}
    for column, (number, table) in enumerate(batch):
        low, high = np.quantile(drawn[:, column], [0.025, 0.975])
        summed = table.sum(axis=1).round().astype(int).to_numpy()
        rows[number] |= {
            "pairs": len(table),
            "low": float(low),
            "high": float(high),
            "p_pairs": sign_flip_p(summed),
        }
        errors[number] = float(drawn[:, column].std(ddof=1))
    return errors


def alphas(record: RunRecord) -> dict[str, float]:
    """Weight of each reference: alpha averaged over steps; under Thompson sampling the posterior
    mean at the end."""
    posterior = record.series("bandit/mean")
    if posterior:
        return {slug: float(column.dropna().iloc[-1]) for slug, column in posterior.items()}
    references = record.result.get("references", {})
    return {slug: float(r["mean_alpha"]) for slug, r in references.items() if "mean_alpha" in r}


def own_accuracies(record: RunRecord) -> dict[str, float]:
    """Test accuracy of each reference itself, on this run's test pairs."""
    references = record.result.get("references", {})
    return {s: float(r["test_accuracy"]) for s, r in references.items() if "test_accuracy" in r}


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
    """Kendall's tau-b of each method's alpha with ``target``, averaged over seeds.

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
    """Kendall's tau-b between the references' own test accuracy and that of single-reference DPO
    with them, averaged over seeds."""
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
            "why",
        ],
    )
    for _, group in table.groupby("dataset"):
        adjusted = holm(group["p_two_sided"].astype(float).tolist())
        table["p_holm"] = table["p_holm"].astype(float)
        table.loc[group.index, "p_holm"] = adjusted
    return table
