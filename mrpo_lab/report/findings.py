"""Findings in sentences: what the runs show, and what they could not have shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mrpo_lab.report.study import Study

ALIKE = 0.05
"""References hardly act if the coefficient of variation of pair weights is below this."""
LEVEL = 0.05
LEAKED = 0.01
"""Findings warn if a larger share of the test pairs is in train."""


def findings(study: Study, tables: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """Sentences for each data set.

    Args:
        tables: frames of the tables by key; a table without rows is missing.
    """

    def rows(key: str, dataset: str) -> pd.DataFrame:
        table = tables.get(key, pd.DataFrame(columns=["dataset"]))
        return table[table["dataset"] == dataset]

    return {
        dataset: [
            *_accuracy(study, dataset),
            *_leakage(study, dataset),
            *_comparisons(rows("comparisons", dataset)),
            *_correlations(rows("table-1", dataset)),
            *_mechanism(rows("pair-weights", dataset)),
            *_left_out(study, dataset),
        ]
        for dataset in study.datasets
    }


def _accuracy(study: Study, dataset: str) -> list[str]:
    cells = study.cells()
    cells = cells[cells["dataset"] == dataset] if len(cells) else cells
    if cells.empty:
        return ["No run has finished."]
    best = cells.loc[cells["test"].idxmax()]
    seeds = sorted(set(cells["seeds"]))
    several = (
        "a seed each" if seeds == [1] else f"{'–'.join(map(str, (seeds[0], seeds[-1])))} seeds"
    )
    if len(seeds) == 1 and seeds != [1]:
        several = f"{seeds[0]} seeds each"
    return [
        f"{int(cells['seeds'].sum())} finished runs: {len(cells)} methods, {several}. The base "
        f"model has {100 * cells['base'].mean():.1f} % test accuracy; the highest mean is "
        f"{100 * best['test']:.1f} % ({best['method']})."
    ]


def _leakage(study: Study, dataset: str) -> list[str]:
    """What share of the test pairs, or of their prompts, is also in train."""
    runs = study.compared[study.compared["dataset"] == dataset]
    shares: dict[str, list[float]] = {"test_prompts_in_train": [], "test_pairs_in_train": []}
    for run in runs.itertuples():
        counts = study.records[str(run.source)].result.get("counts", {})
        for key, found in shares.items():
            if key in counts and run.test_pairs > 0:
                found.append(counts[key] / run.test_pairs)
    prompts, pairs = shares.values()
    if not prompts:
        return []
    said = f"{_percent(prompts)} of the test pairs have a prompt that is also in train; "
    said += (
        f"{_percent(pairs)} are in train themselves."
        if pairs
        else "these runs did not count how many are in train themselves."
    )
    if max(prompts + pairs) <= LEAKED:
        return [said[0].upper() + said[1:]]
    return [
        f"Warning, leakage: {said} Accuracies on such pairs are no measure of what was learned "
        "for new prompts, and their intervals do not cover this."
    ]


def _percent(shares: Sequence[float]) -> str:
    low, high = f"{100 * min(shares):.1f}", f"{100 * max(shares):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _comparisons(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return [
            "Nothing can be compared yet: a comparison needs runs of a method, and runs with a "
            "single reference or with uniform weights."
        ]
    sentences = []
    for against, rows in table.groupby("against", sort=False):
        name = (
            f"the {against} ({rows['baseline'].iloc[0]})" if "single" in str(against) else against
        )
        tested = rows[rows["p_holm"].notna()]
        if len(tested):
            sentences.append(
                f"Against {name}, {len(tested)} methods, for another seed and other test pairs: "
                f"{_outcome(tested, 'p_holm')}. {_power(tested)}"
            )
        if tested["p_pairs"].isna().any():
            sentences.append(
                f"Against {against}: where the test pairs are not known, only the accuracies of "
                "seeds are compared."
            )
        alone = rows[rows["p_holm"].isna() & rows["p_pairs_holm"].notna()]
        if len(alone):
            sentences.append(
                f"Against {name}, {len(alone)} methods with one seed: another seed cannot be "
                "judged. For other test pairs and these trained models alone: "
                f"{_outcome(alone, 'p_pairs_holm')}."
            )
        if rows[["p_holm", "p_pairs_holm"]].isna().all(axis=None):
            sentences.append(f"Against {name}: neither pairs nor seeds suffice for a test.")
    return sentences


def _outcome(rows: pd.DataFrame, p: str) -> str:
    """State which methods are better and which are worse, by a column of p-values."""
    clear = rows[rows[p] < LEVEL]
    better = list(clear.loc[clear["difference"] > 0, "method"])
    worse = list(clear.loc[clear["difference"] < 0, "method"])
    clauses = [f"better: {', '.join(better)}"] if better else []
    clauses += [f"worse: {', '.join(worse)}"] if worse else []
    return "; ".join(clauses) or "none was shown to differ"


def _power(rows: pd.DataFrame) -> str:
    """State the smallest differences that these runs could have shown."""
    known = 100 * rows["detectable"].dropna()
    if known.empty:
        return ""
    return (
        f"These seeds and pairs could have shown differences of {known.min():.1f} to "
        f"{known.max():.1f} points."
    )


def _correlations(table: pd.DataFrame) -> list[str]:
    defined = table[table["tau"].notna()] if len(table) else table
    if defined.empty:
        return []
    clear = defined[defined["p_one_matching"] < LEVEL]
    if clear.empty:
        return [
            f"For none of {len(defined)} methods do the weights correlate significantly with the "
            "references' own accuracy (p of one matching below 0.05, not corrected)."
        ]
    named = ", ".join(f"{r.method} (τ {r.tau:+.2f})" for r in clear.itertuples())
    return [
        f"The weights correlate with the references' own accuracy (p of one matching below 0.05, "
        f"not corrected) in {len(clear)} of {len(defined)} methods: {named}."
    ]


def _mechanism(table: pd.DataFrame) -> list[str]:
    known = table[table["cv"].notna()] if len(table) else table
    if known.empty:
        return []
    alike = known[known["cv"] < ALIKE]
    if len(alike) == len(known):
        return [
            f"References hardly acted: in every method the weights of pairs vary by less than "
            f"{100 * ALIKE:.0f} % of their mean (largest coefficient of variation "
            f"{known['cv'].max():.3f})."
        ]
    if len(alike):
        return [
            f"References hardly acted in {', '.join(alike['method'])}: the weights of pairs vary "
            f"by less than {100 * ALIKE:.0f} % of their mean."
        ]
    low, high = known["cv"].min(), known["cv"].max()
    return [
        "References acted in every method: the coefficient of variation of the pair weights in a "
        f"batch is {low:.2f} to {high:.2f}."
    ]


def _left_out(study: Study, dataset: str) -> list[str]:
    runs = study.runs[study.runs["dataset"] == dataset]
    out = runs[runs["role"] == "left out"]
    other = runs[runs["role"] == "other setting"]
    sentences = []
    if len(out):
        counted = out["status"].replace({"finished": "superseded"}).value_counts()
        statuses = ", ".join(f"{number} {status}" for status, number in counted.items())
        sentences.append(f"Left out: {statuses} (see Provenance).")
    if len(other):
        keys = sorted({key for differs in other["differs"] for key in differs})
        sentences.append(
            f"{len(other)} finished runs differ in {', '.join(keys)} and appear under Mechanism "
            "only."
        )
    missing = study.missing[study.missing["dataset"] == dataset]
    if len(missing):
        cells = "1 cell has" if len(missing) == 1 else f"{len(missing)} cells have"
        sentences.append(f"{cells} no finished run (see Missing cells).")
    return sentences


def running(study: Study) -> list[dict[str, object]]:
    """Running runs: the step they are at, and the last step of finished runs on the data set (0 if
    there are none)."""
    rows = []
    for dataset, runs in study.runs.groupby("dataset") if len(study.runs) else ():
        total = runs.loc[runs["status"] == "finished", "steps"].max()
        for run in runs[runs["status"] == "running"].itertuples():
            of = int(total) if np.isfinite(total) else 0
            rows.append({"run": run.run, "dataset": dataset, "step": int(run.steps), "of": of})
    return rows
