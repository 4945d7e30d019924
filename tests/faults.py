"""Faults at chosen moments: a process that is killed there, or that can write no more.

A longer series of trials calls ``survives`` and ``refused`` with moments of its own choice.
"""

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MAKING = ("os.rename", "os.mkdir", "os.truncate")
REMOVING = ("os.remove", "os.rmdir", "shutil.rmtree")
Work = Callable[[], object]
Moment = float | int | tuple[str, int]
"""When a fault comes: after seconds; before a change, by its number from 1; or before the n-th
change of a path that a pattern matches."""


def before(folder: Path, moment: int | tuple[str, int], then: Callable[[str, Path], None]) -> None:
    """Call ``then`` with the kind and the path of every change below ``folder`` from ``moment`` on.

    A change is a file opened for writing, renamed or removed, or a folder made or removed; ``then``
    comes first. The hook stays for the life of the process, so this is for a child's.
    """
    inside, count, reached = f"{folder.absolute()}{os.sep}", 0, False
    pattern, number = moment if isinstance(moment, tuple) else ("*", moment)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count, reached
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITING):
                return
        elif event in (*MAKING, *REMOVING):
            path = arguments[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(inside):
            count += fnmatch(os.path.abspath(path), pattern)
            reached = reached or count >= number
            if reached:
                then(event, Path(path))

    sys.addaudithook(hook)


def in_child(work: Work, dies_after: float | None = None) -> tuple[int, str]:
    """Run ``work`` in a forked process, which has imported everything already.

    Args:
        dies_after: seconds until ``kill -9``.

    Returns:
        The exit code (negative: the signal that ended it), and what it wrote to stdout and stderr.
    """
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = os.fork()
        if not child:
            _run_and_exit(work, output.fileno())
        clock = threading.Timer(dies_after or 0, os.kill, (child, signal.SIGKILL))
        if dies_after is not None:
            clock.start()
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its number stays its own
        clock.cancel()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()


def _run_and_exit(work: Work, output: int) -> None:
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
        work()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed(work: Work, folder: Path, moment: Moment) -> bool:
    """Run ``work`` in a child that is killed at a moment of its changes below ``folder``.

    ``kill -9`` reaches no ``finally`` and writes no buffer.

    Returns:
        Whether it was killed; False if it ended before.
    """

    def die(kind: str, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        if not isinstance(moment, float):
            before(folder, moment, die)
        work()

    code, said = in_child(doomed, moment if isinstance(moment, float) else None)
    assert code in (0, -signal.SIGKILL), said
    return code != 0


def survives(work: Work, folder: Path, moments: Iterable[Moment]) -> int:
    """Kill one session of ``work`` after the other, each at its moment, and let the last one end.

    Returns:
        How many sessions were killed; the others ended before their moment.
    """
    kills = sum(killed(work, folder, moment) for moment in moments)
    code, said = in_child(work)
    assert code == 0, said
    return kills


def refused(
    work: Work, folder: Path, moment: int | tuple[str, int], code: int = errno.ENOSPC
) -> tuple[int, str]:
    """Run ``work`` in a child that can write nothing below ``folder`` from a moment on.

    Args:
        code: of the error; a full disk (ENOSPC) still removes files, one that is read-only (EROFS)
            does not.

    Returns:
        The exit code and the output.
    """

    def refuse(kind: str, path: Path) -> None:
        if kind not in REMOVING or code != errno.ENOSPC:
            raise OSError(code, os.strerror(code), str(path))

    def doomed() -> None:
        before(folder, moment, refuse)
        work()

    return in_child(doomed)
