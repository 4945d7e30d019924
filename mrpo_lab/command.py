"""The command line of ``train.py``: Hydra's, with one line for every mistake."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mrpo_lab.cli import fail, near, unreadable
from mrpo_lab.composition import open_hydra, without_hydra
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.progress import quiet_libraries

Task = Callable[[DictConfig], float]
"""What is run with a composed configuration."""
OWN = {
    "dataset": "a file of your own is dataset=jsonl dataset.path={}",
    "model": "a model of the hub or a folder is model.path={}",
    "reference_set": "models of your own are reference_set=custom (docs/running.md)",
}
"""For groups whose option is often taken for a path: what to write instead."""


class ShownError(Exception):
    """A run of a sweep was refused, and its message was printed; the other runs went on."""


def run_cli(task: Task, conf: Path) -> None:
    """Do what the command line says, with the configuration files in ``conf``.

    Mistakes of the user are one line and exit code 2, an interruption by Ctrl-C is exit code 130.
    """
    quiet_libraries()
    try:
        act(sys.argv[1:], task, conf)
    except ShownError:
        sys.exit(2)
    except UserError as error:
        fail(str(error))
        sys.exit(2)
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        fail(explain(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        fail(unreadable(error))
        sys.exit(2)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on from the last checkpoint")
        sys.exit(130)
    finally:
        GlobalHydra.instance().clear()


def act(arguments: Sequence[str], task: Task, conf: Path) -> None:
    """Run, sweep, or show what the arguments ask for.

    Raises:
        UserError: the arguments are wrong.
    """
    parser = get_args_parser()
    args = parse(parser, arguments)
    folder = Path(args.config_path) if args.config_path else conf
    hydra = open_hydra(folder, Path(args.config_dir) if args.config_dir else None)
    composing = {"config_name": args.config_name or "config", "overrides": args.overrides}
    if args.help:
        hydra.app_help(composing["config_name"], parser, args)
    elif args.cfg:
        hydra.show_cfg(**composing, cfg_type=args.cfg, package=args.package, resolve=args.resolve)
    elif args.info:
        hydra.show_info(args.info, **composing)
    elif args.shell_completion:
        hydra.shell_completion(**composing)
    elif args.multirun or hydra.get_mode(**composing) == RunMode.MULTIRUN:
        args.overrides.append("hydra.mode=MULTIRUN")
        hydra.multirun(task_function=partial(in_a_sweep, task), **composing)
    else:
        args.overrides.append("hydra.mode=RUN")
        run(hydra, task, **composing)


def run(hydra: Hydra, task: Task, config_name: str, overrides: list[str]) -> None:
    """Run one configuration. Hydra's own ``run`` would also make folders and call callbacks."""
    cfg = hydra.compose_config(config_name, overrides, RunMode.RUN, with_log_configuration=True)
    configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)
    HydraConfig.instance().set_config(cfg)
    task(without_hydra(cfg))


