"""The name of a run, a function of what was chosen: the same command finds its run again."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mrpo_lab.runs.identity import NO_CHANGE

CELL = {
    "loss": "",
    "loss/link": "logistic",
    "loss/clip": "none",
    "weighting": "",
    "lambda": "fixed",
    "reference_set": "",
}
"""Groups that one part of a run's name is made of, with the options that go without saying."""
NAMED = {"dataset", "model", *CELL, "seed", "experiment", "sweep"}
"""Groups with a place in the name; an experiment and a sweep bring a name of their own."""


def run_name(name: str, choices: Mapping[str, str | None], overrides: Sequence[str]) -> str:
    """``name/dataset/model/loss-weighting-references/seed``, with what else was chosen.

    ``choices``: option of each config group. ``overrides``: the command line's, as Hydra has them.
    """
    # A group taken away, as by ~loss, is refused when it is built.
    chosen = defaultdict(str, {group: str(option) for group, option in choices.items() if option})
    cell = "-".join(chosen[g] for g, silent in CELL.items() if chosen[g] not in ("", silent))
    values = {}
    for override in overrides:  # the last word on a key counts
        key, _, value = override.lstrip("+~").partition("=")
        if key not in NAMED and not key.startswith((*NO_CHANGE, "hydra")):
            values[key] = value
    suffix = _file_name(",".join(f"{key}={value}" for key, value in sorted(values.items())))
    seed = f"{chosen['seed']}__{suffix}" if suffix else chosen["seed"]
    return "/".join([name, chosen["dataset"], chosen["model"], cell, seed])


def _file_name(text: str) -> str:
    """``text`` fit for a folder's name: unusual characters and long texts end in a hash."""
    plain = re.sub(r"[^\w.,=+-]+", "-", text)
    if plain == text and len(text) <= 80:
        return text
    return f"{plain[:70]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
