"""From YAML to objects: the whole configuration is checked before any object is built."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

import mrpo_lab
from mrpo_lab.errors import UserError, first_line

ALLOWED = ("mrpo_lab.", "torch.optim.", "bitsandbytes.optim.")
"""Packages that a ``_target_`` may name: a configuration must not be able to run anything else."""
MAGNITUDES = (1e-30, 1e30)
"""Magnitudes that a number other than 0 may have, so that float32 can hold what is made of it."""
MAX_INTEGER = 2**63 - 1
SETTINGS: dict[str, Any] = {
    "name": str,
    "outputs": str,
    "threads": Annotated[int, Field(ge=1, le=4096)] | None,
    "kernels": Literal["auto", "off"],
    "deterministic": bool,
    "protocol.batch_size": Annotated[int, Field(ge=1)],
    "protocol.probe_size": Annotated[int, Field(ge=1)],
}
"""Types of the keys that belong to no node with a ``_target_``."""
ABSENT = object()
"""Stands for a key that a configuration does not have."""
REQUIRED = ("name", "outputs", "threads")
"""Those of ``SETTINGS`` without which no run can begin."""
LORA_RANGES: dict[str, Any] = {
    "r": Annotated[int, Field(ge=1)],
    "lora_alpha": Annotated[float, Field(gt=0)],
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "init_lora_weights": bool | str,
}
"""Hints in place of peft's own, which say less than what peft refuses, or more."""
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


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
            path = str(cfg[key]).split(".")
            if path[0] == "mrpo_lab" and path[-1] in mrpo_lab.__all__:
                cfg[key] = f"mrpo_lab.{path[-1]}"
        elif key == "kernels" and cfg[key] is False:
            cfg[key] = "off"


def check(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration and return it with all interpolations resolved.

    Targets of this project are renamed to public ones in ``cfg`` itself.

    Raises:
        UserError: names all problems in one line: missing values, a ``_target_`` outside
            ``ALLOWED``, keys or types that do not fit the signature of a ``_target_``, numbers that
            are not finite, empty texts.
    """
    use_public_names(cfg)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation of a key that does not exist
        raise UserError(f"{error.full_key}: {first_line(error)}") from error
    if missing:
        raise UserError("; ".join(f"{key}: required, give {key}=VALUE" for key in missing))
    assert isinstance(tree, dict)
    problems = [*_outside_nodes(tree), *_unusable(tree, ""), *_problems(tree, "")]
    if problems:
        first: dict[str, str] = {}  # one problem for each key
        for problem in problems:
            first.setdefault(problem.partition(": ")[0], problem)
        raise UserError("; ".join(first.values()))
    return {str(key): value for key, value in tree.items()}


def build(cfg: DictConfig, key: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the node ``key``, with plain lists and dicts as arguments.

    Raises:
        UserError: there is no such node, or its constructor refused a value; names the key.
    """
    if "_target_" not in cfg.get(key, {}):
        raise UserError(f"{key}: nothing is chosen, give {key}=OPTION")
    try:
        return instantiate(cfg[key], *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, TypeError, UserError)):
            where = _full_key(error) or key
            raise UserError(f"{where}: {first_line(cause)}") from error
        raise


def _full_key(error: InstantiationException) -> str:
    """The node's key, which Hydra puts on a line of its own below the message."""
    lines = [line for line in str(error).splitlines() if line.startswith("full_key: ")]
    return lines[-1].removeprefix("full_key: ") if lines else ""


def _outside_nodes(tree: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the problems of ``SETTINGS``."""
    for key, hint in SETTINGS.items():
        value: Any = tree
        for part in key.split("."):
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        if value is ABSENT:
            if key in REQUIRED:
                yield f"{key}: required, give {key}=VALUE"
        elif problem := _type_problem(hint, value):
            yield f"{key}: {problem}"


def _unusable(node: Any, path: str) -> Iterator[str]:
    """Yield values that no setting can have: empty texts, and numbers that are not finite or whose
    magnitude is outside ``MAGNITUDES``."""
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _unusable(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node, str) and not node.strip():
        yield f"{path}: expected text, got {node!r}" + ("; null means none" if "." in path else "")
    elif isinstance(node, float) and not math.isfinite(node):
        yield f"{path}: expected a finite number, got {node}"
    elif isinstance(node, float) and node and not MAGNITUDES[0] <= abs(node) <= MAGNITUDES[1]:
        yield f"{path}: expected a number between 1e-30 and 1e30 in magnitude, or 0, got {node}"
    elif isinstance(node, int) and abs(node) > MAX_INTEGER:
        yield f"{path}: expected a number below 2 to the power of 63, got {node}"


def _problems(node: Any, path: str) -> Iterator[str]:
    """Yield the problems of a node and of all nodes below it."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        yield from _problems(child, f"{path}.{key}".lstrip("."))
    target = node.get("_target_")
    if target is None:
        return
    if not str(target).startswith(ALLOWED):
        yield f"{path}: _target_ {target} is outside the allowed packages {', '.join(ALLOWED)}"
        return
    given = {k: v for k, v in node.items() if k not in RESERVED}
    try:
        function = get_object(target)
    except Exception as error:
        yield f"{path}: _target_ {target} cannot be imported: {str(error).splitlines()[-1]}"
        return
    yield from _misfits(target, function, given, path)
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
        if parameter.default is parameter.empty and key not in given:
            yield f"{path}.{key}: required"
    hints = {**_hints(function), **hints}
    for key, value in given.items():
        if key not in hints or _holds_a_node(value):
            continue
        problem = _type_problem(hints[key], value)
        if problem:
            yield f"{path}.{key}: {problem}"


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
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except Exception:  # no pydantic schema: a hint for objects, which YAML cannot hold
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
