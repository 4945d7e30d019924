"""Whether two configurations ask for the same run: what may differ without changing a number."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

NO_CHANGE = (
    "outputs",
    "name",
    "threads",
    "deterministic",
    "tracker",
    "reference_set.gate",
    "reference_set.token_budget",
    "train.micro_batch_tokens",
    "train.token_budget",
    "train.checkpoint_every",
)
"""Keys that cannot change a number of the run, so they are no part of its identity."""

DEFAULTS = {"kernels": "auto"}
"""Values of top-level keys in configurations that were saved before the keys existed."""


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describe every difference between two configurations that can change a number.

    Two things do not count as differences: the module in which a class of this project is defined,
    since modules may move; and a key that only one side has, with its default value, since keys may
    be added.
    """
    found = []
    for key in sorted({*ours, *theirs}):
        path = f"{prefix}{key}"
        a, b = _comparable(ours, key), _comparable(theirs, key)
        if path in NO_CHANGE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += difference(a, b, f"{path}.")
        elif not (key not in ours and _is_default(ours, path, b)) and not (
            key not in theirs and _is_default(theirs, path, a)
        ):
            found.append(f"{path}: {b!r} there, {a!r} here")
    return found


def _comparable(side: Mapping[str, Any], key: str) -> Any:
    """The value of ``key``; of a ``_target_`` in this project only its name, not its module."""
    value = side.get(key)
    if key == "_target_" and str(value).startswith("mrpo_lab."):
        return str(value).rpartition(".")[2]
    return value


def _is_default(config: Mapping[str, Any], path: str, value: Any) -> bool:
    """Whether leaving the key out of ``config`` means ``value``."""
    if path in DEFAULTS:
        return bool(DEFAULTS[path] == value)
    if "_target_" not in config:
        return False
    from mrpo_lab.targets import find, public_name  # only for configurations whose keys differ

    try:
        parameters = inspect.signature(find(public_name(str(config["_target_"])))).parameters
    except Exception:  # it cannot be imported any more, so its defaults are unknown
        return False
    parameter = parameters.get(path.rpartition(".")[2])
    return parameter is not None and bool(parameter.default == value)
