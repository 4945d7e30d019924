"""Read runs from their folders: configuration, result, metrics, alpha and test pairs.

This is the only reader of these files. It imports neither torch nor transformers, so that runs can
be looked at on any machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mrpo_lab.errors import UserError
from mrpo_lab.runs.naming import SKIPPED, name_of_folder
from mrpo_lab.storage.files import local_path

if TYPE_CHECKING:
    import pandas as pd

YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in C where there is one: this saves seconds for hundreds of runs."""
TRADE_OFFS = ("trade_off_compared.parquet", "trade_off.parquet")
"""Tables of trade-offs; the first that exists is read."""


@dataclass(frozen=True)
class RunView:
    """One run on disk, finished or not. Files are read when they are first asked for."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as ``config.yaml`` has it.

        Raises:
            ValueError: the file holds no mapping.
        """
        config = yaml.load((self.folder / "config.yaml").read_text(), Loader=YAML)
        if not isinstance(config, dict):
            raise ValueError("config.yaml holds no keys")
        return config

    @property
    def name(self) -> str:
        """``NAME/dataset/model/cell/seed``, or the folder's own name if it was moved."""
        return name_of_folder(self.folder.absolute(), self.config)

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """``result.json`` whatever it says, also of a failed run; empty if there is none yet."""
        return read_json(self.folder / "result.json")

    @property
    def result(self) -> dict[str, Any] | None:
        """``result.json`` of a finished run; None for any other run."""
        return self.outcome if self.outcome.get("status") == "finished" else None

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """``provenance.json``: one entry for each time that the run was started or resumed."""
        return list(read_json(self.folder / "provenance.json").get("sessions", []))

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """``metrics.jsonl`` with one row per step; values that were not finite are NaN."""
        return metrics_frame(read_lines(self.folder / "metrics.jsonl"))

    @cached_property
    def alpha(self) -> pd.DataFrame | None:
        """Weights of the references: a column ``step`` and one per reference.

        The file is written with each checkpoint; None before the first.
        """
        return self._table("alpha.parquet")

    @cached_property
    def test_pairs(self) -> pd.DataFrame | None:
        """Margins of policy and references on each test pair, in nats per token; None before the
        run is finished."""
        return self._table("test_pairs.parquet")

    @cached_property
    def trade_off(self) -> pd.DataFrame | None:
        """Trade-off between aspects, with the policies that ``mrpo_lab.merging`` added if it was
        used; None for runs on pairs."""
        tables = (self._table(name) for name in TRADE_OFFS)
        return next((table for table in tables if table is not None), None)

    @property
    def adapter(self) -> Path | None:
        """Folder of the trained adapter, or of the trained model if all weights were trained."""
        folder = self.folder / "adapter"
        return folder if any(folder.glob("*.safetensors")) else None

    def _table(self, name: str) -> pd.DataFrame | None:
        import pandas as pd

        path = self.folder / name
        return pd.read_parquet(path) if path.exists() else None


def open_run(folder: str | Path) -> RunView:
    """Open the run in ``folder``.

    Raises:
        UserError: there is no run in this folder.
    """
    path = local_path(folder)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: no run; a run is a folder with config.yaml, as train.py writes")
    return RunView(path)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders of runs at or below ``paths``, sorted, each of them once.

    Raises:
        UserError: a path does not exist.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
    return sorted({folder.resolve() for path in paths for folder in _runs_below(path)})


def _runs_below(path: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(path):
        if "config.yaml" in files and {"provenance.json", "result.json"} & set(files):
            names.clear()  # runs do not lie inside of runs
            yield Path(folder)
        names[:] = [name for name in names if name not in SKIPPED and not name.startswith(".")]


def finished(folder: Path) -> dict[str, Any] | None:
    """``result.json`` of a run's folder if the run is finished, else None."""
    return RunView(folder).result


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if there is no file.

    Raises:
        ValueError: the file is damaged or holds no mapping.
    """
    content = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no keys")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl``; a last line that is still being written, or that a kill cut
    off, is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics_frame(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Logged lines as floats, one row per step in rising order; the last line of a step counts."""
    import pandas as pd

    metrics = pd.DataFrame(list(lines))
    if len(metrics):
        metrics = metrics.apply(pd.to_numeric, errors="coerce").astype(float)
        metrics = metrics.sort_values("step", kind="stable").drop_duplicates("step", keep="last")
    return metrics
