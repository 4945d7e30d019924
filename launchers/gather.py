"""A sweep's results in one table."""

from __future__ import annotations

import json
from typing import Any

from launchers.cluster import queue
from launchers.sweep import Sweep, by_gift
from mrpo_lab.runs.reading import finished
from mrpo_lab.storage.files import write_whole

NUMBERS = ("base/val_accuracy", "val/accuracy", "base/test_accuracy", "test/accuracy")


def gather(sweep: Sweep) -> str:
    """Write ``summary.json`` and ``summary.txt`` into the sweep's folder; the latter."""
    standings = sweep.standings(by_gift(queue(sweep.outputs)))
    rows: list[dict[str, Any]] = []
    for name, standing in standings.items():
        # One that has ended since stays as it was found.
        ended = finished(sweep.outputs / name) if standing.state == "finished" else None
        result = ended or {}
        numbers = {key: result.get(key) for key in (*NUMBERS, "steps", "wall_seconds")}
        error = standing.record.error if standing.record and standing.state == "failed" else None
        rows.append({"run": name, "state": standing.state, **numbers, "error": error})
    write_whole(sweep.folder / "summary.json", (json.dumps(rows, indent=1) + "\n").encode())
    text = table(rows)
    write_whole(sweep.folder / "summary.txt", (text + "\n").encode())
    return text


def table(rows: list[dict[str, Any]]) -> str:
    width = max([len("run"), *(len(row["run"]) for row in rows)])
    lines = [f"{'run':<{width}}  {'state':<9} {'val':>14}  {'test':>14}"]
    for row in rows:
        cells = [
            f"{row[f'base/{s}_accuracy']:.3f} -> {row[f'{s}/accuracy']:.3f}"
            if row[f"{s}/accuracy"] is not None
            else ""
            for s in ("val", "test")
        ]
        error = f"  {row['error']}" if row["error"] else ""
        line = f"{row['run']:<{width}}  {row['state']:<9} {cells[0]:>14}  {cells[1]:>14}{error}"
        lines.append(line.rstrip())
    return "\n".join(lines)
