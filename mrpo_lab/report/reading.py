"""Records of runs, from folders or from W&B: finished, failed, interrupted, running and damaged."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mrpo_lab.console import printable
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.runs.reading import RunView
from mrpo_lab.wording import format_duration

SILENCE = 900.0
"""Seconds without a new line after which a run without a result is taken to have been stopped."""


@dataclass(frozen=True)
class RunRecord:
    """One training run as it stands now, whatever it was read from."""

    name: str
    """``NAME/dataset/model/cell/seed``."""
    source: str
    """Folder or address."""
    status: str
    """finished, failed, interrupted, running, stopped (no result and silent) or unreadable."""
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    """``result.json`` whatever its status."""
    sessions: list[dict[str, Any]] = field(default_factory=list)
    """``provenance.json``: one entry for each time that the run was started."""
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per step; values that were not finite are NaN."""
    pairs: pd.DataFrame | None = None
    """``test_pairs.parquet``."""
    trade_off: pd.DataFrame | None = None
    """Runs on lists only: the trade-off, with merged policies if there are any."""
    problem: str = ""
    """Why the run is not finished, in one line."""
    verified: bool = True
    """False for a finished run of an earlier version, whose files have no checksums."""

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(self.metrics["step"].max()) if len(self.metrics) else 0

    def series(self, prefix: str) -> dict[str, pd.Series]:
        """Columns ``prefix/NAME`` of the metrics, by NAME."""
        start = f"{prefix}/"
        return {c[len(start) :]: self.metrics[c] for c in self.metrics if c.startswith(start)}


def read_run(folder: Path, now: float | None = None) -> RunRecord:
    """Read the record of one run folder; if it is damaged, the status is ``unreadable``."""
    try:
        return _read(folder, time.time() if now is None else now)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = first_line(error) if isinstance(error, UserError) else f"damaged: {error!r}"
        return RunRecord("/".join(folder.parts[-5:]), str(folder), "unreadable", problem=problem)


def _read(folder: Path, now: float) -> RunRecord:
    run = RunView(folder)
    run.check(contents=False)
    written = (folder / name for name in ("config.yaml", "metrics.jsonl"))
    last = max((path.stat().st_mtime for path in written if path.exists()), default=0.0)
    record = make_record(
        run.name,
        str(folder),
        run.config,
        run.outcome,
        run.sessions,
        run.metrics,
        run.test_pairs,
        run.trade_off,
        silent_for=now - last,
    )
    return replace(record, verified=run.result is None or run.files is not None)


def make_record(
    name: str,
    source: str,
    config: dict[str, Any],
    result: dict[str, Any],
    sessions: list[dict[str, Any]],
    metrics: pd.DataFrame,
    pairs: pd.DataFrame | None,
    trade_off: pd.DataFrame | None,
    silent_for: float,
) -> RunRecord:
    """Make a record of what was read, and decide its status.

    Args:
        silent_for: seconds since the run wrote anything.
    """
    status = str(result.get("status") or ("running" if silent_for < SILENCE else "stopped"))
    error = str(result.get("error", "")).strip().partition("\n")[0]
    problem = "" if status == "finished" else error
    if status in ("running", "stopped"):
        step = int(metrics["step"].max()) if len(metrics) else 0
        problem = f"at step {step}, last line {format_duration(silent_for)} ago"
    elif status == "finished" and not math.isfinite(result.get("test/accuracy") or math.nan):
        status, problem = "failed", "its test accuracy is not a number"
    return RunRecord(
        printable(name),
        printable(source),
        printable(status),
        shown(config),
        shown(result),
        shown(sessions),
        shown(metrics),
        shown(pairs),
        shown(trade_off),
        printable(problem),
    )


def shown(value: Any) -> Any:
    """``value`` with printable texts only, also in keys and columns.

    Runs may come from others, and one control character in a name stops the program that draws the
    figures.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {shown(key): shown(child) for key, child in value.items()}
    if isinstance(value, list):
        return [shown(child) for child in value]
    if isinstance(value, pd.DataFrame):
        texts = value.select_dtypes(include=["object", "string"]).columns
        return value.assign(**{name: value[name].map(shown) for name in texts}).rename(
            columns=shown
        )
    return value
