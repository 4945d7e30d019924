"""The name of a run: composed from what was chosen, so that the same command finds its run again,
and parsed again from the path of its folder."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mrpo_lab.errors import UserError
from mrpo_lab.runs.identity import NO_CHANGE

CELL = {
    "loss": "",
    "loss/link": "logistic",
    "loss/clip": "none",
    "weighting": "",
    "lambda": "fixed",
    "reference_set": "",
}
"""Config groups that make up the method part of a run's name, and the option of each that is left
out of it."""
SKIPPED = {"cache", "wandb", "adapter", "checkpoint"}
"""Names of folders in which no run is looked for."""
NAMED = {"dataset", "model", *CELL, "seed", "experiment", "sweep"}
"""Config groups that have a place in the name; an experiment or a sweep sets ``name`` itself."""


def check_name(name: str) -> None:
    """Refuse a name whose folder would not lie below ``outputs``, or would not be found there.

    Raises:
        UserError: a part is empty, is ``..``, is hidden, or is the name of a folder with other
            contents.
    """
    problem = ""
    for part in name.split("/"):
        if not part.strip() or not part.isprintable():
            problem = "a part of it is empty or has characters that cannot be printed"
        elif part.startswith((".", "~")):
            problem = f"{part!r} is no name of a folder below outputs"
        elif part in SKIPPED or part == "sweeps":
            problem = f"folders called {part} hold something else than runs"
    if problem:
        raise UserError(f"name: {name!r}: {problem}; give a name such as name=study or name=a/b")


def run_name(name: str, choices: Mapping[str, str | None], overrides: Sequence[str]) -> str:
    """Name of a run, ``name/dataset/model/loss-weighting-references/seed``.

    Other overrides that can change a number are appended to the seed.

    Args:
        choices: the chosen option of each config group.
        overrides: the command line's overrides, as Hydra has them.

    Raises:
        UserError: see ``check_name``.
    """
    check_name(name)
    # A group that was removed, as by ~loss, is refused when it is built.
    chosen = defaultdict(str, {group: str(option) for group, option in choices.items() if option})
    cell = "-".join(chosen[g] for g, silent in CELL.items() if chosen[g] not in ("", silent))
    values = {}
    for override in overrides:  # the last override of a key counts
        key, _, value = override.lstrip("+~").partition("=")
        if key not in NAMED and not key.startswith((*NO_CHANGE, "hydra")):
            values[key] = value
    suffix = _file_name(",".join(f"{key}={value}" for key, value in sorted(values.items())))
    seed = f"{chosen['seed']}__{suffix}" if suffix else chosen["seed"]
    return "/".join([name, chosen["dataset"], chosen["model"], cell, seed])


class RunPath(NamedTuple):
    """The parts of a name that ``run_name`` composed."""

    name: str
    """It may have several parts itself, as ``study/first``."""
    dataset: str
    model: str
    cell: str
    seed: str


def parse_run_name(text: str) -> RunPath | None:
    """Split a run's name into its parts; None if ``run_name`` cannot have composed it."""
    parts = text.split("/")
    if len(parts) < len(RunPath._fields):
        return None
    return RunPath("/".join(parts[:-4]), *parts[-4:])


def name_of_folder(folder: Path, config: Mapping[str, Any]) -> str:
    """Name of the run in ``folder``, whose saved configuration is ``config``.

    It is the end of the folder's path, from ``config["name"]`` on. A folder that was moved, so that
    its path does not hold that name, is called by its last part alone.
    """
    given = str(config.get("name", "")).split("/")
    parts = folder.parts[-4 - len(given) :]
    return "/".join(parts) if list(parts[: len(given)]) == given else folder.name


def _file_name(text: str) -> str:
    """``text`` as a folder name: one that is long or has unusual characters ends in a hash."""
    plain = re.sub(r"[^\w.,=+-]+", "-", text)
    if plain == text and len(text) <= 80:
        return text
    return f"{plain[:70]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