def in_a_sweep(task: Task, cfg: DictConfig) -> float:
    """Run one configuration of several: print why it is refused, since others follow."""
    try:
        return task(cfg)
    except UserError as error:
        fail(str(error))
        raise ShownError from error


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options and ``key=value`` arguments of the command line.

    Raises:
        UserError: an option is unknown or lacks a value, or an argument is no ``key=value``.
    """
    parser.exit_on_error = parser.allow_abbrev = False
    try:
        args, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error).removeprefix("argument ")) from error
    if unknown:
        raise UserError(option_advice(unknown[0], parser))
    for option in ("experimental_rerun", "hydra_help"):  # the first would unpickle a file
        if getattr(args, option):
            name = option.replace("_", "-")
            raise UserError(f"--{name}: not supported; --help lists the groups and keys")
    asked = [args.run, args.multirun, args.cfg is not None, args.info is not None]
    if sum(asked) > 1:
        raise UserError("choose one of --run, --multirun, --cfg and --info")
    args.overrides = [named_seed(override) for override in args.overrides]
    for override in args.overrides:
        if not override.lstrip("+~").partition("=")[0].strip():
            raise UserError(f"{override!r}: expected key=value")
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override}: cannot be read as key=value: {quoting_advice(override)}")
    return args


def option_advice(option: str, parser: argparse.ArgumentParser) -> str:
    """What to write instead of an option that does not exist."""
    key, _, value = option.lstrip("-").partition("=")
    if not re.fullmatch(r"[\w./]+", key):
        return f"{option}: no such option; settings are written as key=value"
    known = [a.option_strings[0] for a in parser._actions if a.option_strings]
    close = difflib.get_close_matches(option.partition("=")[0], known, n=1, cutoff=0.8)
    guess = f", did you mean {close[0]}?" if close else ""
    setting = f"{key}={value or 'VALUE'}"
    return f"{option}: no such option{guess}; settings have no dashes, as in {setting}"


def named_seed(argument: str) -> str:
    """Rewrite ``seed=0,1`` to ``seed=s0,s1``: Hydra refuses integers as names of options.

    Raises:
        UserError: the value is a number, or a list in brackets, and cannot be a seed.
    """
    key, _, value = argument.partition("=")
    if key != "seed":
        return argument
    if re.fullmatch(r"\d+(,\d+)*", value):
        return "seed=" + ",".join(f"s{int(number)}" for number in value.split(","))
    if re.match(r"[-+.\d\[{]", value) or value in ("", "null", "nan", "inf", "true", "false"):
        raise UserError(
            f"{argument}: a seed is a whole number, 0 or more, as in seed=42; "
            "several are -m seed=0,1"
        )
    return argument


def explain(error: Exception) -> str:
    """One line for an error that Hydra or OmegaConf raised about the configuration."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return unknown_option(str(error.missing_cfg_file), error.options or ())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value: {quoting_advice(error.override)}"
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        return unknown_key(cause)
    if ambiguous := re.match("Ambiguous value for argument '(.+)'", str(error)):
        return (
            f"{ambiguous[1]}: several values; to run each of them, begin with -m; "
            f"if it is one value, {quoting_advice(ambiguous[1])}"
        )
    if isinstance(error, OmegaConfBaseException):
        return ": ".join(filter(None, (error.full_key, first_line(error))))
    lines = [line.strip() for line in str(error).splitlines()]
    if cause is not None:
        lines.append(first_line(cause))
    return " ".join(dict.fromkeys(line for line in lines if line))


def unknown_option(file: str, options: Sequence[str]) -> str:
    """One line for a configuration file that does not exist, ``GROUP/OPTION``.

    Args:
        options: those that the group has.
    """
    group, _, option = file.rpartition("/")
    first, _, rest = file.partition("/")
    advice = ""
    if first in OWN:  # what was given may be a path
        group, option, advice = first, rest, f"; {OWN[first].format(shlex.quote(rest))}"
    if not group:
        return f"--config-name {file}: there is no such configuration file"
    return f"{group}={option}: no such option{near(option, options)}{advice}"


def unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    """One line for a key that does not exist, with the keys that may have been meant."""
    # Hydra suggests +key, which adds a second key beside the one that was meant.
    parent = error.parent_node
    siblings = parent if isinstance(parent, DictConfig) else ()
    options = [str(key) for key in siblings if str(key) not in ("hydra", "_target_", "_partial_")]
    if isinstance(parent, DictConfig) and parent._get_parent() is None:
        deeper = [key for key in keys_below(parent) if key.rpartition(".")[2] == str(error.key)]
        if deeper:
            return f"{error.full_key}: no such key, did you mean {' or '.join(deeper)}?"
    return f"{error.full_key}: no such key{near(str(error.key), options)}"


def keys_below(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """The full keys of all values of a configuration but those of ``hydra``."""
    for key in map(str, cfg):
        path = f"{prefix}{key}"
        yield path
        if path != "hydra" and not (
            OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key)
        ):
            child = cfg[key]
            if isinstance(child, DictConfig):
                yield from keys_below(child, f"{path}.")


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
