"""From YAML to objects: the whole configuration is checked before any object is built."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

import mrpo_lab
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.targets import find, public_name
from mrpo_lab.values import unusable

SETTINGS: dict[str, Any] = {
    "name": str,
    "outputs": str,
    "threads": Annotated[int, Field(ge=1, le=4096)] | None,
    "kernels": Literal["auto", "off"],
    "deterministic": bool,
    "protocol.batch_size": Annotated[int, Field(ge=1)],
    "protocol.probe_size": Annotated[int, Field(ge=1)],
    "optimizer.lr": Annotated[float, Field(ge=0)],
}
"""Types of the keys that belong to no node with a ``_target_``, and of those that need a narrower
one than the signature of their node has."""
REQUIRED = ("name", "outputs", "threads", "optimizer.lr")
"""Those of ``SETTINGS`` without which no run can begin."""
SECTIONS = (
    "seed",
    "dataset",
    "reference_set",
    "model",
    "loss",
    "weighting",
    "lambda",
    "optimizer",
    "train",
    "tracker",
)
"""The nodes that an experiment is built from."""
RESERVED = {"_target_", "_partial_"}
"""Keys of a node that are not arguments."""
ABSENT = object()
"""Stands for a key that a configuration does not have."""
TRUST = "MRPO_LAB_TRUST_REMOTE_CODE"
"""Environment variable without which ``trust_remote_code: true`` is refused."""
LORA_RANGES: dict[str, Any] = {
    "r": Annotated[int, Field(ge=1)],
    "lora_alpha": Annotated[float, Field(gt=0)],
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "init_lora_weights": bool | str,
}
"""Hints in place of peft's own, which say less than what peft refuses, or more."""


def use_public_names(cfg: DictConfig | ListConfig) -> None:
    """Rewrite each ``_target_`` of this project to its public name, in place, and ``kernels: off``,
    which YAML reads as false, to the word.

    ``mrpo_lab.losses.mdpo``, as saved before modules moved, becomes ``mrpo_lab.mdpo``. Targets that
    are not public stay as they are.
    """

    keys = range(len(cfg)) if isinstance(cfg, ListConfig) else list(cfg)
    for key in keys:
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        if isinstance(cfg[key], (DictConfig, ListConfig)):
            use_public_names(cfg[key])
        elif key == "_target_":
            cfg[key] = public_name(str(cfg[key]))
        elif key == "kernels" and cfg[key] is False:
            cfg[key] = "off"


