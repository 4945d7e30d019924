"""Compare a few runs side by side in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from mrpo_lab.console import text_table
from mrpo_lab.report.comparisons import alphas
from mrpo_lab.report.measures import hours
from mrpo_lab.report.reading import RunRecord
from mrpo_lab.report.study import Study
from mrpo_lab.report.tables import UNKNOWN, format_signed_points


def side_by_side(study: Study, records: Sequence[RunRecord]) -> tuple[list[str], Table | None]:
    """Compare runs in a table with one column per run.

    Returns:
        One line for each run with its folder, and the table: method, accuracies, cost, what
        differs from the main setting, and the mean weight of each reference. The table is None if
        no run could be read.
    """
    readable = [record for record in records if record.source in study.runs.index]
    lines = [f"[{number}] {record.source}" for number, record in enumerate(readable, start=1)]
    lines += [f"unreadable: {r.source}: {r.problem}" for r in study.unreadable]
    if not readable:
        return lines, None
    columns = [_column(record, study.runs.loc[record.source]) for record in readable]
    table = text_table("", *(f"[{number}]" for number in range(1, len(columns) + 1)))
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    return lines, table


def _column(record: RunRecord, run: Any) -> dict[str, str]:
    """Cells of one run, by the name of the row."""
    spent, gpus = hours(record)
    column = {
        "dataset": str(run["dataset"]),
        "method": str(run["method"]),
        "seed": str(run["seed"]),
        "status": record.status,
        "steps": str(run["steps"]),
        "test accuracy": _accuracy(run["test"]),
        "val accuracy": _accuracy(run["val"]),
        "base, test": _accuracy(run["base"]),
        "gain, points": format_signed_points(run["test"] - run["base"]),
        "hours": f"{spent:.3f}" + (f" x {gpus} GPU" if gpus else ""),
    }
    if record.problem:
        column["problem"] = record.problem
    column |= run["differs"]
    for slug, value in alphas(record).items():
        column[f"α {slug}"] = f"{value:.3f}"
    return column


def _accuracy(value: float) -> str:
    return f"{value:.4f}" if pd.notna(value) else UNKNOWN
