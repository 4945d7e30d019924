"""What the programs have in common: one-line errors and exit codes."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec

from mrpo_lab.console import printable
from mrpo_lab.errors import UserError
from mrpo_lab.redaction import redact

Parameters = ParamSpec("Parameters")

GRACE = 20.0
"""Seconds for the main process to close a failed run before another process exits."""


def exit_on_user_error(main: Callable[Parameters, int]) -> Callable[Parameters, int]:
    """Decorate a program's main function, which returns the exit code.

    A ``UserError``, and a file that cannot be read or written, is printed as one line on stderr and
    becomes exit code 2; Ctrl-C becomes 130.
    """

    @wraps(main)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            fail(str(error))
            return 2
        except OSError as error:
            if error.filename is None:
                raise
            fail(unreadable(error))
            return 2
        except KeyboardInterrupt:
            return 130

    return wrapped


def fail(message: str) -> None:
    """Print an error in one line to stderr, if possible from the main process only."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # A launcher kills all processes when one exits. Give the main process, which usually fails
        # with the same error, the time to close its files and print it.
        time.sleep(GRACE)
        message = f"process {rank}: {message}"
    print(f"error: {printable(redact(message))}", file=sys.stderr, flush=True)


def unreadable(error: OSError) -> str:
    """One line for a file that cannot be read or written."""
    return f"{error.filename}: {error.strerror}"


def near(word: str, options: Sequence[str]) -> str:
    """The end of an error message: ``, did you mean X? choose from ...``; empty without options.

    A guess is made only if some option is similar to ``word``.
    """
    if not options:
        return ""
    close = difflib.get_close_matches(word, options, n=1)
    guess = f", did you mean {close[0]}?" if close else ":"
    return f"{guess} choose from {', '.join(sorted(options))}"
