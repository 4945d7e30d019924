"""Trackers show the metrics of runs elsewhere, as on W&B. The files of the run are the original."""

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
"""Lines of ``metrics.jsonl``, each with its ``step``."""


FILES = ("provenance.json", "test_pairs.parquet", "trade_off.parquet")
"""Files of a run's folder that are uploaded to W&B, so that the report can be made from there."""


class Tracker(ABC):
    """Mirrors the metrics of one run. In processes other than the main one it does nothing."""

    @abstractmethod
    def start(self, folder: Path, identity: str, config: dict[str, Any], past: Lines) -> None:
        """Start a run or resume it.

        Args:
            folder: the folder of the run.
            identity: a name that stays the same when the run is resumed.
            config: the resolved configuration.
            past: lines that were logged before the run was interrupted, from step 0 up to the
                checkpoint from which it is resumed.
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step."""

    @abstractmethod
    def finish(self, result: Mapping[str, Any], failed: bool = False) -> None:
        """End the run; ``result`` becomes its summary."""


class LocalTracker(Tracker):
    """Tracks nothing: the run's own files have all numbers."""

    def start(self, folder: Path, identity: str, config: dict[str, Any], past: Lines) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def finish(self, result: Mapping[str, Any], failed: bool = False) -> None:
        pass


class WandbTracker(Tracker):
    """Weights & Biases: one W&B run for each training run, however often it is resumed.

    An interruption loses the lines that W&B has not yet written or sent. Therefore the server is
    asked how many lines it has, and offline a resumed run writes all of its lines into a new file,
    which replaces the old one.
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
            group=os.environ.get("WANDB_RUN_GROUP", self._group),  # a sweep sets the variable
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
        for line in past:  # null stands for a value that was not finite
            self._log({key: math.nan if value is None else value for key, value in line.items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log({"step": step, **metrics})

    def _log(self, line: Mapping[str, float]) -> None:
        # There is one line per step from 0 on: the server has those before ``starting_step``.
        if line["step"] >= self._run.starting_step:
            self._run.log(dict(line))

    def finish(self, result: Mapping[str, Any], failed: bool = False) -> None:
        self._run.summary.update(dict(result))
        for name in FILES:
            if (self._folder / name).exists():
                # W&B would link to the file instead, and warn about that in every run.
                copy = shutil.copy(self._folder / name, self._run.dir)
                self._run.save(copy, base_path=self._run.dir, policy="now")
        self._run.finish(exit_code=int(failed))


def wandb_mode() -> tuple[Any, str]:
    """The mode, and why it is offline: WANDB_MODE if set, else online with a key and a network."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode, f"WANDB_MODE is {mode}"
    if not wandb.setup().settings.api_key:
        return "offline", "no API key (wandb login)"
    server = str(wandb.setup().settings.base_url)
    if connection_error(server):
        return "offline", f"{urlsplit(server).hostname} cannot be reached"
    return "online", ""
