"""All runs of a study side by side, as one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrpo_lab.errors import UserError
from mrpo_lab.runs.reading import RunView, find_runs
from mrpo_lab.runs.run_choice import RunChoice, run_choice
from mrpo_lab.storage.files import local_path

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

ACCURACIES = {
    "base_val": "base/val_accuracy",
    "val": "val/accuracy",
    "base_test": "base/test_accuracy",
    "test": "test/accuracy",
}
"""Column of ``StudyView.table`` to key of ``result.json``."""


@dataclass(frozen=True)
class StudyView:
    """Runs on disk, finished or not."""

    runs: list[RunView]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per run, in the order of ``runs``.

        Columns: ``run`` (its name), ``status``, what was chosen (``dataset``, ``model``, ``loss``,
        ``weighting``, ``references``, ``reference``, ``lambda``, ``seed``), accuracies between 0
        and 1 (``base_val``, ``val``, ``base_test``, ``test``; NaN before the run is finished),
        ``folder``, and one column for every other key of the configuration in which the runs
        differ, such as ``loss.beta``, with its value as text.

        A run with a damaged file has only ``status`` (damaged) and its folder; the file is logged.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        settings: list[dict[str, str] | None] = []
        for run in self.runs:
            try:
                choice = _choice(run)
                rows.append(_row(run, choice))
                settings.append({**choice.setting, **choice.parameters})
            except UserError as error:
                logger.warning("%s", error)
                rows.append({"run": run.folder.name, "status": "damaged", "folder": run.folder})
                settings.append(None)
        found = zip(rows, _differing(settings), strict=True)
        return pd.DataFrame([{**row, **setting} for row, setting in found])


def open_study(folder: str | Path) -> StudyView:
    """Open all runs in and below ``folder``, for example ``outputs``.

    Raises:
        UserError: there is no such folder, or it holds no runs.
    """
    found = find_runs([local_path(folder)])
    if not found:
        raise UserError(f"{folder}: no runs; a run is a folder with config.yaml")
    return StudyView([RunView(path) for path in found])


def _choice(run: RunView) -> RunChoice:
    try:
        return run_choice(run.config, run.name)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{run.folder}: its config.yaml is not one of this project") from error


def _row(run: RunView, choice: RunChoice) -> dict[str, Any]:
    run.check(contents=False)
    result = run.result or {}
    return {
        "run": run.name,
        "status": run.outcome.get("status", "unfinished"),
        "dataset": choice.dataset,
        "model": choice.model,
        "loss": choice.loss,
        "weighting": choice.weighting,
        "references": choice.references,
        "reference": choice.reference,
        "lambda": choice.lambda_sampler,
        "seed": choice.seed,
        **{column: result.get(key, float("nan")) for column, key in ACCURACIES.items()},
        "folder": run.folder,
    }


def _differing(settings: Sequence[dict[str, str] | None]) -> list[dict[str, str | None]]:
    """The settings without the keys that are alike in all of them; None stands for a run whose
    settings are not known."""
    known = [setting for setting in settings if setting is not None]
    keys = sorted({key for setting in known for key in setting})
    kept = [key for key in keys if len({setting.get(key) for setting in known}) > 1]
    return [{key: (setting or {}).get(key) for key in kept} for setting in settings]
