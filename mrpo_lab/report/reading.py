"""Run folders as records: finished, failed, interrupted, running and torn ones alike."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from mrpo_lab.errors import UserError, first_line

SILENCE = 900.0
"""Seconds without a new line after which a run without a result is taken for dead."""
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in C where there is one: seconds for hundreds of runs."""
TRADE_OFFS = ("trade_off_compared.parquet", "trade_off.parquet")
"""The first that is there is read."""
PRUNED = {"cache", "wandb", "adapter", "checkpoint"}


@dataclass(frozen=True)
class Record:
    """One training run as it stands now, whatever it was read from."""

    name: str
    """``NAME/dataset/model/cell/seed``."""
    source: str
    """Folder or address."""
    status: str
    """finished, failed, interrupted, running, stopped (no result and silent) or unreadable."""
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    """Of ``provenance.json``: one for each time the run was started."""
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row a step; what was not finite is NaN."""
    pairs: pd.DataFrame | None = None
    """``test_pairs.parquet``."""
    trade_off: pd.DataFrame | None = None
    """Of lists: ``trade_off.parquet``, or what ``mrpo_lab.merging`` has made of it."""
    problem: str = ""
    """Why it is not finished, in one line."""

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(self.metrics["step"].max()) if len(self.metrics) else 0

    def series(self, prefix: str) -> dict[str, pd.Series]:
        """Columns ``prefix/NAME`` of the metrics, by NAME."""
        start = f"{prefix}/"
        return {c[len(start) :]: self.metrics[c] for c in self.metrics if c.startswith(start)}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders at or below ``paths``, sorted, each once.

    Raises:
        UserError: a path does not exist.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
    return sorted({folder.resolve() for path in paths for folder in _below(path)})


def _below(path: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(path):
        if "config.yaml" in files and {"provenance.json", "result.json"} & set(files):
            names.clear()
            yield Path(folder)
        names[:] = [name for name in names if name not in PRUNED and not name.startswith(".")]


def read_run(folder: Path, now: float | None = None) -> Record:
    """The record of one run folder; a damaged one is a record with status ``unreadable``."""
    try:
        return _read(folder, time.time() if now is None else now)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        problem = f"cannot be read: {first_line(error)}"
        return Record("/".join(folder.parts[-5:]), str(folder), "unreadable", problem=problem)


def _read(folder: Path, now: float) -> Record:
    config = yaml.load((folder / "config.yaml").read_text(), Loader=YAML)
    if not isinstance(config, dict):
        raise ValueError("config.yaml holds no keys")
    lines = folder / "metrics.jsonl"
    table = folder / "test_pairs.parquet"
    trade_offs = [folder / name for name in TRADE_OFFS if (folder / name).exists()]
    last = max(p.stat().st_mtime for p in (folder / "config.yaml", lines) if p.exists())
    return record(
        _name(folder, config),
        str(folder),
        config,
        _json(folder / "result.json"),
        _json(folder / "provenance.json").get("sessions", []),
        read_lines(lines.read_text() if lines.exists() else ""),
        pd.read_parquet(table) if table.exists() else None,
        pd.read_parquet(trade_offs[0]) if trade_offs else None,
        silent_for=now - last,
    )


def record(
    name: str,
    source: str,
    config: dict[str, Any],
    result: dict[str, Any],
    sessions: list[dict[str, Any]],
    lines: Iterable[Mapping[str, Any]],
    pairs: pd.DataFrame | None,
    trade_off: pd.DataFrame | None,
    silent_for: float,
) -> Record:
    """The one place where what was read becomes a record. ``silent_for``: seconds."""
    metrics = pd.DataFrame(list(lines))
    if len(metrics):
        metrics = metrics.apply(pd.to_numeric, errors="coerce").astype(float)
        metrics = metrics.sort_values("step", kind="stable").drop_duplicates("step", keep="last")
    status = str(result.get("status") or ("running" if silent_for < SILENCE else "stopped"))
    error = str(result.get("error", "")).strip().partition("\n")[0]
    problem = "" if status == "finished" else error
    if status in ("running", "stopped"):
        step = int(metrics["step"].max()) if len(metrics) else 0
        problem = f"at step {step}, last line {_ago(silent_for)} ago"
    elif status == "finished" and not math.isfinite(result.get("test/accuracy") or math.nan):
        status, problem = "failed", "its test accuracy is not a number"
    return Record(
        name, source, status, config, result, sessions, metrics, pairs, trade_off, problem
    )


def _name(folder: Path, config: Mapping[str, Any]) -> str:
    """``NAME/dataset/model/cell/seed`` where the folder is laid out so, else the folder's name."""
    given = str(config.get("name", "")).split("/")
    parts = folder.parts[-4 - len(given) :]
    return "/".join(parts) if list(parts[: len(given)]) == given else folder.name


def read_lines(text: str) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; the last may be cut where a run is writing or was killed."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no keys")
    return content


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"