def check(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration and return it with all interpolations resolved.

    Targets of this project are renamed to public ones in ``cfg`` itself.

    Raises:
        UserError: names all problems in one line: missing values, a ``_target_`` that
            ``mrpo_lab.targets`` does not allow, keys or types that do not fit the signature of a
            ``_target_``, and values that ``mrpo_lab.values`` refuses.
    """
    use_public_names(cfg)
    if not isinstance(cfg.get("protocol", {}), DictConfig | dict | None):
        raise UserError(f"protocol: expected batch_size and probe_size, got {cfg.protocol}")
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation of a key that does not exist
        raise UserError(f"{error.full_key}: {first_line(error)}") from error
    if missing:
        raise UserError("; ".join(f"{key}: required, give {key}=VALUE" for key in missing))
    assert isinstance(tree, dict)
    problems = [*_outside_nodes(tree), *unusable(tree), *_problems(tree, "")]
    if problems:
        first: dict[str, str] = {}  # one problem for each key
        for problem in problems:
            first.setdefault(problem.partition(": ")[0], problem)
        raise UserError("; ".join(first.values()))
    return {str(key): value for key, value in tree.items()}


def build(cfg: DictConfig, key: str) -> Any:
    """Build the object that the node ``key`` describes, and those below it.

    Raises:
        UserError: there is no such node, its constructor refused a value, or what it builds is not
            what ``key`` needs; names the key.
    """
    node = cfg.get(key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(f"{key}: nothing is chosen, give {key}=OPTION")
    return _build(OmegaConf.to_container(node, resolve=True), key)


def _build(node: Any, path: str) -> Any:
    if isinstance(node, list):
        return [_build(child, f"{path}.{number}") for number, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    built = {key: _build(child, f"{path}.{key}") for key, child in node.items()}
    if "_target_" not in built:
        return built
    target, is_partial = built.pop("_target_"), built.pop("_partial_", False)
    try:
        function = find(target)
        value = partial(function, **built) if is_partial else function(**built)
        _refuse_misplaced(value, target, path)
    except (ValueError, TypeError, UserError) as error:
        raise UserError(named(path, function, first_line(error))) from error
    return value


def named(path: str, function: Any, message: str) -> str:
    """``message``, raised by ``function``, with the full key that it is about.

    A message that begins with a parameter of ``function`` is about that key below ``path``.
    """
    word = re.match(r"\w+", message)
    if word and word[0] in inspect.signature(function).parameters:
        return f"{path}.{message}"
    return f"{path}: {message}"


def _refuse_misplaced(value: Any, target: str, path: str) -> None:
    """Refuse an object or function that is not of the kind that belongs at ``path``.

    Raises:
        ValueError: says what belongs there.
    """
    from mrpo_lab.data.dataset import Dataset
    from mrpo_lab.objective.aspect_weighting import LambdaSampler
    from mrpo_lab.objective.losses import Combination, Link
    from mrpo_lab.runs.tracking import Tracker

    kinds = {
        "seed": mrpo_lab.Seeds,
        "dataset": Dataset,
        "reference_set": mrpo_lab.ReferenceSet,
        "model": mrpo_lab.PolicyConfig,
        "loss": mrpo_lab.PreferenceLoss,
        "weighting": mrpo_lab.Weighting,
        "lambda": LambdaSampler,
        "train": mrpo_lab.TrainConfig,
        "tracker": Tracker,
    }
    if path in kinds and not isinstance(value, kinds[path]):
        raise ValueError(f"{target} is no {kinds[path].__name__}")
    calls: dict[str, Any] = {
        "loss.combine": Combination.__call__,
        "loss.link": Link.__call__,
        "loss.clip": lambda _, refs: refs,
        "optimizer": lambda _, parameters: parameters,
    }
    if path in calls:
        _, *parameters = inspect.signature(calls[path]).parameters.values()
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        try:
            positional = [None] * (len(parameters) - len(by_name))
            inspect.signature(value).bind(*positional, **dict.fromkeys(by_name))
        except TypeError as error:
            takes = ", ".join(p.name for p in parameters)
            raise ValueError(
                f"{target} cannot be called with {takes}: {error}; _partial_: true leaves them open"
            ) from error


def _outside_nodes(tree: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the problems of ``SETTINGS``, sections that are not chosen, and other keys."""
    known = (*SECTIONS, *(key.partition(".")[0] for key in SETTINGS))
    for key in tree:
        if key in ("experiment", "sweep"):
            yield f"{key}: its file sets nothing: it begins with the line '# @package _global_'"
        elif key not in known:
            yield f"{key}: unknown; the sections are {', '.join(dict.fromkeys(known))}"
    for key in SECTIONS:
        if not isinstance(tree.get(key), dict) or "_target_" not in tree[key]:
            yield f"{key}: nothing is chosen, give {key}=OPTION"
    for key, hint in SETTINGS.items():
        value: Any = tree
        for part in key.split("."):
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        if value is ABSENT:
            if key in REQUIRED:
                yield f"{key}: required, give {key}=VALUE"
        elif problem := _type_problem(hint, value):
            yield f"{key}: {problem}"


def _problems(node: Any, path: str) -> Iterator[str]:
    """Yield the problems of a node and of all nodes below it."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        yield from _problems(child, f"{path}.{key}".lstrip("."))
    if node.get("trust_remote_code") is True and os.environ.get(TRUST) != "1":
        yield (
            f"{path}.trust_remote_code: runs code that comes with the model: set {TRUST}=1 in the "
            "environment if you trust it"
        )
    if "_target_" not in node:
        return
    target, given = str(node["_target_"]), {k: v for k, v in node.items() if k not in RESERVED}
    problem = _type_problem(bool, node.get("_partial_", False))
    if problem:
        yield f"{path}._partial_: {problem}"
    try:
        function = find(target)
    except UserError as error:
        yield f"{path}: {error}"
        return
    whole = not node.get("_partial_")
    yield from _misfits(target, function, given, path, complete=whole)
    yield from _inside(function, given, path)


def _inside(function: Any, given: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the problems of dicts that become the arguments of another class than the node's."""
    if function is mrpo_lab.ReferenceSet and isinstance(given.get("entries"), list):
        from mrpo_lab.models.references import Reference

        for number, entry in enumerate(given["entries"]):
            if isinstance(entry, dict) and "_target_" not in entry:
                yield from _misfits(
                    "an entry", Reference, entry, f"{path}.entries.{number}", complete=True
                )
    if function is mrpo_lab.PolicyConfig and isinstance(given.get("lora"), dict):
        import peft

        yield from _misfits(
            "LoraConfig", peft.LoraConfig, given["lora"], f"{path}.lora", LORA_RANGES
        )


def _misfits(
    target: str,
    function: Any,
    given: Mapping[str, Any],
    path: str,
    hints: Mapping[str, Any] = MappingProxyType({}),
    complete: bool = False,
) -> Iterator[str]:
    """Yield keys that a function does not take and values that do not fit its type hints.

    Args:
        target: what messages call the function.
        hints: hints that replace the function's own.
        complete: whether ``given`` is all that the function is given, so that required parameters
            that it lacks are named too.
    """
    parameters = inspect.signature(function).parameters
    for key in given:
        if key not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            yield f"{path}.{key}: unknown; {target} takes {', '.join(parameters) or 'no keys'}"
    for key, parameter in parameters.items() if complete else ():
        varies = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not varies and key not in given:
            yield f"{path}.{key}: required"
    hints = {**_hints(function), **hints}
    for key, value in given.items():
        if key not in hints or _holds_a_node(value):
            continue
        problem = _type_problem(hints[key], value)
        if problem:
            yield f"{path}.{key}: {problem}"


@cache
def _hints(function: Any) -> dict[str, Any]:
    """Type hints of a function's parameters; of a dataclass, also of those that it inherits."""
    if is_dataclass(function):
        return get_type_hints(function)  # each in the module that wrote it
    return get_type_hints(function.__init__ if inspect.isclass(function) else function)


def _holds_a_node(value: Any) -> bool:
    """Whether a value is, or contains, a node with a ``_target_``."""
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return (isinstance(value, dict) and "_target_" in value) or any(map(_holds_a_node, children))


def _type_problem(hint: Any, value: Any) -> str | None:
    """Describe why a value is not of type ``hint``; None if it is."""
    adapter = _adapter(hint)
    if adapter is None:
        return None
    try:
        # In strict mode only JSON arrays fit both lists and tuples; YAML has no tuples.
        adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "needs_python_object":
            return f"expected a node with a _target_, got {value!r}"
        if problem["type"] == "string_type" and isinstance(value, (int, float)):
            return f"expected text, got {value!r}: put quotes around it, '\"{value}\"'"
        if problem["type"] == "string_type" and value is None:
            return "expected text, got None"
        return f"{problem['msg']}, got {value!r}"
    return None


@cache
def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """What checks values against a type hint; None if it is for objects, which YAML cannot hold."""
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except Exception:  # pydantic has no schema for it
        return None
