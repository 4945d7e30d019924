"""Composing configurations with Hydra, which then instantiates nothing that was not checked.

Hydra acts on its own section of a configuration, ``hydra``, before it calls the program: it builds
callbacks, a sweeper and a launcher, configures logging, makes folders. ``CheckedLoader`` checks
that section whenever a configuration is composed, so before any of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf

from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage.files import local_path
from mrpo_lab.values import unsafe_text

FIXED: dict[str, tuple[Any, ...]] = {
    "callbacks": ({},),
    "env": ({},),
    "job.chdir": (False, None),
    "job.env_copy": ([],),
    "job.env_set": ({},),
    "launcher._target_": (
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra_plugins.mrpo_lab_sweeps.LocalLauncher",
        "hydra_plugins.mrpo_lab_sweeps.SlurmLauncher",
    ),
    "output_subdir": (None,),
    "run.dir": (".",),
    "searchpath": ([],),
    "sweep.dir": ("${local_path:${outputs}}/.multirun", "${outputs}/.multirun"),  # 0.1.0
    "sweep.subdir": (".",),
    "sweeper._target_": (
        "hydra_plugins.mrpo_lab_sweeps.GridSweeper",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    ),
}
"""Keys of ``hydra`` that it acts on, and the values that they may have, as they are written."""
PLAIN = ("launcher", "sweeper", "hydra_logging", "job_logging")
"""Sections of ``hydra`` whose values must be written out: what is checked is then what is used."""
FREE = ("help", "hydra_help", "job", "mode", "overrides", "runtime", "verbose", *PLAIN)
"""Sections of ``hydra`` in which other keys may have any value."""
SEED = re.compile(r"s(0|[1-9]\d{0,18})")
"""Options of ``seed``: every whole number, whether or not it has a file."""
LOGGING = re.compile(
    r"(version|incremental|disable_existing_loggers|root\.(level|handlers\.\d+|propagate)"
    r"|formatters\.[^.]+\.(format|datefmt)|handlers\.[^.]+\.(level|formatter)"
    r"|loggers\..+\.(level|handlers\.\d+|propagate))"
)
"""Keys of a logging configuration that run and write nothing."""
STREAMS = {"class": ("logging.StreamHandler",), "stream": ("ext://sys.stdout", "ext://sys.stderr")}
"""Keys of a handler, and their only values: what is logged goes to the terminal."""


class CheckedLoader(ConfigLoaderImpl):
    """Composes configurations and refuses those that would have Hydra run, read or write things."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """The composed configuration, as Hydra composes it.

        Raises:
            UserError: it is refused, or its files cannot be read; names the key or the file.
        """
        self._offer_seeds(overrides)
        try:
            cfg = super().load_configuration(
                config_name, overrides, run_mode, from_shell, validate_sweep_overrides
            )
        except (HydraException, OSError, UserError):
            raise
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{mark.name} line {mark.line + 1}" if mark else "a configuration file"
            raise UserError(f"{where}: not valid YAML: {error.problem}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"a configuration file is no text in UTF-8: {error}") from error
        except Exception as error:  # whatever a strange file or override makes Hydra stumble over
            if str(error).startswith("Config group override must be"):
                named = ", ".join(self._of_groups(overrides))
                raise UserError(
                    f"{named}: options of a group are names, as in loss=mdpo"
                ) from error
            raise UserError(f"the configuration cannot be composed: {first_line(error)}") from error
        self._check(cfg)
        return cfg

    def _of_groups(self, overrides: Sequence[str]) -> list[str]:
        """The overrides that choose no option of a group by its name."""
        found = []
        for override in overrides:
            group, _, option = override.lstrip("+~").partition("=")
            options = self.get_group_options(group)
            if options and option not in options:
                found.append(override)
        return found

    def _check(self, cfg: DictConfig) -> None:
        tree = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(tree, dict)
        hydra = tree.pop("hydra")
        # Hydra's section repeats what the command line has, also values of runs yet to be composed.
        texts = [*_unsafe(tree, "")] or [*_unsafe(hydra, "hydra")][:1]
        if problems := [*texts, *_hydra_problems(hydra, "")]:
            raise UserError("; ".join(problems))

    def _offer_seeds(self, overrides: Sequence[str]) -> None:
        """Give ``seed`` an option for each number that is asked for and has no file."""
        values = (o.partition("=")[2] for o in overrides if o.startswith("seed="))
        asked = {word for value in values for word in re.findall(r"\w+", value)}
        asked = {word for word in asked if SEED.fullmatch(word)}
        for name in asked - set(self.get_group_options("seed") if asked else ()):
            node = {"_target_": "mrpo_lab.Seeds", "root": int(name[1:])}
            ConfigStore.instance().store(group="seed", name=name, node=node)

    def _process_config_searchpath(
        self,
        config_name: str | None,
        parsed_overrides: list[Override],
        repo: CachingConfigRepository,
    ) -> None:
        for override in parsed_overrides:
            if override.get_key_element().lstrip("+~") == "hydra.searchpath":
                raise UserError(
                    "hydra.searchpath: configuration files are read from one folder: put yours "
                    "below it, or name one more with --config-dir"
                )
        # Files that set it are refused like all other wrong values, by ``_check``.

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        """One file. Only those that are about Hydra may set more of it than the runs of a sweep.

        Launchers have shell lines that jobs run, so an experiment must not set them.
        """
        loaded = super()._load_single_config(default, repo)
        path = str(default.config_path)
        if not isinstance(loaded.config, DictConfig):
            raise UserError(f"{path}.yaml: expected lines of key: value, not a list")
        if not default.primary and not path.startswith("hydra/") and "hydra" in loaded.config:
            own = OmegaConf.to_container(loaded.config, resolve=False)
            assert isinstance(own, dict)
            for key in _leaves(own["hydra"], "hydra"):
                if key != "hydra.mode" and not key.startswith("hydra.sweeper.grids"):
                    raise UserError(
                        f"{path}.yaml: {key}: only config.yaml, files in hydra/ and the command "
                        "line may set it"
                    )
        return loaded


def open_hydra(folder: Path, also: Path | None = None, job: str = "train") -> Hydra:
    """Hydra for the configuration files in ``folder``, and in ``also`` where given.

    Environment variables are not read into configurations: they would be stored with the run.

    Raises:
        UserError: one of the folders does not exist.
    """
    for each in (folder, also):
        if each is not None and not each.is_dir():
            raise UserError(f"{each}: there is no such folder of configuration files")
    setbase("1.3")
    path = create_config_search_path(str(folder.resolve()))
    if also is not None:
        schema = SearchPathQuery(provider="schema")
        path.prepend("command-line", f"file://{also.resolve()}", schema)
    OmegaConf.register_new_resolver("oc.env", _refuse_variable, replace=True)
    # Hydra makes folders before this project sees the configuration: config.yaml names them so.
    OmegaConf.register_new_resolver("local_path", lambda text: str(local_path(text)), replace=True)
    GlobalHydra.instance().clear()
    hydra = Hydra(job, CheckedLoader(path))
    GlobalHydra.instance().initialize(hydra)
    return hydra


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of ``cfg`` without Hydra's own section."""
    kept = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    assert isinstance(kept, DictConfig)
    return kept


