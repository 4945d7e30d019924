"""A few runs side by side in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mrpo_lab.report.comparisons import alphas
from mrpo_lab.report.mechanism import hours
from mrpo_lab.report.reading import Record
from mrpo_lab.report.study import Study


def compare_table(study: Study, records: Sequence[Record]) -> str:
    """A column a run: what it is, how it ended, what differs, and its weights."""
    readable = [record for record in records if record.source in study.runs.index]
    columns = {}
    for number, record in enumerate(readable, start=1):
        columns[f"[{number}]"] = _column(record, study.runs.loc[record.source])
    lines = [f"[{number}] {record.source}" for number, record in enumerate(readable, start=1)]
    lines += [f"unreadable: {r.source}: {r.problem}" for r in study.unreadable]
    if not columns:
        return "\n".join(lines)
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    table = pd.DataFrame(columns, index=rows, dtype=object).fillna("")
    return "\n".join([*lines, "", table.to_string()])


def _column(record: Record, run: Any) -> dict[str, str]:
    spent, gpus = hours(record)
    column = {
        "dataset": str(run["dataset"]),
        "method": str(run["method"]),
        "seed": str(run["seed"]),
        "status": record.status,
        "steps": str(run["steps"]),
        "test accuracy": _share(run["test"]),
        "val accuracy": _share(run["val"]),
        "base, test": _share(run["base"]),
        "gain, points": f"{100 * (run['test'] - run['base']):+.1f}"
        if pd.notna(run["test"])
        else "–",
        "hours": f"{spent:.3f}" + (f" x {gpus} GPU" if gpus else ""),
    }
    if record.problem:
        column["problem"] = record.problem[:60]
    for key, value in run["differs"].items():
        column[key] = value[:40]
    for slug, value in alphas(record).items():
        column[f"α {slug}"] = f"{value:.3f}"
    return column


def _share(value: float) -> str:
    return f"{value:.4f}" if pd.notna(value) else "–"
