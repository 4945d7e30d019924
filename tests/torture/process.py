"""A command line in a fork of this process, which has already imported what takes seconds."""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, TINY
from hydra.core.global_hydra import GlobalHydra

PATIENCE = 120.0
"""Seconds after which a command counts as hanging."""


class BrokenError(Exception):
    """Something did not hold that should have."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended: what somebody at a terminal sees."""

    words: Sequence[str]
    code: int
    """The exit code; minus the signal's number if one ended the command."""
    out: str
    err: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def __str__(self) -> str:
        return f"{short(self.words)}\nexit code {self.code}\n{self.err[-900:]}"


def short(words: Sequence[str]) -> str:
    """A command line in which TINY stands for the overrides that nearly all have."""
    own = [word for word in words if word not in TINY]
    return " ".join([own[0], "TINY", *own[1:]] if len(own) < len(words) else own)


class Command:
    """``python WORDS``, begun in a fork. The first word is ``train.py`` or the name of a module."""

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        log: Path,
        environment: Mapping[str, str],
        before: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            log: where the output is kept, with the endings ``.out`` and ``.err``.
            before: called in the fork before the command begins.
        """
        self.words, self._log = words, log
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become(words, cwd, log, environment, before)
            finally:
                os._exit(70)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def kill_after(self, seconds: float) -> Finished:
        """Kill the command unless it ends before."""
        if (status := self._poll(seconds)) is None:
            self.kill()
            _, status = os.waitpid(self.pid, 0)
        return self._finished(status)

    def wait(self) -> Finished:
        """Wait for the end.

        Raises:
            BrokenError: the command hangs.
        """
        if (status := self._poll(PATIENCE)) is None:
            self.kill()
            _, status = os.waitpid(self.pid, 0)
            raise BrokenError(f"it hangs, for {PATIENCE:.0f} s by now: {self._finished(status)}")
        return self._finished(status)

    def _poll(self, seconds: float) -> int | None:
        until = self._began + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.002)
        return None

    def _finished(self, status: int) -> Finished:
        out, err = (
            self._log.with_name(f"{self._log.name}{end}").read_text(errors="replace")
            for end in (".out", ".err")
        )
        took = time.monotonic() - self._began
        return Finished(self.words, os.waitstatus_to_exitcode(status), out, err, took)


def _become(
    words: Sequence[str],
    cwd: Path,
    log: Path,
    environment: Mapping[str, str],
    before: Callable[[], object] | None,
) -> None:
    """Run the command in this process, and exit as Python would."""
    os.chdir(cwd)
    os.environ.update(environment)
    tempfile.tempdir = None  # the parent has asked for TMPDIR before
    for descriptor, name in ((0, os.devnull), (1, f"{log}.out"), (2, f"{log}.err")):
        file = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = list(words)
    GlobalHydra.instance().clear()
    if before is not None:
        before()
    code = 0
    try:
        if words[0] == "train.py":
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        else:
            sys.modules.pop(f"{words[0]}.__main__", None)
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
