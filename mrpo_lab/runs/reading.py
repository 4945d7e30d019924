"""Read runs from their folders: configuration, result, metrics, alpha and test pairs.

This is the only reader of these files. It imports neither torch nor transformers, so that runs can
be looked at on any machine. The result of a finished run describes its other files; each is
compared with that when it is read.
"""

from __future__ import annotations

import io
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
from mrpo_lab.storage.checksums import (
    CHANGED,
    CHECKSUM,
    MISSING,
    DamagedError,
    check_file,
    read_bytes,
    read_json,
    sha256,
)
from mrpo_lab.storage.files import local_path

if TYPE_CHECKING:
    import pandas as pd

YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in C where there is one: this saves seconds for hundreds of runs."""
TRADE_OFFS = ("trade_off_compared.parquet", "trade_off.parquet")
"""Tables of trade-offs; the first that exists is read."""
RESULT = {"references", "base/val_accuracy", "val/accuracy", "base/test_accuracy", "test/accuracy"}
"""Keys without which ``result.json`` says nothing."""
MENDING = "its train.py command writes it again from the checkpoint, or says what to delete"
"""What to do about a damaged file of a finished run."""


@dataclass(frozen=True)
class RunView:
    """One run on disk, finished or not. Files are read when they are first asked for.

    Every attribute that reads a file raises a ``UserError`` that names it if it is damaged: if it
    cannot be read, or the run is finished and the file is not as its result describes it. Runs of
    earlier versions have no such descriptions, and their files are taken as they are.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as ``config.yaml`` has it."""
        path = self.folder / "config.yaml"
        config = parse_config(path, self._content(path.name))
        if config is None:
            raise DamagedError(path, MISSING, MENDING)
        return config

    @property
    def name(self) -> str:
        """``NAME/dataset/model/cell/seed``, or the folder's own name if it was moved."""
        return name_of_folder(self.folder.absolute(), self.config)

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """``result.json`` whatever it says, also of a failed run; empty if there is none yet.

        An empty file counts as none: this is what a power loss may leave.
        """
        path = self.folder / "result.json"
        if path.is_file() and not path.stat().st_size:
            return {}
        outcome = read_json(path, MENDING)
        if "files" in outcome and CHECKSUM not in outcome:
            raise DamagedError(path, "its checksum is missing", MENDING)
        if config := outcome.get("files", {}).get("config.yaml"):  # else it is another run's result
            check_file(self.folder / "config.yaml", config, MENDING, contents=True)
        if outcome.get("status") == "finished" and not RESULT.issubset(outcome):
            raise DamagedError(path, "it is not the result of a run", MENDING)
        return outcome

    @property
    def result(self) -> dict[str, Any] | None:
        """``result.json`` of a finished run; None for any other run."""
        return self.outcome if self.outcome.get("status") == "finished" else None

    @property
    def files(self) -> dict[str, dict[str, Any]] | None:
        """Length and SHA-256 of the files of a finished run, by name; None for other runs, and for
        runs of earlier versions."""
        return (self.result or {}).get("files")

    def check(self, *, contents: bool = True) -> None:
        """Compare the files of a finished run with what its result says of them.

        Args:
            contents: read all files; otherwise only their lengths are compared.

        Raises:
            UserError: names the first file that is missing or differs.
        """
        for name, described in (self.files or {}).items():
            check_file(self.folder / name, described, MENDING, contents=contents)

    @cached_property
    def damage(self) -> str:
        """What is wrong with the files of a finished run, by their lengths; empty if nothing is."""
        try:
            self.check(contents=False)
        except DamagedError as error:
            return str(error)
        return ""

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """``provenance.json``: one entry for each time that the run was started or resumed."""
        self._content("provenance.json")
        return read_sessions(self.folder)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """``metrics.jsonl`` with one row per step; values that were not finite are NaN."""
        path = self.folder / "metrics.jsonl"
        return metrics_frame(parse_lines(path, self._content(path.name) or b""))

    @cached_property
    def alpha(self) -> pd.DataFrame | None:
        """Weights of the references: a column ``step`` and one per reference.

        The file is written with each checkpoint; None before the first.
        """
        return self.table("alpha.parquet")

    @cached_property
    def test_pairs(self) -> pd.DataFrame | None:
        """Margins of policy and references on each test pair, in nats per token; None before the
        run is finished."""
        return self.table("test_pairs.parquet")

    @cached_property
    def trade_off(self) -> pd.DataFrame | None:
        """Trade-off between aspects, with the policies that ``mrpo_lab.merging`` added if it was
        used; None for runs on pairs."""
        tables = (self.table(name) for name in TRADE_OFFS)
        return next((table for table in tables if table is not None), None)

    @cached_property
    def adapter(self) -> Path | None:
        """Folder of the trained adapter, or of the trained model if all weights were trained."""
        folder = self.folder / "adapter"
        for name, described in (self.files or {}).items():
            if name.startswith("adapter/"):
                check_file(self.folder / name, described, MENDING, contents=True)
        return folder if any(folder.glob("*.safetensors")) else None

    def table(self, name: str) -> pd.DataFrame | None:
        """A parquet file of the folder; None if there is none."""
        import pandas as pd
        from pyarrow import ArrowException

        content = self._content(name)
        if content is None:
            return None
        try:
            return pd.read_parquet(io.BytesIO(content))
        except (OSError, ValueError, KeyError, ArrowException) as error:
            raise DamagedError(self.folder / name, error, MENDING) from error

    def _content(self, name: str) -> bytes | None:
        """Content of a file of the run, as it was when the run was finished; None without one."""
        path, described = self.folder / name, self.files
        content = read_bytes(path, MENDING)
        if described is None:
            return content
        if name not in described:
            if content is not None:
                raise DamagedError(path, "the run's result.json has no record of it", "delete it")
        elif content is None:
            raise DamagedError(path, MISSING, MENDING)
        elif sha256(content) != described[name]["sha256"]:
            raise DamagedError(path, CHANGED, MENDING)
        return content


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
        here = {*names, *files}  # names too: a damaged run is to be found as well
        written = {"provenance.json", "result.json"} & here
        if written and len(written | ({"config.yaml", "metrics.jsonl"} & here)) > 1:
            names.clear()  # runs do not lie inside of runs
            yield Path(folder)
        names[:] = [name for name in names if name not in SKIPPED and not name.startswith(".")]