def _refuse_variable(name: str, *_: object) -> str:
    raise UserError(
        f"a configuration does not read environment variables, as {name}: its values are stored "
        "with the run; let the shell fill it in, as in outputs=$SCRATCH"
    )


def _unsafe(node: Any, path: str) -> Iterator[str]:
    """Yield texts that are not to be printed or stored, in keys and in values."""
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from unsafe_text(str(key), f"{path or 'configuration'}: a key")
            yield from _unsafe(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node, str):
        yield from unsafe_text(node, path)


def _hydra_problems(node: Any, path: str) -> Iterator[str]:
    """Yield the values of Hydra's section that it must not act on; keys are relative to it."""
    section = path.partition(".")[0]
    if path in FIXED:
        if node not in FIXED[path]:
            yield (
                f"hydra.{path}: a configuration must not change what Hydra runs, reads or writes; "
                f"it stays {' or '.join(map(str, FIXED[path]))}"
            )
    elif path in PLAIN and not isinstance(node, dict):
        yield f"hydra.{path}: expected keys and values, got {node!r}"
    elif isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _hydra_problems(child, f"{path}.{key}".lstrip("."))
    elif path == "verbose" or section == "verbose":
        if not isinstance(node, bool | str):
            yield f"hydra.{path}: expected true, false or names of loggers, got {node!r}"
    elif section not in FREE:
        yield f"hydra.{path}: a configuration must not set it"
    elif section in PLAIN and isinstance(node, str) and "${" in node:
        yield f"hydra.{path}: expected a value that is written out, got {node}"
    elif section in ("hydra_logging", "job_logging"):
        yield from _logging_problems(node, path)
    elif section in ("launcher", "sweeper") and re.search(r"(^|\.)_\w+_($|\.)", path):
        yield f"hydra.{path}: a launcher or sweeper holds plain values"


def _logging_problems(value: Any, path: str) -> Iterator[str]:
    """Yield what is more than formatted lines on stdout or stderr in a logging configuration."""
    _, _, key = path.partition(".")
    if key == "root" and value is None:  # logging is left as it is
        return
    last = key.rpartition(".")[2]
    if key.startswith("handlers.") and last in STREAMS:
        if value not in STREAMS[last]:
            yield f"hydra.{path}: logging goes to the terminal: {' or '.join(STREAMS[last])}"
    elif not LOGGING.fullmatch(key) or (isinstance(value, str) and "://" in value):
        yield f"hydra.{path}: logging only takes levels, formats and handlers for the terminal"


def _leaves(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, Mapping) and node:
        for key, child in node.items():
            yield from _leaves(child, f"{path}.{key}")
    else:
        yield path
