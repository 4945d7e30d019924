"""The command line around Hydra: small conveniences, and errors in one line."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mrpo_lab.errors import UserError
from mrpo_lab.progress import quiet_libraries

Parameters = ParamSpec("Parameters")

GRACE = 20.0
"""Seconds that the main process has to close a failed run before the others end."""


def run_cli(hydra_main: Callable[[], object]) -> None:
    """Run a ``@hydra.main`` function; exit with 2 and one line on what the user can mend."""
    if "HYDRA_FULL_ERROR" not in os.environ:
        # Hydra then raises its errors instead of printing them over many lines.
        os.environ["HYDRA_FULL_ERROR"] = "1"
    quiet_libraries()
    sys.argv[1:] = [named_seed(argument) for argument in sys.argv[1:]]
    try:
        hydra_main()
    except UserError:
        sys.exit(2)  # a run of a sweep has printed it
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
        fail(f"{error.filename}: {error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on from the last checkpoint")
        sys.exit(130)


def exit_on_user_error(main: Callable[Parameters, int]) -> Callable[Parameters, int]:
    """Decorate a program's main function, which returns the exit code.

    A ``UserError`` is printed as one line on stderr and becomes exit code 2; Ctrl-C becomes 130.
    """

    @wraps(main)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            fail(str(error))
            return 2
        except KeyboardInterrupt:
            return 130

    return wrapped


def fail(message: str) -> None:
    """Print one line to stderr, once for all processes of a run."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # A launcher ends all processes as soon as one has ended. The main one still has files to
        # close before it says the same; if it has nothing to say, this one has to.
        time.sleep(GRACE)
        message = f"process {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)


def named_seed(argument: str) -> str:
    """``seed=0,1`` as ``seed=s0,s1``: Hydra refuses integers as options of a group."""
    key, _, value = argument.partition("=")
    if key == "seed" and re.fullmatch(r"\d+(,\d+)*", value):
        return "seed=" + ",".join(f"s{number}" for number in value.split(","))
    return argument


def explain(error: Exception) -> str:
    """Another library's message about the configuration in one line."""
    if isinstance(error, MissingConfigException) and error.options:
        wanted = str(error.missing_cfg_file)
        group, _, option = wanted.rpartition("/")
        return f"{group}={option}: no such option{near(option, error.options)}"
    if ambiguous := re.match("Ambiguous value for argument '(.+)'", str(error)):
        return f"{ambiguous[1]}: several values; to run each of them, begin with -m"
    if isinstance(error, OverrideParseException):
        said = [line for line in str(error).splitlines() if re.match(r"(?!See )\w", line)]
        return f"{error.override}: cannot be read as key=value: {said[-1]}"
    cause = error.__cause__
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        # Hydra would suggest +key, which adds it beside the key that was meant.
        siblings = cause.parent_node if isinstance(cause.parent_node, DictConfig) else ()
        options = [str(key) for key in siblings if not str(key).startswith("_")]
        return f"{cause.full_key}: no such key{near(str(cause.key), options)}"
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key", "object_type"))]
    return " ".join(dict.fromkeys(kept))


def near(word: str, options: Sequence[str]) -> str:
    """``, did you mean X? choose from ...``; nothing without options."""
    if not options:
        return ""
    close = difflib.get_close_matches(word, options, n=1)
    guess = f", did you mean {close[0]}?" if close else ":"
    return f"{guess} choose from {', '.join(sorted(options))}"
