"""Trade-offs between aspects, of all runs on lists."""

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
TOLD, UNTOLD = "told lambda", "not told"
COLUMNS = ["dataset", "method", "seed", "policy", "told", "aspect", "ranked_by", "metric", "value"]


def trade_offs(study: Study) -> pd.DataFrame:
    """``COLUMNS``; ``told`` is lambda in words."""
    parts = []
    for about, table in _tables(study):
        weights = table.filter(regex=f"^{LAMBDA}").rename(columns=lambda c: c.removeprefix(LAMBDA))
        told = weights.apply(lambda row: ", ".join(f"{a} {w:.2f}" for a, w in row.items()), axis=1)
        parts.append(table.assign(told=told, **about)[COLUMNS])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def volumes(study: Study) -> pd.DataFrame:
    """Of every run and policy: hypervolume, and the best value on each aspect."""
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
    """What a run is called, and its table; ``trained`` says whether it was told lambda."""
    for run in study.runs.itertuples() if len(study.runs) else ():
        record = study.records[str(run.source)]
        if record.trade_off is not None and run.role != "left out":
            name = TOLD if record.config["lambda"]["condition"] else UNTOLD
            table = record.trade_off.replace({"policy": {"trained": name}})
            yield {"dataset": run.dataset, "method": run.method, "seed": run.seed}, table
