"""Read published results from a table, so that the same statistics can be computed for them."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from mrpo_lab.errors import UserError
from mrpo_lab.report.methods import LOSSES
from mrpo_lab.report.reading import RunRecord
from mrpo_lab.runs.run_choice import RunChoice

REQUIRED = ("method", "dataset", "seed", "final_test_acc")
WEIGHT = re.compile(r"(?:alpha|posterior(?:_mean)?)[_/: ](.+)", re.I)
OWN = re.compile(r"(?:reference_accuracy|accuracy)[_/: ](.+)", re.I)
SINGLE = {"dpo", "single", "ln-dpo"}


def read_published(path: Path) -> list[tuple[RunRecord, RunChoice]]:
    """Read a record and its choices from each row of a table.

    Columns: those in ``REQUIRED``; ``base``, the loss that a weighting was used with (mdpo, mrpo,
    ...) or, if ``method`` is dpo, the reference; ``alpha_X`` or ``posterior_X``, the weight of
    reference X (averaged over steps, or at the end); ``accuracy_X``, the test accuracy of X itself;
    ``val_acc``; ``base_test_acc``. Accuracies lie between 0 and 1, or are percentages if a test
    accuracy is above 1.

    Raises:
        UserError: the file cannot be read, or a column or a number is missing.
    """
    table = _table(path)
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise UserError(
            f"--published {path}: no column {', '.join(missing)}; it has {', '.join(table)}"
        )
    scale = 100.0 if pd.to_numeric(table["final_test_acc"], errors="coerce").max() > 1 else 1.0
    weights = {m[1]: name for name in table if (m := WEIGHT.fullmatch(name))}
    own = {m[1]: name for name in table if (m := OWN.fullmatch(name))}
    references = tuple(weights) or tuple(own)
    rows = []
    for number, row in enumerate(table.to_dict("records"), start=2):
        where = f"{path}:{number}"
        accuracy = _number(row["final_test_acc"])
        result = {
            "status": "finished",
            "test/accuracy": accuracy / scale,
            "val/accuracy": _number(row.get("val_acc")) / scale,
            "base/test_accuracy": _number(row.get("base_test_acc")) / scale,
            "references": {
                slug: _reference(row, weights.get(slug), own.get(slug), scale)
                for slug in dict.fromkeys([*weights, *own])
            },
        }
        ended = math.isfinite(accuracy)
        record = RunRecord(
            f"published/{row['dataset']}/{row['method']}/{row['seed']}",
            where,
            "finished" if ended else "failed",
            result=result,
            problem="" if ended else "its final_test_acc is not a number",
        )
        rows.append((record, _choice(row, references, where)))
    return rows


def _table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep=None, engine="python", dtype={"method": str, "base": str})
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--published {path}: cannot be read as a table: {error}") from error
    return table.rename(columns=lambda name: str(name).strip())


def _number(value: Any) -> float:
    number = pd.to_numeric(value, errors="coerce") if value is not None else math.nan
    return float(number)


def _reference(
    row: dict[str, Any], weight: str | None, own: str | None, scale: float
) -> dict[str, float]:
    found = {}
    if weight is not None and math.isfinite(_number(row[weight])):
        found["mean_alpha"] = _number(row[weight])
    if own is not None and math.isfinite(_number(row[own])):
        found["test_accuracy"] = _number(row[own]) / scale
    return found


def _choice(row: dict[str, Any], references: tuple[str, ...], where: str) -> RunChoice:
    method, base = str(row["method"]).strip().lower(), str(row.get("base", "")).strip()
    seed = re.search(r"\d+", str(row["seed"]))
    if seed is None:
        raise UserError(f"{where}: seed {row['seed']!r} is not a number")
    single = method in SINGLE
    loss = base.lower() if base.lower() in LOSSES else "published"
    return RunChoice(
        dataset=f"{row['dataset']} (published)",
        loss="dpo" if single else loss,
        weighting="single" if single else method,
        seed=int(seed[0]),
        references=references,
        reference=base if single else "",
    )
