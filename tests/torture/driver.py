"""Shares the time among the kinds of trials, and the trials among the cores."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from torture.place import Place, SkippedError
from torture.process import BrokenError

KINDS = {
    "kill": "kill -9 during training, evaluation, checkpoint, tracker",
    "scoring": "kill -9 during scoring by several processes",
    "damage": "damaged files of cache, run and models",
    "sweep": "damaged files of a sweep",
    "disk": "disk full or read-only",
    "overrides": "random overrides",
    "data": "malformed data files",
    "hostile": "hostile `_target_`s, Hydra keys and texts",
    "memory": "out of memory",
    "sequence": "many runs in one process",
    "mistakes": "mistakes of a first user",
}
PATIENCE = 400.0
"""Seconds after which a trial counts as hanging."""
SHOWN = 14
"""Lines that are printed of a trial that did not hold; all of them are in its ``broken.txt``."""


@dataclass
class Tally:
    """What was tried of one kind."""

    tried: int = 0
    held: int = 0
    seconds: float = 0.0
    skipped: str = ""
    """Why no trial of this kind can be made here."""
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Session:
    """One call of ``python -m torture``."""

    folder: Path
    """Of all trials; those that held are removed."""
    base: Path
    seed: int
    short: bool

    def trial(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number}"

    def start(self, kind: str, number: int) -> int:
        """Make one trial in a fork, in a session of processes of its own; returns its id."""
        pid = os.fork()
        if pid == 0:
            os.setsid()
            verdict: dict[str, str] = {}
            try:
                self._run(kind, number, verdict)
            finally:
                file = self.trial(kind, number) / "verdict.json"
                file.write_text(json.dumps(verdict))
                sys.stdout.flush()
                os._exit(0)
        return pid

    def _run(self, kind: str, number: int, verdict: dict[str, str]) -> None:
        place = Place(self.trial(kind, number), self.base, self.short)
        try:
            module = importlib.import_module(f"torture.kinds.{kind}")
            module.trial(place, Random(f"{self.seed} {kind} {number}"))
        except SkippedError as reason:
            verdict["skipped"] = str(reason)
        except BrokenError as broken:
            verdict["broken"] = "\n".join([*place.notes, str(broken)])
        except BaseException:
            verdict["broken"] = "\n".join([*place.notes, traceback.format_exc()])
        if "broken" in verdict:
            (place.folder / "broken.txt").write_text(verdict["broken"] + "\n")

    def judge(self, kind: str, number: int, tally: Tally) -> None:
        """Count a trial that has ended, and remove its folder if everything held."""
        folder = self.trial(kind, number)
        try:
            verdict = json.loads((folder / "verdict.json").read_text())
        except (OSError, ValueError):
            verdict = {"broken": f"the trial hung for {PATIENCE:.0f} s or died"}
        if "skipped" in verdict:
            tally.skipped = verdict["skipped"]
        else:
            tally.tried += 1
            if "broken" in verdict:
                again = f"--kinds {kind} --seed {self.seed} --trial {number}"
                last = verdict["broken"].strip().splitlines()[-SHOWN:]
                tally.failures.append(f"{again}\n  {folder}\n  " + "\n  ".join(last))
                return
            tally.held += 1
        shutil.rmtree(folder, ignore_errors=True)


def share(session: Session, kinds: Sequence[str], seconds: float, cores: int) -> dict[str, Tally]:
    """Make trials until the time is over. The kind that has had the least of it comes next."""
    tallies = {kind: Tally() for kind in kinds}
    began = time.monotonic()
    running: dict[int, tuple[str, int, float]] = {}
    numbers = dict.fromkeys(kinds, 0)
    while True:
        over = time.monotonic() - began > seconds
        while not over and len(running) < cores:
            ready = [kind for kind in kinds if not tallies[kind].skipped]
            if not ready:
                break
            kind = min(ready, key=lambda each: _spent(tallies[each], each, running))
            running[session.start(kind, numbers[kind])] = (kind, numbers[kind], time.monotonic())
            numbers[kind] += 1
        if not running:
            return tallies
        _reap(session, tallies, running)


def _spent(tally: Tally, kind: str, running: dict[int, tuple[str, int, float]]) -> float:
    now = time.monotonic()
    return tally.seconds + sum(now - since for name, _, since in running.values() if name == kind)


def _reap(
    session: Session, tallies: dict[str, Tally], running: dict[int, tuple[str, int, float]]
) -> None:
    """Count the trials that have ended, and end those that hang."""
    time.sleep(0.005)
    for pid, (kind, number, since) in list(running.items()):
        took = time.monotonic() - since
        if took > PATIENCE:
            os.killpg(pid, signal.SIGKILL)
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it may have left running
            del running[pid]
            tallies[kind].seconds += took
            before = len(tallies[kind].failures)
            session.judge(kind, number, tallies[kind])
            for failure in tallies[kind].failures[before:]:
                print(f"did not hold: {failure}\n", flush=True)


def table(tallies: dict[str, Tally]) -> str:
    """What was tried and what held, as Markdown."""
    lines = ["| trial | tried | held |", "| --- | --- | --- |"]
    for kind, tally in tallies.items():
        counts = f"{tally.tried} | {tally.held}"
        if tally.skipped and not tally.tried:
            counts = f"skipped: {tally.skipped} |"
        lines.append(f"| {KINDS[kind]} (`{kind}`) | {counts} |")
    return "\n".join(lines)
