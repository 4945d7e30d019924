"""Where a run's numbers are shown. The run's own files are the truth; a tracker mirrors them."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mrpo_lab.storage.network import connection_error

logger = logging.getLogger(__name__)

Lines = Sequence[Mapping[str, float | None]]
"""Of ``metrics.jsonl``, each with its ``step``."""


FILES = ("provenance.json", "test_pairs.parquet", "trade_off.parquet")
"""Of a run's folder: what W&B keeps beside the numbers, for the report."""


class Tracker(ABC):
    """A mirror of one run. Only the main process has one that does anything."""

    @abstractmethod
    def start(self, folder: Path, identity: str, config: dict[str, Any], past: Lines) -> None:
        """``identity``: what stays the same when the run is resumed. ``past``: the lines that were
        logged before it was interrupted, from step 0, as far as they are still true."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    @abstractmethod
    def finish(self, result: Mapping[str, Any], failed: bool = False) -> None:
        """``result`` becomes the summary."""


class LocalTracker(Tracker):
    """Files alone."""

    def start(self, folder: Path, identity: str, config: dict[str, Any], past: Lines) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def finish(self, result: Mapping[str, Any], failed: bool = False) -> None:
        pass


class WandbTracker(Tracker):
    """Weights & Biases: one W&B run for each training run, however often it is resumed.

    An interruption takes with it what W&B had not yet written or sent. So nothing is assumed to be
    there: online, the server says how many lines it has; offline, a resumed run writes all of them
    into a new file, which replaces the former ones.
    """

    def __init__(
        self,
        project: str = "mrpo-lab",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self._project, self._entity, self._group = project, entity, group
        self._tags = tags or []

    def start(self, folder: Path, identity: str, config: dict[str, Any], past: Lines) -> None:
        import wandb

        self._folder = folder
        mode, reason = wandb_mode()
        if mode == "offline":
            logger.info(
                "W&B: %s, so this run is kept offline; later: wandb sync %s/wandb/offline-run-*",
                reason,
                folder,
            )
        for former in folder.glob("wandb/offline-run-*"):
            shutil.rmtree(former)
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            group=os.environ.get("WANDB_RUN_GROUP", self._group),  # a sweep's, if it is of one
            id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            name=identity,
            tags=self._tags,
            config=config,
            dir=folder,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for line in past:  # where null is what was not finite
            self._log({key: math.nan if value is None else value for key, value in line.items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log({"step": step, **metrics})

    def _log(self, line: Mapping[str, float]) -> None:
        # A line a step from 0: what the server has are the lines before its next one.
        if line["step"] >= self._run.starting_step:
            self._run.log(dict(line))

    def finish(self, result: Mapping[str, Any], failed: bool = False) -> None:
        self._run.summary.update(dict(result))
        for name in FILES:
            if (self._folder / name).exists():
                # A link, which is W&B's way, is followed by a warning on every run.
                copy = shutil.copy(self._folder / name, self._run.dir)
                self._run.save(copy, base_path=self._run.dir, policy="now")
        self._run.finish(exit_code=int(failed))


def wandb_mode() -> tuple[Any, str]:
    """(mode, why it is offline): what WANDB_MODE says, else online with a key and a network."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode, f"WANDB_MODE is {mode}"
    if not wandb.setup().settings.api_key:
        return "offline", "no API key (wandb login)"
    server = str(wandb.setup().settings.base_url)
    if connection_error(server):
        return "offline", f"{urlsplit(server).hostname} cannot be reached"
    return "online", ""
