"""Names of runs, and the reference scores they need, from few compositions.

Hydra takes a tenth of a second to compose a configuration, a sweep has hundreds, and their names
and references differ in little. Runs whose overrides differ only in what cannot touch either share
one composition. A job composes its own run whole, and must come to the same name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mrpo_lab.errors import UserError
from mrpo_lab.runs.naming import run_name
from mrpo_lab.storage.files import write_whole

SCORED = ("dataset", "model", "reference_set")
"""Sections of a configuration that decide which texts are scored, and by which models."""
IDENTITY = ("name", "outputs", "sweep")
KNOWN = ("hydra", "schema")
"""Providers of configuration beside our own folder that every process has."""


@dataclass(frozen=True)
class Composed:
    """What is kept of a composition."""

    name: str
    outputs: str
    choices: dict[str, str | None]
    sections: dict[str, Any]
    """The resolved ``SCORED``."""


class Composer:
    """Composes from the configuration folder of the command line."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._config_name = master.hydra.job.config_name
        self._hydra = list(master.hydra.overrides.hydra)
        places = {source.provider: Path(source.path) for source in loader.get_sources()}
        self.folder = places.pop("main")
        if others := [str(p) for provider, p in places.items() if provider not in KNOWN]:
            raise UserError(
                f"configuration files in {others[0]} would not be there for jobs: put them below "
                f"{self.folder}"
            )
        self.digest = digest(self.folder)
        self._memo: dict[str, Composed] = {}
        self._inert: dict[str, bool] = {}
        self._listed: dict[str, list[str]] = {}

    def composed(self, overrides: Sequence[str]) -> Composed:
        """Of a run; its choices and name are its own, the rest may be of one that differs only in
        what cannot matter."""
        key = " ".join(sorted(self._signature(overrides)))
        if key not in self._memo:
            self._memo[key] = self._compose(overrides)
        shared = self._memo[key]
        own = {
            group: option
            for group, option in map(halves, overrides)
            if self._is_inert(group) and self._has(group, option)
        }
        return Composed(shared.name, shared.outputs, {**shared.choices, **own}, shared.sections)

    def name(self, overrides: Sequence[str]) -> str:
        """The folder that ``train.py OVERRIDES`` would use."""
        composed = self.composed(overrides)
        return run_name(composed.name, composed.choices, overrides)

    def whole(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The resolved configuration of a run, as ``train.py`` would see it."""
        resolved = OmegaConf.to_container(without_hydra(self._load(overrides)), resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def remember(self, file: Path) -> None:
        """Keep what was composed for the next time, as long as no configuration file changes."""
        content = {key: vars(composed) for key, composed in self._memo.items()}
        write_whole(file, json.dumps({"conf": self.digest, "composed": content}).encode())

    def recall(self, file: Path) -> None:
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("conf") == self.digest:
            self._memo = {key: Composed(**content) for key, content in known["composed"].items()}

    def snapshot(self, folder: Path) -> Path:
        """A copy of the configuration files: what waits in a queue is what was asked for."""
        copy = folder / self.digest
        if not copy.exists():
            draft = folder / f".{self.digest}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(self.folder, draft)
            draft.rename(copy)
        return copy

    def _compose(self, overrides: Sequence[str]) -> Composed:
        cfg = self._load(overrides)
        sections = {key: _resolved(cfg, key) for key in SCORED if key in cfg}
        choices = {str(group): option for group, option in cfg.hydra.runtime.choices.items()}
        return Composed(str(cfg.name), str(cfg.outputs), choices, sections)

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        return self._loader.load_configuration(
            self._config_name, [*self._hydra, *overrides], RunMode.RUN
        )

    def _signature(self, overrides: Sequence[str]) -> list[str]:
        """The overrides, without the values that can neither name a run nor choose its texts."""
        return [
            override if self._matters(*halves(override)) else halves(override)[0]
            for override in overrides
        ]

    def _matters(self, key: str, value: str) -> bool:
        section = key.partition(".")[0].lstrip("+~")
        if section in (*SCORED, *IDENTITY, "kernels"):  # a setting of models and references
            return True
        return bool(self._options(key)) and not (self._is_inert(key) and self._has(key, value))

    def _has(self, group: str, option: str) -> bool:
        if option not in self._options(group):
            raise MissingConfigException(
                f"{group}={option}", f"{group}/{option}", self._options(group)
            )
        return True

    def _options(self, group: str) -> list[str]:
        if group not in self._listed:
            self._listed[group] = self._loader.get_group_options(group, ObjectType.CONFIG)
        return self._listed[group]

    def _is_inert(self, group: str) -> bool:
        """Whether choosing another option of ``group`` changes no other choice and no name: no
        option chooses for another group, or sets a key of ``IDENTITY``."""
        if group not in self._inert:
            files = sorted((self.folder / group).glob("*.yaml")) if self._options(group) else []
            contents = [yaml.safe_load(file.read_text()) or {} for file in files]
            self._inert[group] = bool(contents) and not any(
                any(isinstance(default, dict) for default in content.get("defaults", ()))
                or any(key in content for key in IDENTITY)
                for content in contents
            )
        return self._inert[group]


def halves(override: str) -> tuple[str, str]:
    """Key and value."""
    key, _, value = override.partition("=")
    return key, value


def digest(folder: Path) -> str:
    """Of every configuration file below ``folder``."""
    content = hashlib.sha256()
    for file in sorted(folder.rglob("*.yaml")):
        content.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def without_hydra(cfg: DictConfig) -> DictConfig:
    kept = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    assert isinstance(kept, DictConfig)
    return kept


def _resolved(cfg: DictConfig, key: str) -> Any:
    missing = sorted(k for k in OmegaConf.missing_keys(cfg) if k.startswith(f"{key}."))
    if missing:
        raise UserError("; ".join(f"{k}: required, give {k}=VALUE" for k in missing))
    return OmegaConf.to_container(cfg[key], resolve=True)
