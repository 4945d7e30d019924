"""Compose the configurations of a sweep's runs with Hydra.

A composition takes Hydra 0.1 s and a sweep has hundreds of runs, so ``Composer`` composes runs only
once that differ only in ``INDEPENDENT`` groups or in values that cannot change a reference score. A
job composes its own run in full and checks that it has the same name.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mrpo_lab.composition import SEED, open_hydra, without_hydra
from mrpo_lab.errors import UserError
from mrpo_lab.runs.naming import run_name

SCORED = ("dataset", "model", "reference_set")
"""Sections of a configuration that decide which texts are scored, and by which references."""
INDEPENDENT = ("seed", "weighting")
"""Config groups whose options choose for no other group, and set neither a run's ``name`` nor a
section of ``SCORED``. Another option of them changes only that one choice in ``Composed``."""
JOBS_HAVE = ("main", "hydra", "schema")
"""Hydra's names for the sources of configuration that jobs have too: ``conf/`` and Hydra's own."""


@dataclass(frozen=True)
class Composed:
    """What runs share that differ in ``INDEPENDENT`` groups and values such as ``loss.beta``."""

    name: str
    """The key ``name``, the first folder of a run."""
    choices: dict[str, str | None]
    """The option of every config group."""
    sections: dict[str, Any]
    """The resolved sections ``SCORED``."""


class Composer:
    """Composes runs from the configuration folder of a command line."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._config_name = master.hydra.job.config_name
        self._hydra_overrides = list(master.hydra.overrides.hydra)
        sources = {source.provider: Path(source.path) for source in loader.get_sources()}
        self.folder = sources["main"]
        for provider, path in sources.items():
            if provider not in JOBS_HAVE:
                raise UserError(
                    f"configuration files in {path} would not be there for jobs: put them below "
                    f"{self.folder}"
                )
        self.digest = digest(self.folder)
        self._shared: dict[frozenset[str], Composed] = {}
        self._options: dict[str, list[str]] = {}

    def name(self, overrides: Sequence[str]) -> str:
        """The name of the run of ``train.py OVERRIDES``: its folder below ``outputs``."""
        shared, choices = self._composed(overrides), {}
        for group, _, option in (override.partition("=") for override in overrides):
            if group in INDEPENDENT:
                self._refuse_unknown_option(group, option)
                choices[group] = option
        return run_name(shared.name, {**shared.choices, **choices}, overrides)

    def sections(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The resolved sections ``SCORED`` of the run."""
        return self._composed(overrides).sections

    def full_config(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The whole resolved configuration of the run, as ``train.py`` would see it."""
        resolved = OmegaConf.to_container(without_hydra(self._load(overrides)), resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def snapshot(self, folder: Path) -> Path:
        """Copy the configuration files below ``folder``, so that jobs in a queue keep theirs."""
        copy = folder / self.digest
        if not copy.exists():
            draft = folder / f".{self.digest}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(self.folder, draft)
            draft.rename(copy)
        return copy

    def _composed(self, overrides: Sequence[str]) -> Composed:
        alike = frozenset(
            override if self._matters(override) else override.partition("=")[0]
            for override in overrides
        )
        if alike not in self._shared:
            cfg = self._load(overrides)
            sections = {key: _resolved(cfg, key) for key in SCORED if key in cfg}
            choices = {str(group): option for group, option in cfg.hydra.runtime.choices.items()}
            self._shared[alike] = Composed(str(cfg.name), choices, sections)
        return self._shared[alike]

    def _matters(self, override: str) -> bool:
        """Whether the override's value can change more of ``Composed`` than its own choice."""
        key = override.partition("=")[0].lstrip("+~")
        if key.partition(".")[0] in (*SCORED, "name", "kernels"):  # kernels enter two sections
            return True
        return key not in INDEPENDENT and bool(self._options_of(key))

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        return self._loader.load_configuration(
            self._config_name, [*self._hydra_overrides, *overrides], RunMode.RUN
        )

    def _options_of(self, group: str) -> list[str]:
        """The options of a config group; none if ``group`` is no group."""
        if group not in self._options:
            self._options[group] = self._loader.get_group_options(group, ObjectType.CONFIG)
        return self._options[group]

    def _refuse_unknown_option(self, group: str, option: str) -> None:
        options = self._options_of(group)
        if option not in options and not (group == "seed" and SEED.fullmatch(option)):
            raise MissingConfigException(f"{group}={option}", f"{group}/{option}", options)


def compose(conf: Path, overrides: Sequence[str]) -> tuple[DictConfig, str]:
    """Compose one run from the configuration folder ``conf``; its configuration and its name."""
    cfg = open_hydra(conf).compose_config("config", list(overrides), RunMode.RUN, from_shell=False)
    name = run_name(str(cfg.name), cfg.hydra.runtime.choices, list(overrides))
    return without_hydra(cfg), name


def digest(folder: Path) -> str:
    """Hash of all configuration files below ``folder``, as 12 hexadecimal digits."""
    content = hashlib.sha256()
    for file in sorted(folder.rglob("*.yaml")):
        content.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def _resolved(cfg: DictConfig, section: str) -> Any:
    missing = sorted(k for k in OmegaConf.missing_keys(cfg) if k.startswith(f"{section}."))
    if missing:
        raise UserError("; ".join(f"{key}: required, give {key}=VALUE" for key in missing))
    return OmegaConf.to_container(cfg[section], resolve=True)
