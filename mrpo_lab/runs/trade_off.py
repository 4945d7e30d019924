"""The trade-off between aspects: how well policies rank replies by each aspect, at many lambdas.

A trade-off is a list of rows, one for each policy, lambda, aspect, metric, and kind of score that
replies are ranked by (reward or logp), with the ``value`` of the metric.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from mrpo_lab.console import text_table
from mrpo_lab.storage.files import write_parquet

Rows = Sequence[Mapping[str, Any]]
LAMBDA = "lambda/"


def named_lambda(aspects: Sequence[str], weights: Iterable[float]) -> dict[str, float]:
    """Lambda under the names that runs log it by, ``lambda/ASPECT``."""
    return {f"{LAMBDA}{a}": float(w) for a, w in zip(aspects, weights, strict=True)}


def write_trade_off(path: Path, rows: Rows) -> None:
    """Write the rows as a parquet file."""
    write_parquet(path, pa.Table.from_pylist([dict(row) for row in rows]))


def curves(rows: Rows, metric: str, ranked_by: str = "reward") -> dict[str, np.ndarray]:
    """For each policy its points (P, A): the metric on each of A aspects at each of P lambdas."""
    points: dict[str, dict[tuple[Any, ...], dict[str, float]]] = defaultdict(dict)
    aspects = list(dict.fromkeys(row["aspect"] for row in rows))
    for row in rows:
        if row["metric"] == metric and row["ranked_by"] == ranked_by:
            weights = tuple(value for key, value in row.items() if key.startswith(LAMBDA))
            points[row["policy"]].setdefault(weights, {})[row["aspect"]] = row["value"]
    return {
        policy: np.array([[point[aspect] for aspect in aspects] for point in found.values()])
        for policy, found in points.items()
    }


def hypervolumes(rows: Rows, metric: str, ranked_by: str = "reward") -> dict[str, float]:
    """Hypervolume of each policy's curve, at most 1; large if some lambda serves all aspects."""
    return {
        policy: hypervolume(points) for policy, points in curves(rows, metric, ranked_by).items()
    }


def hypervolume(points: np.ndarray) -> float:
    """Volume of the union of the boxes between 0 and each of the points (P, A).

    Computed by slicing along the last axis (Zitzler and Thiele 1999).
    """
    points = np.clip(np.asarray(points, dtype=float), 0, None)
    points = points[[not _dominated(point, points) for point in points]]
    if points.shape[1] == 1 or not len(points):
        return float(points.max(initial=0))
    order = points[np.argsort(-points[:, -1])]
    heights = np.append(order[:, -1], 0.0)
    slices = heights[:-1] - heights[1:]
    return sum(
        float(depth) * hypervolume(np.unique(order[: i + 1, :-1], axis=0))
        for i, depth in enumerate(slices)
        if depth > 0
    )


def _dominated(point: np.ndarray, points: np.ndarray) -> bool:
    return bool(((points >= point).all(1) & (points > point).any(1)).any())


def trade_off_table(rows: Rows, metrics: Iterable[str]) -> Table:
    """For the terminal: the hypervolume of each policy and its best value on each aspect."""
    aspects = list(dict.fromkeys(row["aspect"] for row in rows))
    numbers = ("volume", *(f"best {aspect}" for aspect in aspects))
    table = text_table("by reward", "policy", *numbers, right=numbers)
    for metric in metrics:
        for policy, points in curves(rows, metric).items():
            values = (hypervolume(points), *points.max(0))
            table.add_row(metric, policy, *(f"{value:.3f}" for value in values))
    return table
