"""Findings in sentences: what the runs show, and what they could not have shown."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from mrpo_lab.report.study import Study

ALIKE = 0.05
"""References hardly act if the coefficient of variation of pair weights is below this."""
LEVEL = 0.05


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


def _comparisons(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return [
            "Nothing can be compared yet: a comparison needs runs of a method, and runs with a "
            "single reference or with uniform weights."
        ]
    sentences = []
    for against, rows in table.groupby("against", sort=False):
        tested = rows[rows["p_pairs_holm"].notna()]
        if tested.empty:
            sentences.append(
                f"Against {against}: the test pairs are not known, so that only seeds are compared."
            )
            continue
        clear = tested[tested["p_pairs_holm"] < LEVEL]
        better = list(clear.loc[clear["difference"] > 0, "method"])
        worse = list(clear.loc[clear["difference"] < 0, "method"])
        name = (
            f"the {against} ({rows['baseline'].iloc[0]})" if "single" in str(against) else against
        )
        clauses = [f"better: {', '.join(better)}"] if better else []
        clauses += [f"worse: {', '.join(worse)}"] if worse else []
        outcome = "; ".join(clauses) or "none was shown to differ"
        low, high = 100 * tested["detectable"].min(), 100 * tested["detectable"].max()
        sentences.append(
            f"Against {name}, {len(tested)} methods, on these test pairs: {outcome}. These seeds "
            f"and pairs could have shown differences of {low:.1f} to {high:.1f} points."
        )
    over_seeds = table[table["p_seeds_holm"] < LEVEL]
    seeds = int(table["seeds"].max())
    if over_seeds.empty:
        sentences.append(
            f"Over seeds ({seeds} at most) no difference is significant: these runs do not show "
            "that other training runs would repeat them."
        )
    else:
        pairs = ", ".join(f"{r.method} against {r.against}" for r in over_seeds.itertuples())
        sentences.append(f"Over seeds ({seeds} at most) a difference is significant for {pairs}.")
    return sentences


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
