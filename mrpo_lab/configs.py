"""From YAML to objects: the whole configuration is checked before any object is built."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

import mrpo_lab
from mrpo_lab.errors import UserError, first_line

ALLOWED = ("mrpo_lab.", "torch.optim.", "bitsandbytes.optim.")
"""Packages that a ``_target_`` may name: a configuration must not be able to run anything else."""
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
            ``ALLOWED``, keys or types that do not fit the signature of a ``_target_``.
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
    problems = [
        f"{key}: expected text, got {tree[key]!r}"
        for key in ("name", "outputs")
        if not isinstance(tree[key], str)
    ]
    problems += _problems(tree, "")
    if problems:
        raise UserError("; ".join(problems))
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
    yield from _misfits(target, {k: v for k, v in node.items() if k not in RESERVED}, path)


def _misfits(target: str, given: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield keys that the target does not take and values that do not fit its type hints."""
    try:
        function = get_object(target)
    except Exception as error:
        yield f"{path}: _target_ {target} cannot be imported: {str(error).splitlines()[-1]}"
        return
    parameters = inspect.signature(function).parameters
    for key in given:
        if key not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            yield f"{path}.{key}: unknown; {target} takes {', '.join(parameters) or 'no keys'}"
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for key, value in given.items():
        if key not in hints or _holds_a_node(value):
            continue
        problem = _type_problem(hints[key], value)
        if problem:
            yield f"{path}.{key}: {problem}, got {value!r}"


def _holds_a_node(value: Any) -> bool:
    """Whether a value is, or contains, a node with a ``_target_``."""
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return (isinstance(value, dict) and "_target_" in value) or any(map(_holds_a_node, children))


def _type_problem(hint: Any, value: Any) -> str | None:
    """What is wrong with a value of type ``hint``; None if it fits."""
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
            return "expected a node with a _target_"
        return str(problem["msg"])
    return None
