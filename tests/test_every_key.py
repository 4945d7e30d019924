"""Every key of the configuration with wrong values of every kind: refused with its key, or usable.

Nothing is loaded: a value that passes has built its section. Each key is given every sixth of the
values, neighbors others; with ``MRPO_LAB_EVERY_VALUE=1`` it is given all, which takes ten minutes.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from harness import TINY, compose
from omegaconf import DictConfig, ListConfig, OmegaConf

from mrpo_lab import configs
from mrpo_lab.errors import UserError
from mrpo_lab.experiment import check_optimizer
from mrpo_lab.runs.inputs import local_inputs

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

DELETED = object()
WRONG: dict[str, Any] = {
    "null": None,
    "text": "nonsense",
    "empty text": "",
    "control characters": "a\x1b[31mb",
    "flag": True,
    "negative": -1,
    "zero": 0,
    "fraction": 0.3,
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 10**30,
    "huge float": 1e308,
    "empty list": [],
    "empty dict": {},
    "list": [1],
    "dict": {"new": 3},
    "nested": [[{"_target_": "os.system"}]],
    "deleted": DELETED,
}
SETTINGS = {  # together they have every class that conf/ names, beside those of TINY
    "offline": [],
    "online": ["weighting=tsw", "loss=geometric", "loss/link=robust", "loss/clip=ctro"],
    "hub": ["weighting=fixed", "weighting.weights=[1,2,3]", "tracker=wandb", "lambda=dirichlet"],
    "adapter": ["model=qwen2_5_0_5b", "optimizer=adamw8bit", "lambda=learned", "weighting=grid"],
    "sliding": ["weighting=swcw", "lambda=table", "lambda.rows=[{a: 1}]", "loss/link=listwise"],
    "more": ["weighting=vsw", "weighting.relative_ridge=1.0e-3", "train=paper"],
    "pairwise": ["weighting=arwc", "loss/link=ipo"],
    "alone": ["weighting=single", "weighting.slug=tiny-llama", "loss=dpo", "loss/link=hinge"],
}


def keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value, and of every node, in a tree."""
    if path:
        yield path
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            if not (path and path[-1] == "entries" and key > 0):  # all entries are alike
                yield from keys(child, (*path, key))


@cache
def tree(setting: str) -> dict[str, Any]:
    cfg = compose(*TINY, *SETTINGS[setting])
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def changed(setting: str, path: tuple[Any, ...], value: Any) -> DictConfig:
    cfg = OmegaConf.create(tree(setting))
    node: Any = cfg
    for key in path[:-1]:
        node = node[key]
    assert isinstance(node, DictConfig | ListConfig)
    if value is DELETED:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return cfg


def outcome(cfg: DictConfig, section: str) -> str:
    """The one line of a refusal; empty if the section was built. Anything else is an error."""
    try:
        local_inputs(configs.check(cfg))
        if section in configs.SECTIONS:
            built = configs.build(cfg, section)
            if section == "optimizer":
                check_optimizer(built)
    except UserError as error:
        return str(error)
    return ""


def added(setting: str) -> Iterator[tuple[Any, ...]]:
    """A key that does not exist, in every dict."""
    for path in [(), *keys(tree(setting))]:
        node: Any = tree(setting)
        for key in path:
            node = node[key]
        if isinstance(node, dict):
            yield (*path, "new")


STRIDE = 1 if os.environ.get("MRPO_LAB_EVERY_VALUE") == "1" else 6
OPEN = ("protocol", "by", "rows")
"""Keys below which the user chooses names."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_value_of_every_key_is_refused_with_its_key_or_usable(setting: str) -> None:
    base = {} if setting == "offline" else tree("offline")
    sections = {key for key, node in tree(setting).items() if node != base.get(key)}
    wrong = []
    for number, path in enumerate(path for path in keys(tree(setting)) if path[0] in sections):
        for name, value in [*WRONG.items()][number % STRIDE :: STRIDE]:
            try:
                line = outcome(changed(setting, path, value), path[0])
            except Exception as error:
                line = f"{type(error).__name__}: {error}"
            if line and ("\n" in line or not re.search(rf"\b{path[0]}\b", line)):
                wrong.append(f"{'.'.join(map(str, path))}: {name}: {line}")
    for path in added(setting):
        mine = path[0] in sections and not set(path) & set(OPEN)
        if mine and not outcome(changed(setting, path, 3), path[0]):
            wrong.append(f"{'.'.join(map(str, path))}: a new key was taken")
    assert wrong == []
