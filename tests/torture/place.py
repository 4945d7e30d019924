"""The folder of one trial: commands that run there, and what must hold of how they end."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from harness import TINY, equal

from mrpo_lab.training.state_file import load_state
from torture.events import count_events
from torture.process import BrokenError, Command, Finished, short

TIMES = ("wall_seconds", "pairs_per_second", "setup_seconds", "peak_memory_gib")
STATE = ("optimizer", "scheduler", "weighting", "lambda", "trainable")
DIGEST = re.compile(r"[0-9a-f]{16,}")
ESCAPE = "\x1b"
SCORED = ("scores", "gate", "lengths", "truncations", "conformance", "hashes", "sha256", "scored")
"""Folders of the cache beside the models."""


class SkippedError(Exception):
    """The trial cannot be made here; says why."""


@dataclass(frozen=True)
class Reference:
    """What a command leaves behind when nothing happens to it."""

    folder: Path
    """Of the run."""
    seconds: float
    events: int
    """How often it changes files."""


@dataclass
class Place:
    """A folder of its own for one trial: ``work``, where commands run, ``cache`` and ``tmp``."""

    folder: Path
    base: Path
    """Shared by all trials: ``cache``, with models and scores, and uninterrupted runs."""
    short: bool
    """Whether the trials of this session shall be the shorter ones."""
    notes: list[str] = field(default_factory=list)
    """What was done, for the report of a failure."""

    def __post_init__(self) -> None:
        self.work, self.cache, self.tmp = (self.folder / n for n in ("work", "cache", "tmp"))
        for folder in (self.work, self.cache, self.tmp):
            folder.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count()
        if not (self.cache / "models").exists():
            (self.cache / "models").symlink_to((self.base / "cache" / "models").resolve())

    def take_scores(self, cache: Path | None = None) -> None:
        """Begin with the scores and token counts of a cache, by default of the shared one."""
        for name in SCORED:
            source = (cache or self.base / "cache") / name
            if source.is_dir():
                shutil.copytree(source, self.cache / name, dirs_exist_ok=True)

    def start(
        self, *words: str, before: Callable[[], object] | None = None, **environment: str
    ) -> Command:
        """Begin ``python WORDS`` in ``work``."""
        self.notes.append(short(words))
        surroundings = {
            "MRPO_LAB_CACHE": str(self.cache),
            "TMPDIR": str(self.tmp),
            "HOME": str(self.folder),
            "WANDB_MODE": "offline",
            **environment,
        }
        log = self.folder / f"command{next(self._numbers)}"
        return Command(words, self.work, log, surroundings, before)

    def train(
        self, *overrides: str, before: Callable[[], object] | None = None, **environment: str
    ) -> Finished:
        """``python train.py`` on the tiny models and data, until it ends."""
        return self.start("train.py", *TINY, *overrides, before=before, **environment).wait()

    @property
    def runs(self) -> list[Path]:
        """Folders of runs."""
        return sorted(path.parent for path in self.work.rglob("config.yaml"))

    def reference(self, *overrides: str) -> Reference:
        """The same command, undisturbed; run once for all trials."""
        name = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:12]
        folder = self.base / "references" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "measured.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                place = Place(folder, self.base, self.short)
                place.take_scores()
                events = folder / "events"
                done = succeeded(place.train(*overrides, before=lambda: count_events(events)))
                numbers = {"seconds": done.seconds, "events": int(events.read_text())}
                (folder / "measured.json").write_text(json.dumps(numbers))
        (run,) = Place(folder, self.base, self.short).runs
        return Reference(run, **json.loads((folder / "measured.json").read_text()))

    def ends_like(self, reference: Reference) -> None:
        """The only run here is what the undisturbed one is, and no draft is left.

        Raises:
            BrokenError: names what differs.
        """
        (run,) = self.runs
        same_runs(run, reference.folder)
        self.no_drafts()

    def no_drafts(self) -> None:
        """No file that was being written is left.

        Raises:
            BrokenError: names those that are.
        """
        drafts = [path for path in self.work.rglob(".*.tmp") if "wandb" not in path.parts]
        drafts += [path for name in SCORED for path in (self.cache / name).rglob(".*.tmp")]
        if drafts or any(self.tmp.iterdir()):
            left = [str(path.relative_to(self.folder)) for path in drafts]
            left += [f"tmp/{path.name}" for path in self.tmp.iterdir()]
            raise BrokenError(f"files are left: {', '.join(left)}")


def succeeded(done: Finished) -> Finished:
    """Exit code 0 and nothing but progress on stderr.

    Raises:
        BrokenError: shows the output.
    """
    if done.code != 0 or "Traceback" in done.err:
        raise BrokenError(f"expected success: {done}")
    return done


def refused(done: Finished) -> str:
    """The only line on stderr, which says what the user can do, of a command with exit code 2.

    Raises:
        BrokenError: it ended in another way, or says more or less.
    """
    lines = [line for line in re.split(r"[\r\n]", done.err) if line.strip() and "%|" not in line]
    if done.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        raise BrokenError(f"expected exit code 2 and one line: {done}")
    if ESCAPE in done.err + done.out:
        raise BrokenError(f"an escape sequence reached the terminal: {lines[0]!r}")
    return lines[0].removeprefix("error: ")


def same_runs(one: Path, other: Path) -> None:
    """Two runs left the same files, times excepted.

    Raises:
        BrokenError: names the file that differs.
    """
    names = [set(_compared(run)) for run in (one, other)]
    if names[0] != names[1]:
        raise BrokenError(f"other files than expected: {sorted(names[0] ^ names[1])}")
    for name in sorted(names[0]):
        if content(one / name) != content(other / name):
            raise BrokenError(f"{name} differs from that of an undisturbed run in {other}")
    states = [load_state(run / "checkpoint" / "state.safetensors") for run in (one, other)]
    for key in STATE:
        if not equal(states[0][key], states[1][key]):
            raise BrokenError(f"{key} of the checkpoint differs from that in {other}")


def _compared(run: Path) -> Iterator[str]:
    """Names of a run's files whose content no clock decides, and not the checkpoint."""
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_file() and not name.startswith(("wandb", "checkpoint", "provenance", ".")):
            yield name


def content(path: Path) -> Any:
    """What a file says that neither the clock nor a digest of times decides."""
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    if path.name == "result.json":
        result = json.loads(path.read_text())
        # ``files`` has the lengths and digests of files in which times are.
        return _without_digests({k: v for k, v in result.items() if k not in (*TIMES, "files")})
    # peft writes the absolute path of the base model, which is in the cache of the trial.
    return re.sub(rb'[^\s"]*(/cache/models)', rb"\1", path.read_bytes())


def _without_digests(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_digests(v) for k, v in value.items() if not _is_digest(v)}
    return value


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value.rpartition(":")[2]) is not None
