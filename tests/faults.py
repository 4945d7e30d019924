"""Faults at chosen moments: a process that is killed there, or that can write no more.

A longer series of trials calls ``killed`` and ``refused`` with moments of its own choice.
"""

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MAKING = ("os.rename", "os.mkdir", "os.truncate")
REMOVING = ("os.remove", "os.rmdir", "shutil.rmtree")
Work = Callable[[], object]


def on_change(folder: Path, then: Callable[[int, str, Path], None]) -> None:
    """Call ``then`` before every change below ``folder`` with its number, its kind and its path.

    A change is a file opened for writing, renamed or removed, or a folder made or removed. The hook
    stays for the life of the process, so this is for a child's.
    """
    inside, count = f"{folder.absolute()}{os.sep}", 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITING):
                return
        elif event in (*MAKING, *REMOVING):
            path = arguments[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(inside):
            count += 1
            then(count, event, Path(path))

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


def killed(work: Work, folder: Path, change: int = 0, seconds: float | None = None) -> bool:
    """Run ``work`` in a child that is killed before a change below ``folder``, or after a time.

    ``kill -9`` reaches no ``finally`` and writes no buffer.

    Args:
        change: number of the change, from 1.

    Returns:
        Whether it was killed; False if it ended before.
    """

    def die(number: int, kind: str, path: Path) -> None:
        if number == change:
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        on_change(folder, die)
        work()

    code, said = in_child(doomed, seconds)
    assert code in (0, -signal.SIGKILL), said
    return code != 0


def refused(work: Work, folder: Path, change: int, code: int = errno.ENOSPC) -> tuple[int, str]:
    """Run ``work`` in a child that can write nothing below ``folder`` from a change on.

    Args:
        code: of the error; a full disk (ENOSPC) still removes files, one that is read-only (EROFS)
            does not.

    Returns:
        The exit code and the output; 0 if there were not so many changes.
    """

    def refuse(number: int, kind: str, path: Path) -> None:
        if number >= change and (kind not in REMOVING or code != errno.ENOSPC):
            raise OSError(code, os.strerror(code), str(path))

    def doomed() -> None:
        on_change(folder, refuse)
        work()

    return in_child(doomed)


def changes(work: Work, folder: Path) -> int:
    """The number of changes below ``folder`` that ``work`` makes, in a child."""
    counted = Path(tempfile.mkdtemp()) / "changes"

    def counting() -> None:
        on_change(folder, lambda number, *_: counted.write_text(str(number)) and None)
        work()

    code, said = in_child(counting)
    assert code == 0, said
    return int(counted.read_text())
