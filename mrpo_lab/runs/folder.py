"""The folder of one run: what is written there while it trains and when it ends."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mrpo_lab.errors import UserError
from mrpo_lab.runs.identity import difference
from mrpo_lab.runs.inputs import changed_inputs
from mrpo_lab.runs.naming import check_name
from mrpo_lab.runs.provenance import provenance
from mrpo_lab.runs.reading import finished, read_json, read_lines
from mrpo_lab.storage.files import local_path, naming, write_parquet, write_whole

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The folder of one training run, written by one process at a time."""

    folder: Path
    name: str
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    """Hashes of the local files that this session reads; see ``local_inputs``."""

    @classmethod
    def open(cls, outputs: Path, name: str, config: dict[str, Any]) -> Run:
        """The run that ``config`` describes; nothing is written yet.

        Raises:
            UserError: the name would leave ``outputs``, or the folder holds a run with another
                configuration.
        """
        check_name(name)
        folder = local_path(outputs) / name
        saved = folder / "config.yaml"
        if saved.exists():
            differing = difference(config, yaml.safe_load(saved.read_text()) or {})
            if differing:
                raise UserError(
                    f"{folder} holds a run with another configuration ({'; '.join(differing)}): "
                    "give this one a name of its own, name=NAME, or delete that folder"
                )
        return cls(folder, name, config)

    def check_inputs(self) -> None:
        """Refuse to show the result, or to go on, of a run that was made from other local files.

        The data of an unfinished run are compared by what is left of them after filtering: see
        ``Trainer.restore``.

        Raises:
            UserError: names the file that has changed.
        """
        if self.result or self.checkpoint.exists():
            changed = changed_inputs(self.folder, self.config)
            if not self.result:
                changed = [each for each in changed if not each.startswith("dataset.path: ")]
            if changed:
                state = "finished" if self.result else "unfinished"
                raise UserError(
                    f"{'; '.join(changed)}, which is {state}: "
                    "give this one a name of its own, name=NAME, or delete that folder"
                )

    @property
    def checkpoint(self) -> Path:
        """Where the training state is kept; it need not exist."""
        return self.folder / "checkpoint" / "state.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, so that no other process writes it meanwhile.

        Raises:
            UserError: another process holds the lock, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self.folder} is being written by another process") from error
        except OSError as error:
            raise UserError(f"outputs: cannot write {self.folder}: {error.strerror}") from error
        try:
            self._remove_drafts()
            yield
        finally:
            lock.release()
            if not (self.folder / "config.yaml").exists():
                self._remove_empty()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error while writing to the folder into one that says what to do.

        Raises:
            UserError: the disk is full, or the folder cannot be written for another reason.
        """
        try:
            with naming(self.folder):
                yield
        except OSError as error:
            raise UserError(
                f"outputs: cannot write {self.folder}: {error.strerror}: make room there; the same "
                "command goes on from the last checkpoint"
            ) from error

    def _remove_drafts(self) -> None:
        """Remove what a killed process was writing; the lock is held, so nobody else is writing."""
        for draft in [*self.folder.glob(".*.tmp"), *self.folder.glob("checkpoint/.*.tmp")]:
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)

    def _remove_empty(self) -> None:
        """Remove the folders of a run that was refused before it began."""
        (self.folder / ".lock").unlink(missing_ok=True)
        with suppress(OSError):
            for folder in [self.folder, *self.folder.parents][: self.name.count("/") + 1]:
                folder.rmdir()

    @property
    def result(self) -> dict[str, Any] | None:
        """``result.json`` if the run is finished, else None."""
        return finished(self.folder)

    def begin(self) -> None:
        """Write the configuration and add this session to ``provenance.json``."""
        config = yaml.safe_dump(self.config, sort_keys=False)
        with self.writing():
            write_whole(self.folder / "config.yaml", config.encode())
            sessions = read_json(self.folder / "provenance.json").get("sessions", [])
            session = {**provenance(), "inputs": self.inputs}
            self._write_json("provenance.json", {"sessions": [*sessions, session]})
            (self.folder / "result.json").unlink(missing_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``; values that are not finite become null."""
        line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.writing(), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """Read the lines of ``metrics.jsonl`` so far, without a last line that a kill cut off."""
        return read_lines(self.folder / "metrics.jsonl")

    def rewind(self, step: int) -> list[dict[str, float]]:
        """Remove metrics after ``step``, whose steps will be run again, and return the others."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        with self.writing():
            write_whole(self.folder / "metrics.jsonl", text.encode())
        return kept

    def write_alpha(self, slugs: Sequence[str]) -> None:
        """Write ``alpha.parquet`` from the metrics: one row per step, one column per reference."""
        import pyarrow as pa

        lines = [line for line in self.metrics() if f"alpha/{slugs[0]}" in line]
        columns = {"step": [int(line["step"]) for line in lines]}
        table = pa.table(columns | {s: [line[f"alpha/{s}"] for line in lines] for s in slugs})
        with self.writing():
            write_parquet(self.folder / "alpha.parquet", table)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``; ``status: finished`` in it marks the run as finished."""
        self._write_json("result.json", dict(result))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with self.writing():
            write_whole(self.folder / name, (json.dumps(content, indent=2) + "\n").encode())