def finished(folder: Path) -> dict[str, Any] | None:
    """``result.json`` of a run's folder if the run is finished and no file is missing or has
    another length; else None."""
    view = RunView(folder)
    return None if view.damage else view.result


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions that a run's ``provenance.json`` lists; empty if there is no such file.

    Raises:
        DamagedError: the file holds something else.
    """
    path, advice = folder / "provenance.json", "delete it"
    sessions = read_json(path, advice).get("sessions", [])
    if not isinstance(sessions, list) or not all(isinstance(s, dict) for s in sessions):
        raise DamagedError(path, "it does not list sessions", advice)
    return sessions


def parse_config(path: Path, content: bytes | None, advice: str = MENDING) -> dict[str, Any] | None:
    """The keys of a ``config.yaml``; None if there is no such file.

    Raises:
        DamagedError: the file holds something else.
    """
    if content is None:
        return None
    try:
        config = yaml.load(content, Loader=YAML)
    except (yaml.YAMLError, ValueError) as error:
        raise DamagedError(path, error, advice) from error
    if not isinstance(config, dict):
        raise DamagedError(path, "it holds no keys", advice)
    return config


def parse_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl``; a last line that is still being written, or that a kill cut
    off, is left out.

    Raises:
        DamagedError: a line is not JSON, or has no step.
    """
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            parsed = json.loads(line)
            found.append(parsed | {"step": int(parsed["step"])})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"line {number} is not one that a run writes"
            raise DamagedError(path, why, "delete the folder to train the run again") from error
    return found


def metrics_frame(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Logged lines as floats, one row per step in rising order; the last line of a step counts."""
    import pandas as pd

    metrics = pd.DataFrame(list(lines))
    if len(metrics):
        metrics = metrics.apply(pd.to_numeric, errors="coerce").astype(float)
        metrics = metrics.sort_values("step", kind="stable").drop_duplicates("step", keep="last")
    return metrics
