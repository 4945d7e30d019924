"""Gather the results of a sweep in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from launchers.queues import queue
from launchers.sweep import Sweep, by_output, writing
from mrpo_lab.console import plain_text, text_table
from mrpo_lab.runs.reading import finished
from mrpo_lab.storage.files import write_whole

NUMBERS = (
    "base/val_accuracy",
    "val/accuracy",
    "base/test_accuracy",
    "test/accuracy",
    "steps",
    "wall_seconds",
)
"""Keys of ``result.json`` that ``summary.json`` repeats."""


def gather(sweep: Sweep) -> Table:
    """Write ``summary.json`` and ``summary.txt`` into the sweep's folder; return the table."""
    states = sweep.run_states(by_output(queue(sweep.outputs)))
    rows: list[dict[str, Any]] = []
    for name, run in states.items():
        # A run that has finished since its state was read keeps the state that was read.
        result = (finished(sweep.outputs / name) or {}) if run.state == "finished" else {}
        numbers = {key: result.get(key) for key in NUMBERS}
        error = run.record.error if run.record and run.state == "failed" else run.damage or None
        rows.append({"run": name, "state": run.state, **numbers, "error": error})
    table = summary_table(rows)
    with writing(sweep.folder):
        write_whole(sweep.folder / "summary.json", (json.dumps(rows, indent=1) + "\n").encode())
        write_whole(sweep.folder / "summary.txt", (plain_text(table) + "\n").encode())
    return table


def summary_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per run: its state and its accuracies before and after training, or its error."""
    table = text_table("run", "state", "val", "test", "error", right=("val", "test"))
    for row in rows:
        accuracies = [
            ""
            if row[f"{split}/accuracy"] is None
            else f"{row[f'base/{split}_accuracy']:.3f} -> {row[f'{split}/accuracy']:.3f}"
            for split in ("val", "test")
        ]
        table.add_row(row["run"], row["state"], *accuracies, row["error"] or "")
    return table
