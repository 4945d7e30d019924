"""Read records of runs from W&B through its public API."""

from __future__ import annotations

import io
import json
import math
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from mrpo_lab.errors import UserError
from mrpo_lab.progress import progress
from mrpo_lab.report.reading import RunRecord, make_record
from mrpo_lab.runs.reading import metrics_frame
from mrpo_lab.runs.tracking import FILES, wandb_mode

STATES = {"crashed": "stopped", "killed": "interrupted", "preempted": "interrupted"}


def read_project(path: str) -> list[RunRecord]:
    """Read every run of ``entity/project`` that this project's tracker wrote.

    Raises:
        UserError: the project cannot be read.
    """
    import requests
    import wandb

    mode, reason = wandb_mode()  # where the library itself would try for a minute
    if mode == "offline":
        raise UserError(f"--from-wandb {path}: {reason}")
    try:
        runs = wandb.Api(timeout=60).runs(path, per_page=100, lazy=False)
        total = len(runs)
    except (wandb.errors.Error, ValueError, requests.RequestException) as error:
        raise UserError(f"--from-wandb {path}: {str(error).splitlines()[0]}") from error
    records = []
    with progress(total, f"reading {path}", "run") as bar:
        for run in runs:
            records.append(record_of(run))
            bar.update()
    return records


def record_of(run: Any) -> RunRecord:
    """Make a record of a ``wandb.apis.public.Run`` from its history, config, summary and files."""
    files = {file.name: _content(file) for file in run.files(names=list(FILES))}
    provenance = json.loads(files.get("provenance.json", "{}"))
    pairs, trade_off = (files.get(f"{name}.parquet") for name in ("test_pairs", "trade_off"))
    result = {key: value for key, value in plain(run.summary).items() if key[0] != "_"}
    if run.state in STATES and "status" not in result:
        result |= {"status": STATES[run.state], "error": f"W&B says {run.state}"}
    return make_record(
        run.name,
        run.url,
        {key: value for key, value in plain(run.config).items() if key[0] != "_"},
        result,
        provenance.get("sessions", []),
        metrics_frame({k: v for k, v in row.items() if k[0] != "_"} for row in run.scan_history()),
        pd.read_parquet(io.BytesIO(pairs)) if pairs else None,
        pd.read_parquet(io.BytesIO(trade_off)) if trade_off else None,
        silent_for=_silence(run),
    )


def plain(value: Any) -> Any:
    """Turn W&B's mappings into dicts, and its words for numbers that are not finite into NaN."""
    if hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if value in ("NaN", "Infinity", "-Infinity"):
        return math.nan
    return value


def _content(file: Any) -> bytes:
    with (
        tempfile.TemporaryDirectory() as folder,
        file.download(root=folder, replace=True) as opened,
    ):
        return Path(opened.name).read_bytes()


def _silence(run: Any) -> float:
    """Seconds since the last heartbeat of the run; 0 if it is running."""
    if run.state == "running":
        return 0.0
    return time.time() - datetime.fromisoformat(run.heartbeatAt).timestamp()
