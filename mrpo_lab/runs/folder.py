"""The folder of one run: what is written there while it trains and when it ends."""

from __future__ import annotations

import errno
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
from mrpo_lab.runs.reading import TRADE_OFFS, RunView, parse_config, parse_lines, read_sessions
from mrpo_lab.storage.checksums import (
    DamagedError,
    describe_file,
    read_bytes,
    sha256,
    write_json,
)
from mrpo_lab.storage.files import flush, local_path, naming, write_parquet, write_whole

logger = logging.getLogger(__name__)

COMPARED = TRADE_OFFS[0]
"""The table that ``mrpo_lab.merging`` adds to a finished run."""
DESCRIBED = (
    "config.yaml",
    "provenance.json",
    "metrics.jsonl",
    "alpha.parquet",
    "test_pairs.parquet",
    TRADE_OFFS[1],
)
"""Files of a finished run that ``result.json`` describes, beside those of ``adapter/``."""


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
        path = folder / "config.yaml"
        advice = "delete it; the same command goes on if its checkpoint is of this configuration"
        saved = parse_config(path, read_bytes(path, advice), advice)
        if saved is not None and (differing := difference(config, saved)):
            raise UserError(
                f"{folder} holds a run with another configuration ({'; '.join(differing)}): "
                "give this one a name of its own, name=NAME, or delete that folder"
            )
        return cls(folder, name, config)

    def finished(self) -> dict[str, Any] | None:
        """``result.json`` if the run is finished, else None.

        All files of a finished run are verified. If one is damaged the run counts as unfinished, so
        that it is written again from the last checkpoint.

        Raises:
            UserError: a file is damaged and there is no checkpoint.
        """
        run = RunView(self.folder)
        try:
            run.check()
        except DamagedError as error:
            if self.checkpoint.exists():
                logger.warning("%s", error)
                return None
            raise DamagedError(
                error.path, error.why, f"delete {self.folder} to train this run again"
            ) from error
        if run.result and run.files is None:
            logger.info("%s is of an earlier version, without checksums: unverified", self.folder)
        return run.result

    def check_inputs(self, *, finished: bool) -> None:
        """Refuse to show the result, or to go on, of a run that was made from other local files.

        The data of an unfinished run are compared by what is left of them after filtering: see
        ``Trainer.restore``.

        Raises:
            UserError: names the file that has changed.
        """
        if finished or self.checkpoint.exists():
            changed = changed_inputs(self.folder, self.config)
            if not finished:
                changed = [each for each in changed if not each.startswith("dataset.path: ")]
            if changed:
                state = "finished" if finished else "unfinished"
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
            with self.writing():
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
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room there" if full else f"look at {error.filename}"
            raise UserError(
                f"outputs: cannot write {self.folder}: {error.strerror}: {advice}; the same "
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
        with suppress(OSError):
            (self.folder / ".lock").unlink(missing_ok=True)
            for folder in [self.folder, *self.folder.parents][: self.name.count("/") + 1]:
                folder.rmdir()

    def begin(self, past: bytes) -> list[dict[str, Any]]:
        """Write the configuration and add this session to ``provenance.json``.

        Args:
            past: what ``metrics.jsonl`` is to begin with: see ``metrics_until``.

        Returns:
            The lines of ``past``.
        """
        config = yaml.safe_dump(self.config, sort_keys=False)
        path = self.folder / "metrics.jsonl"
        session = {**provenance(), "inputs": self.inputs}
        sessions = [*read_sessions(self.folder), session]
        lines = parse_lines(path, past)
        with self.writing():
            for outdated in ("result.json", COMPARED):
                (self.folder / outdated).unlink(missing_ok=True)
            write_whole(self.folder / "config.yaml", config.encode())
            write_json(self.folder / "provenance.json", {"sessions": sessions})
            write_whole(path, past)
        return lines

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``; values that are not finite become null."""
        line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.writing(), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")

    def flush_metrics(self) -> dict[str, Any]:
        """Have ``metrics.jsonl`` on the disk, and return its length and SHA-256, by which a
        checkpoint knows it."""
        path = self.folder / "metrics.jsonl"
        with self.writing():
            flush(path)
            return describe_file(path)

    def metrics_until(self, step: int, described: Mapping[str, Any] | None) -> bytes:
        """What ``metrics.jsonl`` held when the checkpoint after ``step`` was written.

        Args:
            described: what ``flush_metrics`` returned then; None for checkpoints of earlier
                versions, whose lines are told by their steps.

        Raises:
            UserError: the file does not begin with what it held then.
        """
        path = self.folder / "metrics.jsonl"
        advice = f"delete {self.folder} to train this run again"
        content = read_bytes(path, advice) or b""
        if described is None:
            steps = (line["step"] for line in parse_lines(path, content))
            raw = content.split(b"\n")[:-1]
            return b"".join(r + b"\n" for r, s in zip(raw, steps, strict=True) if s <= step)
        kept = content[: described["bytes"]]
        if sha256(kept) != described["sha256"]:
            raise DamagedError(path, f"it is not that of the checkpoint after step {step}", advice)
        return kept

    def write_alpha(self, slugs: Sequence[str]) -> None:
        """Write ``alpha.parquet`` from the metrics: one row per step, one column per reference."""
        import pyarrow as pa

        path = self.folder / "metrics.jsonl"
        lines = parse_lines(path, read_bytes(path) or b"")
        lines = [line for line in lines if f"alpha/{slugs[0]}" in line]
        columns = {"step": [int(line["step"]) for line in lines]}
        table = pa.table(columns | {s: [line[f"alpha/{s}"] for line in lines] for s in slugs})
        with self.writing():
            write_parquet(self.folder / "alpha.parquet", table)

    def describe_files(self) -> dict[str, dict[str, Any]]:
        """Length and SHA-256 of every file that is read once the run is finished, by its name."""
        adapter = sorted(self.folder.glob("adapter/**/*"))
        paths = [*(self.folder / name for name in DESCRIBED), *adapter]
        return {
            path.relative_to(self.folder).as_posix(): describe_file(path)
            for path in paths
            if path.is_file() and path.name != "README.md"  # a model card is for people to edit
        }

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``; ``status: finished`` in it marks the run as finished."""
        with self.writing():
            write_json(self.folder / "result.json", result)


def add_described_file(folder: Path, name: str) -> None:
    """Describe one more file of a finished run in its ``result.json``.

    Runs of earlier versions, which describe no files, stay as they are.

    Raises:
        OSError: a file cannot be read or written.
    """
    run = RunView(folder)
    if run.result is not None and run.files is not None:
        files = {**run.files, name: describe_file(folder / name)}
        write_json(folder / "result.json", {**run.result, "files": files})
