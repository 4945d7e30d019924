"""What a run chose, read from its saved configuration, wherever that was kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mrpo_lab.runs.identity import NO_CHANGE
from mrpo_lab.runs.naming import parse_run_name

DEFAULT_PARTS = {"logistic", "no_clip"}
"""The link and the clip that are left out of a loss's name."""
OPTIONS = {"swcwonehot": "swcw_oh"}
"""Options whose name is not that of their class in lower case."""
NO_SETTING = (
    *NO_CHANGE,
    "seed",
    "choices",
    "weighting",
    "lambda",
    "loss.combine",
    "loss.link",
    "loss.clip",
    "protocol.probe_size",
    "reference_set.use",
    "reference_set.anchor",
    "train.evaluations",
    "train.accuracy_after_step",
    "train.samples",
    "train.sample_tokens",
)
"""Keys that name the method or the seed, or change no result; all others are the setting."""


@dataclass(frozen=True)
class RunChoice:
    """The method, data set and seed of a run, and the setting in which runs can be compared."""

    dataset: str
    loss: str
    """Combination, with link and clip where they are not the usual ones: ``mdpo-hinge``."""
    weighting: str
    seed: int
    references: tuple[str, ...]
    """Slugs of the references in use."""
    reference: str = ""
    """The only reference with any weight, if there is one: under any loss this is DPO with it."""
    lambda_sampler: str = ""
    """How lambda is chosen, in words; empty for pairs, and for equal weights of the aspects that
    are not put into the prompt."""
    model: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    """Parameters of the weighting, the link and the clip, by name."""
    setting: dict[str, str] = field(default_factory=dict)
    """All other configuration, by dotted key."""


def run_choice(config: Mapping[str, Any], name: str = "") -> RunChoice:
    """Read a run's choices from its configuration.

    Args:
        config: the resolved configuration, as saved in ``config.yaml``.
        name: the run's name, which holds the option of the data set that was chosen.

    Raises:
        KeyError, TypeError: the configuration is not one of this project.
    """
    loss, weighting = config["loss"], option(config["weighting"])
    parts = [option(loss[part]) for part in ("combine", "link", "clip")]
    references = slugs(config["reference_set"])
    reference = references[0] if len(references) == 1 else ""
    if weighting == "single":
        anchor = config["reference_set"].get("anchor") or references[0]
        first = anchor if anchor in references else references[0]
        reference = config["weighting"].get("slug") or first
    leaves = dict(flat(config))
    parameters = {
        key.rpartition(".")[2]: value
        for key, value in leaves.items()
        if key.startswith(("weighting.", "loss.link.", "loss.clip."))
        and not key.endswith(("_target_", "_partial_", ".slug"))
    }
    path = parse_run_name(name)
    return RunChoice(
        dataset=path.dataset if path else _dataset(config["dataset"]),
        loss="-".join(part for part in parts if part not in DEFAULT_PARTS),
        weighting=weighting,
        seed=int(config["seed"]["root"]),
        references=references,
        reference=str(reference),
        lambda_sampler=describe_lambda(config.get("lambda", {})),
        model=str(config["model"].get("path", "")),
        parameters={} if reference else parameters,
        setting={key: value for key, value in leaves.items() if not _outside(key)},
    )


def option(node: Mapping[str, Any]) -> str:
    """Name of the option that made a node: ``vaw`` for ``_target_: mrpo_lab.VAW``."""
    name = str(node["_target_"]).rpartition(".")[2].lower()
    return OPTIONS.get(name, name)


def describe_lambda(sampler: Mapping[str, Any]) -> str:
    """A sampler of lambda in words: ``dirichlet concentration=0.5, conditioned``."""
    chosen = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in flat(sampler)
        if key not in ("_target_", "condition", "grid", "probe_size") and value != "null"
    ]
    if sampler.get("condition"):
        chosen.append("conditioned")
    name = option(sampler).removesuffix("lambda") if sampler else ""
    return "" if name == "fixed" and not chosen else " ".join([name, ", ".join(chosen)])


def slugs(reference_set: Mapping[str, Any]) -> tuple[str, ...]:
    """Slugs of the references in use; of all entries where ``use`` is null."""
    use = reference_set.get("use")
    return tuple(map(str, use or [entry["slug"] for entry in reference_set["entries"]]))


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value as text of every leaf; a list is one leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _outside(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NO_SETTING)


def _dataset(node: Mapping[str, Any]) -> str:
    path = str(node.get("path", "")).rstrip("/").rpartition("/")[2]
    return path or option(node).removesuffix("dataset")
