"""The command line around Hydra: one-line errors, exit codes, and ``seed=0`` for ``seed=s0``."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mrpo_lab.errors import UserError
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.storage.files import local_path

Parameters = ParamSpec("Parameters")

# Hydra makes folders before this project sees the configuration: conf/config.yaml names them so.
OmegaConf.register_new_resolver("local_path", lambda text: str(local_path(text)), replace=True)

GRACE = 20.0
"""Seconds for the main process to close a failed run before another process exits."""


def run_cli(hydra_main: Callable[[], object]) -> None:
    """Run a ``@hydra.main`` function, and exit with code 2 and one line for mistakes of the user.

    An interruption by Ctrl-C exits with code 130.
    """
    if "HYDRA_FULL_ERROR" not in os.environ:
        # With it, Hydra raises its errors instead of printing them over many lines.
        os.environ["HYDRA_FULL_ERROR"] = "1"
    quiet_libraries()
    sys.argv[1:] = [named_seed(argument) for argument in sys.argv[1:]]
    try:
        hydra_main()
    except UserError:
        sys.exit(2)  # its message was printed where it was raised: see train.py
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
        sys.exit(2)
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):
            raise
        fail(f"{error}: options of a group are names, as in loss=mdpo or seed=s0")
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        fail(unreadable(error))
        sys.exit(2)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on from the last checkpoint")
        sys.exit(130)


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
    print(f"error: {message}", file=sys.stderr, flush=True)


def unreadable(error: OSError) -> str:
    """One line for a file that cannot be read or written."""
    return f"{error.filename}: {error.strerror}"


def path_argument(text: str) -> Path:
    """A path on the command line, for argparse: ``~`` is the home folder.

    Raises:
        argparse.ArgumentTypeError: the text is empty.
    """
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def named_seed(argument: str) -> str:
    """Rewrite ``seed=0,1`` to ``seed=s0,s1``: Hydra refuses integers as names of options."""
    key, _, value = argument.partition("=")
    if key == "seed" and re.fullmatch(r"\d+(,\d+)*", value):
        return "seed=" + ",".join(f"s{number}" for number in value.split(","))
    return argument


def explain(error: Exception) -> str:
    """One line for an error that Hydra or OmegaConf raised about the configuration."""
    if isinstance(error, MissingConfigException) and error.options:
        wanted = str(error.missing_cfg_file)
        group, _, option = wanted.rpartition("/")
        return f"{group}={option}: no such option{near(option, error.options)}"
    if ambiguous := re.match("Ambiguous value for argument '(.+)'", str(error)):
        return (
            f"{ambiguous[1]}: several values; to run each of them, begin with -m; "
            f"if it is one value, {quoting_advice(ambiguous[1])}"
        )
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value: {quoting_advice(error.override)}"
    cause = error.__cause__
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        # Hydra suggests +key, which adds a second key beside the one that was meant.
        siblings = cause.parent_node if isinstance(cause.parent_node, DictConfig) else ()
        options = [str(key) for key in siblings if not str(key).startswith("_")]
        return f"{cause.full_key}: no such key{near(str(cause.key), options)}"
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key", "object_type"))]
    return " ".join(dict.fromkeys(kept))


def quoting_advice(override: str) -> str:
    """How to write an override whose value has characters that Hydra's grammar gives a meaning."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"give a value, {key}=VALUE"
    if not re.fullmatch(r"[+~]*[\w./@-]+", key):
        return "a key has only letters, digits and the characters _ . / @ -"
    if value.startswith(("[", "{")):
        return f"quote the texts in it, as in '{key}={value[0]}\"...\" ...', and close all brackets"
    # In Hydra's quotes, backslashes count only before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value)
    quoted = f'{key}="{escaped}"'
    return f"quote the value, as in {shlex.quote(quoted)}"


def near(word: str, options: Sequence[str]) -> str:
    """The end of an error message: ``, did you mean X? choose from ...``; empty without options.

    A guess is made only if some option is similar to ``word``.
    """
    if not options:
        return ""
    close = difflib.get_close_matches(word, options, n=1)
    guess = f", did you mean {close[0]}?" if close else ":"
    return f"{guess} choose from {', '.join(sorted(options))}"
