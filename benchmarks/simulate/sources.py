"""Where lengths and shapes come from: benchmark profiles, data files, and configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.simulate.layouts import items_of
from benchmarks.simulate.shapes import Shape
from benchmarks.synthetic_models import PROFILES, Profile
from mrpo_lab.cli import near
from mrpo_lab.data.dataset import Dataset, FileDataset, Prepared
from mrpo_lab.data.texts import Replies
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.models.weights import locate
from mrpo_lab.storage.files import local_path

MODELS = Path(__file__).with_name("models.yaml")
PAIRS = 2000
"""Number of pairs that are drawn from a profile; costs are those of an average pair."""


def profile_items(profile: Profile, pairs: int = PAIRS) -> list[Replies]:
    """Token rows with the lengths of a profile."""
    return items_of(profile.lengths(np.random.default_rng(0), pairs))


def file_items(path: str, model: str, max_tokens: int) -> list[Replies]:
    """Token rows with the lengths of the pairs of a data file that are eligible.

    Args:
        model: whose tokenizer and template to use: a local folder or ``embedded:NAME``.

    Raises:
        UserError: the file or the model is not here, or cannot be used.
    """
    if not local_path(path).exists():
        raise UserError(f"{path}: there is no such file or folder")
    dataset = FileDataset(path=path, train=None, val=1, test=1, max_tokens=max_tokens)
    return prepared_items(dataset, model)[1]


def prepared_items(dataset: Dataset, model: str) -> tuple[Prepared, list[Replies]]:
    """The pool of a data set that is here, and token rows with its lengths."""
    tokenization = Tokenization(model, folder_of(model))
    prepared = dataset.prepare(dataset.read(), [tokenization], np.random.default_rng(0))
    counted = tokenization.lengths(prepared.items, prepared.ids)
    return prepared, items_of(_lengths(counted.prompt, counted.reply))


def _lengths(prompt: np.ndarray, reply: np.ndarray) -> Iterator[list[int]]:
    for before, after in zip(prompt, reply, strict=True):
        yield [int(before[0]), *(int(n) for n in after if n)]


def known_profile(path: str) -> Profile | None:
    """The profile that resembles a data set of the hub."""
    return next((profile for profile in PROFILES if profile.resembles == path), None)


def folder_of(model: str) -> Path:
    """The folder of a model that is here; nothing is downloaded.

    Raises:
        UserError: it is not here.
    """
    if not model.startswith("embedded:") and not local_path(model).is_dir():
        raise UserError(f"{model}: there is no such folder; give one, or embedded:NAME")
    return locate(model)


@cache
def _published() -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = yaml.safe_load(MODELS.read_text())
    return content


def config_of(model: str) -> Mapping[str, Any]:
    """The config.json of a model: published (see ``models.yaml``), embedded, a folder or a file.

    Raises:
        UserError: none is known, or it cannot be read.
    """
    if model in _published():
        config: Mapping[str, Any] = _published()[model]["config"]
        return config
    file = local_path(model) if model.endswith(".json") else None
    if file is None:
        if not model.startswith("embedded:") and not local_path(model).is_dir():
            raise UserError(
                f"{model}: its shape is not known{near(model, [*_published()])}; or give a "
                "config.json or a local folder"
            )
        file = locate(model) / "config.json"
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise UserError(f"{file}: expected an object with the keys of config.json")
    return read


@cache
def _shape(model: str, train: bool, lora: str) -> Shape:
    return Shape.of(config_of(model), train, json.loads(lora))


def shape_of(model: str, train: bool = False, lora: Mapping[str, Any] | None = None) -> Shape:
    """The shape of a model; of a policy if ``train``, with ``lora`` as in ``model.lora``.

    Raises:
        UserError: see ``config_of`` and ``Shape.of``; names the model.
    """
    try:
        return _shape(model, train, json.dumps(lora))
    except UserError as error:
        named = str(error)
        raise UserError(named if model in named else f"{model}: {named}") from error


def named_profiles(names: Iterable[str]) -> list[Profile]:
    """The profiles with these names."""
    return [profile for profile in PROFILES if profile.name in names]
