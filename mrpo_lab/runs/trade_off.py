"""The trade-off between aspects: one policy under many lambdas, or several policies.

A table has a row for every policy, lambda, aspect, kind of score and metric, and its ``value``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mrpo_lab.storage.files import write_parquet

Rows = Sequence[Mapping[str, Any]]
LAMBDA = "lambda/"


def named_lambda(aspects: Sequence[str], weights: Iterable[float]) -> dict[str, float]:
    """Lambda as runs log it."""
    return {f"{LAMBDA}{a}": float(w) for a, w in zip(aspects, weights, strict=True)}


def write_trade_off(path: Path, rows: Rows) -> None:
    write_parquet(path, pa.Table.from_pylist([dict(row) for row in rows]))


def curves(rows: Rows, metric: str, ranked_by: str = "reward") -> dict[str, np.ndarray]:
    """Policy to its points (P, A): the metric on each aspect, a point a lambda."""
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
    """Policy to the volume between 0 and its curve: what some lambda reaches on all aspects at
    once, at most 1."""
    return {
        policy: hypervolume(points) for policy, points in curves(rows, metric, ranked_by).items()
    }


def hypervolume(points: np.ndarray) -> float:
    """Volume of the union of the boxes between 0 and each of the points (P, A), by slicing along
    the last axis (Zitzler & Thiele 1999)."""
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


def table(rows: Rows, metrics: Iterable[str]) -> str:
    """For the terminal: of each policy the hypervolume and the best value on each aspect."""
    aspects = list(dict.fromkeys(row["aspect"] for row in rows))
    lines = []
    for metric in metrics:
        lines.append(f"{metric + ' by reward':<28}{'volume':>8}" + _columns(aspects))
        for policy, points in curves(rows, metric).items():
            best = "".join(
                f"{value:>{_width(a)}.3f}" for a, value in zip(aspects, points.max(0), strict=True)
            )
            lines.append(f"  {policy:<26}{hypervolume(points):>8.3f}{best}")
    return "\n".join(lines)


def _columns(aspects: Sequence[str]) -> str:
    return "".join(f"{'best ' + aspect:>{_width(aspect)}}" for aspect in aspects)


def _width(aspect: str) -> int:
    return len(aspect) + 7
