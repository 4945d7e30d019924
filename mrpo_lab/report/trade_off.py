"""Trade-offs between aspects in all runs on lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from mrpo_lab.report.study import Study
from mrpo_lab.runs.trade_off import LAMBDA, curves, hypervolume

METRICS = {
    "pairwise": "pairwise agreement",
    "spearman": "rank correlation",
    "ndcg": "NDCG",
    "top1": "best reply on top",
}
CONDITIONED, UNCONDITIONED = "conditioned", "unconditioned"
"""Labels of trained policies with and without lambda in their prompt."""
COLUMNS = [
    *("dataset", "method", "seed", "policy", "lambda"),
    *("aspect", "ranked_by", "metric", "value"),
]


def trade_offs(study: Study) -> pd.DataFrame:
    """Rows of all runs, with ``COLUMNS``; ``lambda`` is lambda in words."""
    parts = []
    for about, table in _tables(study):
        weights = table.filter(regex=f"^{LAMBDA}").rename(columns=lambda c: c.removeprefix(LAMBDA))
        words = weights.apply(lambda row: ", ".join(f"{a} {w:.2f}" for a, w in row.items()), axis=1)
        parts.append(table.assign(**about, **{"lambda": words})[COLUMNS])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def volumes(study: Study) -> pd.DataFrame:
    """One row per run, policy and metric: hypervolume, and the best value on each aspect."""
    rows = []
    for about, table in _tables(study):
        lines = table.to_dict("records")
        aspects = list(dict.fromkeys(table["aspect"]))
        for metric, name in METRICS.items():
            for policy, points in curves(lines, metric).items():
                best = zip(aspects, points.max(0), strict=True)
                rows.append(
                    {
                        **about,
                        "policy": policy,
                        "metric": name,
                        "volume": hypervolume(points),
                        "best": ", ".join(f"{aspect} {value:.3f}" for aspect, value in best),
                    }
                )
    return pd.DataFrame(rows)


def _tables(study: Study) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Dataset, method and seed of each run on lists, and its rows.

    The policy ``trained`` is called conditioned or unconditioned.
    """
    for run in study.runs.itertuples() if len(study.runs) else ():
        record = study.records[str(run.source)]
        if record.trade_off is not None and run.role != "left out":
            name = CONDITIONED if record.config["lambda"]["condition"] else UNCONDITIONED
            table = record.trade_off.replace({"policy": {"trained": name}})
            yield {"dataset": run.dataset, "method": run.method, "seed": run.seed}, table
