"""Trackers show the metrics of runs elsewhere, as on W&B. The files of the run are the original."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage.network import connection_error

logger = logging.getLogger(__name__)

Lines = Sequence[Mapping[str, float | None]]
"""Lines of ``metrics.jsonl``, each with its ``step``."""

MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "shared": "shared",
    "run": "online",
    "dryrun": "offline",
}
"""Values of WANDB_MODE, and what they mean: the last two are old names."""
FORBIDDEN = r"/\#?%:"
"""Characters that W&B refuses in the name of a project."""
FILES = ("provenance.json", "test_pairs.parquet", "trade_off.parquet")
"""Files of a run's folder that are uploaded to W&B, so that the report can be made from there."""


class Tracker(ABC):
    """Mirrors the metrics of one run. In processes other than the main one it does nothing."""

    @abstractmethod
    def check(self) -> None:
        """Refuse what the environment would make impossible, before anything is computed.

        Raises:
            ValueError: in one line, what is wrong and what to do.
        """

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

    def check(self) -> None:
        pass

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
        self._run: Any = None
        """None before the run begins, and where W&B is disabled."""
        if not 1 <= len(project) <= 128 or set(project) & set(FORBIDDEN):
            raise ValueError(
                f"project: W&B takes up to 128 characters, none of {' '.join(FORBIDDEN)}, got "
                f"{project!r}; a team is tracker.entity=TEAM"
            )
        if entity is not None and not re.fullmatch(r"[\w.-]{1,128}", entity, re.ASCII):
            raise ValueError(
                f"entity: W&B takes letters, digits and the characters _ . -, got {entity!r}"
            )
        for tag in self._tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(
                    f"tags: W&B takes 1 to 64 characters for a tag, got {len(tag)}: {tag!r}"
                )

    def check(self) -> None:
        mode, _ = wandb_mode()
        if mode in ("offline", "disabled"):
            return
        import wandb

        try:
            wandb.login(verify=True)  # asks for a key where there is a terminal
        except (wandb.errors.Error, OSError) as error:
            raise ValueError(
                f"W&B cannot be used: {first_line(error)}: wandb login, or set WANDB_MODE=offline"
            ) from error

    def start(self, folder: Path, identity: str, config: dict[str, Any], past: Lines) -> None:
        mode, reason = wandb_mode()
        if mode == "disabled":
            logger.info("W&B: %s, so this run is not tracked", reason)
            return
        import wandb

        self._folder = folder
        # W&B logs into the folder. If its disk is full, logging would print a traceback a line.
        logging.raiseExceptions = False
        if mode == "offline":
            logger.info(
                "W&B: %s, so this run is kept offline; later: wandb sync %s/wandb/offline-run-*",
                reason,
                folder,
            )
        for former in folder.glob("wandb/offline-run-*"):
            shutil.rmtree(former)
        try:
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
        except wandb.errors.Error as error:
            raise UserError(
                f"tracker: W&B cannot begin this run: {first_line(error)}: set WANDB_MODE=offline, "
                "or tracker=local"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for line in past:  # null stands for a value that was not finite
            self._log({key: math.nan if value is None else value for key, value in line.items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log({"step": step, **metrics})

    def _log(self, line: Mapping[str, float]) -> None:
        # There is one line per step from 0 on: the server has those before ``starting_step``.
        if self._run is not None and line["step"] >= self._run.starting_step:
            self._run.log(dict(line))

    def finish(self, result: Mapping[str, Any], failed: bool = False) -> None:
        if self._run is None:
            return
        self._run.summary.update(dict(result))
        try:
            for name in FILES:
                if (self._folder / name).exists():
                    # W&B would link to the file instead, and warn about that in every run.
                    copy = shutil.copy(self._folder / name, self._run.dir)
                    self._run.save(copy, base_path=self._run.dir, policy="now")
        finally:  # also on a full disk
            self._run.finish(exit_code=int(failed))


def wandb_mode() -> tuple[Any, str]:
    """The mode and the reason for it: WANDB_MODE if set, else online with a key and a network.

    Raises:
        ValueError: WANDB_MODE, or another variable that W&B reads, has a value that it refuses.
    """
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "on", "true", "yes"):
        return "disabled", "WANDB_DISABLED is set"
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in MODES:
        raise ValueError(f"WANDB_MODE is {mode!r}: choose from {', '.join(MODES)}")
    if mode and MODES[mode] == "disabled":
        return "disabled", "WANDB_MODE is disabled"
    settings = _settings()
    if mode:
        return MODES[mode], f"WANDB_MODE is {mode}"
    if not settings.api_key:
        return "offline", "no API key (wandb login)"
    server = str(settings.base_url)
    if connection_error(server):
        return "offline", f"{urlsplit(server).hostname} cannot be reached"
    return "online", ""


def _settings() -> Any:
    """W&B's settings, which it reads from the environment and from files of its own."""
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # as from an unset shell variable; W&B would refuse it
    import wandb
    from pydantic import ValidationError

    try:
        return wandb.setup(settings=wandb.Settings(silent=True)).settings
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ValueError(f"W&B refuses the setting {key}: {problem['msg']}") from error
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(f"W&B refuses its settings: {first_line(error)}") from error
