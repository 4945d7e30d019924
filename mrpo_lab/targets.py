"""The classes and functions that a configuration may name by ``_target_``: an exact set.

They are the public names of this project, the optimizers of torch and bitsandbytes, and what is
defined in the modules that ``MRPO_LAB_TARGETS`` lists. A configuration cannot add to them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from typing import Any

import mrpo_lab
from mrpo_lab.errors import UserError, first_line

VARIABLE = "MRPO_LAB_TARGETS"
"""Environment variable with the names of the user's own modules, separated by commas."""
NO_TARGETS = frozenset(
    {
        "Context",
        "Item",
        "LossOutput",
        "ReplyScorer",
        "RunView",
        "Scores",
        "StudyView",
        "Weighting",
        "open_run",
        "open_study",
        "to_simplex",
    }
)
"""Public names that no configuration needs: values, abstract classes, and what opens folders."""
OPTIMIZERS = ("torch.optim", "bitsandbytes.optim")
"""Packages whose optimizers are targets."""
UNSUITABLE = frozenset({"LBFGS", "SparseAdam"})
"""Optimizers that the training loop cannot use: one needs a closure, one sparse gradients."""


def find(target: str) -> Any:
    """The class or function that is called ``target``.

    Raises:
        UserError: there is none, or a configuration may not name it; says what to do.
    """
    package, _, name = target.rpartition(".")
    if package == "mrpo_lab":
        if name in mrpo_lab.__all__ and name not in NO_TARGETS:
            return getattr(mrpo_lab, name)
        raise UserError(f"_target_ {target} is no public name that a configuration may use")
    if package in OPTIMIZERS:
        found = _optimizers(package)
    elif package in own_modules():
        found = _own(package)
    else:
        raise UserError(
            f"_target_ {target} is outside of what a configuration may run: mrpo_lab.NAME, "
            f"{', '.join(f'{each}.NAME' for each in OPTIMIZERS)}, and the modules that the "
            f"environment variable {VARIABLE} lists (docs/extending.md)"
        )
    if name not in found:
        raise UserError(f"_target_ {target}: {package} has only {', '.join(sorted(found))}")
    return found[name]


def public_name(target: str) -> str:
    """The public name of a target of this project, which may have been saved before its module
    moved; other targets as they are."""
    package, name = target.partition(".")[0], target.rpartition(".")[2]
    return f"mrpo_lab.{name}" if package == "mrpo_lab" and name in mrpo_lab.__all__ else target


def own_modules() -> list[str]:
    """The modules that ``MRPO_LAB_TARGETS`` lists.

    Raises:
        UserError: one of them cannot be the name of a module.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise UserError(
                f"{VARIABLE}: {name!r} is no name of a module; it lists modules, as in "
                f"{VARIABLE}=my_losses,my_package.weightings"
            )
    return names


def _optimizers(package: str) -> dict[str, Any]:
    from torch.optim import Optimizer

    return {
        name: found
        for name, found in vars(importlib.import_module(package)).items()
        if inspect.isclass(found)
        and issubclass(found, Optimizer)
        and found is not Optimizer
        and name not in UNSUITABLE
    }


def _own(module: str) -> dict[str, Any]:
    """Public classes and functions that a module of the user defines itself."""
    if os.getcwd() not in sys.path:  # last, so that no file there hides a library
        sys.path.append(os.getcwd())
    try:
        content = vars(importlib.import_module(module))
    except Exception as error:
        raise UserError(f"{VARIABLE}: {module} cannot be imported: {first_line(error)}") from error
    return {
        name: found
        for name, found in content.items()
        if (inspect.isclass(found) or inspect.isfunction(found))
        and found.__module__ == module
        and not name.startswith("_")
    }
