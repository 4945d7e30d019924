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
COLUMNS = {
    "mean_alpha": re.compile(r"alpha[_/: ](.+)", re.I),
    "posterior_mean": re.compile(r"posterior(?:_mean)?[_/: ](.+)", re.I),
    "test_accuracy": re.compile(r"(?:reference_accuracy|accuracy)[_/: ](.+)", re.I),
}
"""Quantities of a reference X, and the names that their columns may have."""
SINGLE = {"dpo", "single", "ln-dpo"}


def read_published(path: Path) -> list[tuple[RunRecord, RunChoice]]:
    """Read a record and its choices from each row of a table.

    Columns: those in ``REQUIRED``; ``base``, the loss that a weighting was used with (mdpo, mrpo,
    ...) or, if ``method`` is dpo, the reference; ``alpha_X``, the weight of reference X averaged
    over steps, and ``posterior_X``, its posterior mean at the end (a row that has posterior means
    is correlated by these, any other by alpha); ``accuracy_X``, the test accuracy of X itself;
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
    columns = _reference_columns(table)
    weighted = [slug for slug, known in columns.items() if set(known) - {"test_accuracy"}]
    references = tuple(weighted or columns)
    rows = []
    for number, row in enumerate(table.to_dict("records"), start=2):
        where = f"{path}:{number}"
        accuracy = _number(row["final_test_acc"])
        result = {
            "status": "finished",
            "test/accuracy": accuracy / scale,
            "val/accuracy": _number(row.get("val_acc")) / scale,
            "base/test_accuracy": _number(row.get("base_test_acc")) / scale,
            "references": {slug: _reference(row, known, scale) for slug, known in columns.items()},
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


def _reference_columns(table: pd.DataFrame) -> dict[str, dict[str, list[str]]]:
    """For each reference and key of ``COLUMNS``, the names of the columns that may hold it."""
    found: dict[str, dict[str, list[str]]] = {}
    for key, pattern in COLUMNS.items():
        for name in table:
            if match := pattern.fullmatch(name):
                found.setdefault(match[1], {}).setdefault(key, []).append(name)
    return found


def _reference(row: dict[str, Any], known: dict[str, list[str]], scale: float) -> dict[str, float]:
    """What a row says of one reference; of several columns of a kind, the first that has it."""
    found = {}
    for key, names in known.items():
        values = [value for name in names if math.isfinite(value := _number(row[name]))]
        if values:
            found[key] = values[0] / (scale if key == "test_accuracy" else 1.0)
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
