"""Measures of runs: pair weights, the references themselves, instabilities, and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from mrpo_lab.report.comparisons import own_accuracies
from mrpo_lab.report.reading import RunRecord
from mrpo_lab.report.statistics import chi_square, standard_error
from mrpo_lab.report.study import REFERENCES, Study

SPIKE = 10.0
"""A step is reported if its gradient norm is this many times the median of its run."""
QUANTILES = (5, 25, 50, 75, 95)
SWEEPS = {"loss.beta": "β", REFERENCES: "number of references K", "dataset.train": "training pairs"}
"""Settings that accuracy is drawn against, with the axis titles."""


def pair_weights(study: Study) -> pd.DataFrame:
    """Distribution of the pair weights of each method, averaged over steps and seeds."""

    def summary(record: RunRecord) -> dict[str, float]:
        steps = record.metrics
        batch = float(record.config.get("train", {}).get("batch_size", np.nan))
        found = {"mean": _mean(steps, "pair_weight/mean"), "cv": _mean(steps, "pair_weight/cv")}
        found["ess_share"] = _mean(steps, "pair_weight/ess") / batch
        for q in (5, 95):
            found[f"p{q:02}"] = _mean(steps, f"pair_weight/p{q:02}")
        return found | {"rank_agreement": weight_agreement(record)}

    columns = ["mean", "cv", "p05", "p95", "ess_share", "rank_agreement"]
    return _by_method(study, summary, columns)


def _by_method(
    study: Study, summary: Callable[[RunRecord], dict[str, float]], columns: list[str]
) -> pd.DataFrame:
    rows = []
    for (dataset, method), runs in study.compared.groupby(["dataset", "method"], sort=False):
        values = pd.DataFrame([summary(study.records[s]) for s in runs["source"]])
        rows.append({"dataset": dataset, "method": method, **values.mean().to_dict()})
    return pd.DataFrame(rows, columns=["dataset", "method", *columns])


def _mean(steps: pd.DataFrame, column: str) -> float:
    return float(steps[column].mean()) if column in steps else np.nan


def weight_agreement(record: RunRecord) -> float:
    """Mean Spearman correlation, over pairs of references, of the weights that each of them alone
    would give the test pairs under the trained policy."""
    if record.pairs is None:
        return np.nan
    weights = record.pairs.filter(regex="^weight/")
    if weights.shape[1] < 2:
        return np.nan
    ranks = np.corrcoef(weights.rank().to_numpy(), rowvar=False)
    return float(ranks[np.triu_indices_from(ranks, 1)].mean())


def swept(study: Study, key: str) -> pd.DataFrame:
    """Finished runs that differ from the main setting in ``key`` alone, with the runs of the same
    methods in the main setting. Column ``x`` is the value of the key."""
    runs = study.runs[study.runs["role"].isin(["compared", "other setting"])]
    alone = runs[[set(differs) <= {key} for differs in runs["differs"]]]
    moved = {(r.dataset, r.method) for r in alone.itertuples() if r.differs}
    kept = alone[[(r.dataset, r.method) in moved for r in alone.itertuples()]].copy()
    if key == "loss.beta":
        kept["x"] = [
            float(r.differs.get(key, study.main[r.dataset][key])) for r in kept.itertuples()
        ]
    else:
        kept["x"] = kept["k" if key == REFERENCES else "train_pairs"].astype(float)
    return kept[np.isfinite(kept["x"].astype(float))]


def references(study: Study) -> pd.DataFrame:
    """Accuracy, margins and length bias of each reference on the test pairs, means over seeds."""
    rows = []
    for dataset in study.datasets:
        for slug, runs in _runs_by_reference(study, dataset).items():
            records = list(runs.values())
            accuracy = [own_accuracies(record)[slug] for record in records]
            described = pd.DataFrame(
                [_length_bias(r.pairs, slug) for r in records if r.pairs is not None]
            )
            margins = [r.result["references"][slug].get("test_mean_abs_margin") for r in records]
            findings = {
                f["problem"]
                for r in records
                for f in r.result.get("gate", ())
                if f.get("slug") == slug
            }
            rows.append(
                {
                    "dataset": dataset,
                    "reference": slug,
                    "seeds": len(records),
                    "accuracy": float(np.mean(accuracy)),
                    "se": standard_error(accuracy),
                    "margin": float(np.mean([m for m in margins if m is not None] or [np.nan])),
                    **described.mean().to_dict(),
                    "gate": "; ".join(sorted(findings)) or "passed",
                }
            )
    columns = ["dataset", "reference", "seeds", "accuracy", "se", "margin"]
    return pd.DataFrame(rows, columns=[*columns, *LENGTH_BIAS, "gate"])


LENGTH_BIAS = ["prefers_longer", "chosen_longer", "length_correlation"]


def _length_bias(pairs: pd.DataFrame, slug: str) -> dict[str, float]:
    """Length bias of a reference, with lengths in its own tokens.

    Returns:
        How often the reference prefers the longer of two replies, how often the label does, and the
        Spearman correlation of margin and difference in length.
    """
    if f"margin/{slug}" not in pairs:
        return {}
    margin, tokens = pairs[f"margin/{slug}"], pairs[f"tokens/{slug}"]
    unequal = tokens != 0
    longer = (margin > 0) == (tokens > 0)
    return {
        "prefers_longer": float(longer[unequal].mean()),
        "chosen_longer": float((tokens > 0)[unequal].mean()),
        "length_correlation": float(margin.corr(tokens, method="spearman")),
    }


def _runs_by_reference(study: Study, dataset: str) -> dict[str, dict[int, RunRecord]]:
    """For each reference and seed a run that holds the reference's scores of the test pairs.

    It is the run with most references, so that all of them are described on the same pairs.
    """
    runs = study.compared[study.compared["dataset"] == dataset].sort_values("k", kind="stable")
    found: dict[str, dict[int, RunRecord]] = {}
    for row in runs.itertuples():
        record = study.records[str(row.source)]
        for slug in own_accuracies(record):
            found.setdefault(slug, {})[int(row.seed)] = record
    return found


def reference_pairs(study: Study, dataset: str) -> pd.DataFrame:
    """Margin of every reference on the test pairs of all seeds, each pair once."""
    columns: dict[str, pd.Series] = {}
    for slug, runs in _runs_by_reference(study, dataset).items():
        parts = [
            r.pairs.set_index("pair")[f"margin/{slug}"]
            for r in runs.values()
            if r.pairs is not None and f"margin/{slug}" in r.pairs
        ]
        if parts:
            joined = pd.concat(parts)
            columns[slug] = joined[~joined.index.duplicated()]
    return pd.DataFrame(columns)


def reference_agreement(study: Study) -> pd.DataFrame:
    """For every two references, the share of test pairs that both rank alike, and the rank
    correlation of their margins."""
    rows = []
    for dataset in study.datasets:
        margins = reference_pairs(study, dataset).dropna()
        ranks = margins.corr(method="spearman")
        for one, other in combinations(margins.columns, 2):
            alike = float(((margins[one] > 0) == (margins[other] > 0)).mean())
            correlation = float(ranks.loc[one, other])
            rows += [
                {"dataset": dataset, "one": a, "other": b, "alike": alike, "spearman": correlation}
                for a, b in ((one, other), (other, one))
            ]
    return pd.DataFrame(rows, columns=["dataset", "one", "other", "alike", "spearman"])


def instability(study: Study) -> pd.DataFrame:
    """Runs in which something went wrong, with what it was."""
    rows = []
    for run in study.runs.itertuples():
        record = study.records[str(run.source)]
        events = _events(record, run)
        if events:
            rows.append(
                {
                    "dataset": run.dataset,
                    "method": run.method,
                    "seed": run.seed,
                    "status": run.status,
                    "events": "; ".join(events),
                    "source": run.source,
                }
            )
    return pd.DataFrame(rows, columns=["dataset", "method", "seed", "status", "events", "source"])


def _events(record: RunRecord, run: Any) -> list[str]:
    events = []
    if run.status in ("failed", "unreadable"):
        events.append(f"failed: {run.problem}")
    steps = record.metrics
    if "train/loss" in steps:
        trained = steps[steps["step"] > 0]
        lost = trained[trained[["train/loss", "train/grad_norm"]].isna().any(axis=1)]
        if len(lost):
            first = int(lost["step"].iloc[0])
            events.append(f"loss or gradient not finite at {len(lost)} steps, first {first}")
        norm = trained["train/grad_norm"]
        spikes = trained[norm > SPIKE * norm.median()]
        if len(spikes):
            first = int(spikes["step"].iloc[0])
            events.append(
                f"gradient norm above {SPIKE:.0f} times its median at {len(spikes)} steps, "
                f"first {first}"
            )
    if np.isfinite(run.test) and run.test < run.base:
        events.append(f"ends at {run.test:.3f}, below the base model's {run.base:.3f}")
    undecided = record.result.get("undecided_pairs", 0)
    if undecided:
        events.append(
            f"{undecided} pairs to which the weighting gave no weights, so that they became uniform"
        )
    return events


def bandit_rewards(study: Study) -> pd.DataFrame:
    """Test for each method of Thompson sampling whether the rewards of its arms differ.

    A reward is 1 if accuracy on the step's probe rose, else 0; steps of all seeds are counted.
    """
    columns = ["bandit/arm", "bandit/probe_before", "bandit/probe_after"]
    rows = []
    for (dataset, method), runs in study.compared.groupby(["dataset", "method"], sort=False):
        counts: Counter[tuple[str, int]] = Counter()
        for source in runs["source"]:
            record = study.records[source]
            if not set(columns) <= set(record.metrics):
                continue
            arms = list(record.series("bandit/mean"))
            for arm, before, after in record.metrics[columns].dropna().to_numpy():
                counts[arms[int(arm)], int(after > before)] += 1
        drawn = list(dict.fromkeys(arm for arm, _ in counts))
        if not drawn:
            continue
        table = np.array([[counts[arm, reward] for reward in (0, 1)] for arm in drawn])
        shares, test = table[:, 1] / table.sum(1), chi_square(table)
        rows.append(
            {
                "dataset": dataset,
                "method": method,
                "steps": table.sum(),
                "arms": len(drawn),
                "rewarded": table[:, 1].sum() / table.sum(),
                "lowest": shares.min(),
                "highest": shares.max(),
                "chi_square": test.statistic,
                "degrees": test.degrees,
                "p": test.p,
                "expected": test.smallest_expected,
            }
        )
    return pd.DataFrame(rows)


def rises(record: RunRecord, before: str, after: str) -> dict[str, float] | None:
    """Shares of steps in which a metric fell, stood and rose; None if it was not logged."""
    if before not in record.metrics or after not in record.metrics:
        return None
    change = (record.metrics[after] - record.metrics[before]).dropna()
    if change.empty:
        return None
    return {
        "fell": float((change < 0).mean()),
        "stood": float((change == 0).mean()),
        "rose": float((change > 0).mean()),
    }


def hours(record: RunRecord) -> tuple[float, int]:
    """Hours so far, and number of GPUs; for an unfinished run without the time of its set-up."""
    result = record.result
    seconds = result.get("wall_seconds", 0.0) + result.get("setup_seconds", 0.0)
    if not seconds and "perf/pairs_per_second" in record.metrics:
        batch = record.config.get("train", {}).get("batch_size", 0)
        seconds = float((batch / record.metrics["perf/pairs_per_second"]).sum())
    last = record.sessions[-1] if record.sessions else {}
    return seconds / 3600, int(last.get("processes", 1)) if last.get("gpus") else 0
