"""What a run chose: read off its configuration, so that it holds for runs from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mrpo_lab.report.reading import Record
from mrpo_lab.runs.identity import NO_CHANGE

LOSSES = ("dpo", "mdpo", "mrpo", "geometric")
WEIGHTINGS = (
    *("single", "uniform", "fixed", "arwc", "vdw", "vaw"),
    *("swcw", "swcw_oh", "tsw", "vsw", "rmc", "grid"),
)
"""In the order of figures and tables; others follow by name."""
PLAIN = {"logistic", "no_clip"}
"""A link and a clip that go without saying."""
OPTIONS = {"swcwonehot": "swcw_oh"}
"""Classes that their option is not called after."""
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
class Choice:
    """What is compared (dataset, method, seed) and what must be alike for that (setting)."""

    dataset: str
    loss: str
    weighting: str
    seed: int
    references: tuple[str, ...]
    """Slugs in use."""
    reference: str = ""
    """The only one with any weight: single-reference DPO, under whichever loss."""
    weights: str = ""
    """How lambda is chosen, in words; none for pairs and for equal weights that are not told."""
    model: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    """Of the weighting, the link and the clip."""
    setting: dict[str, str] = field(default_factory=dict)


def choice_of(record: Record) -> Choice:
    """Raises KeyError or TypeError where the configuration is not one of this project."""
    config = record.config
    loss, weighting = config["loss"], option(config["weighting"])
    names = [option(loss[part]) for part in ("combine", "link", "clip")]
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
    parts = record.name.split("/")
    return Choice(
        dataset=parts[-4] if len(parts) >= 5 else _dataset(config["dataset"]),
        loss="-".join(name for name in names if name not in PLAIN),
        weighting=weighting,
        seed=int(config["seed"]["root"]),
        references=references,
        reference=str(reference),
        weights=weights_of(config.get("lambda", {})),
        model=str(config["model"].get("path", "")),
        parameters={} if reference else parameters,
        setting={k: v for k, v in leaves.items() if not _outside(k)},
    )


def option(node: Mapping[str, Any]) -> str:
    """The option that a node was made by: ``weighting.VAW`` is vaw."""
    name = str(node["_target_"]).rpartition(".")[2].lower()
    return OPTIONS.get(name, name)


def weights_of(sampler: Mapping[str, Any]) -> str:
    """A sampler of lambda in words: ``dirichlet concentration=0.5, told``."""
    chosen = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in flat(sampler)
        if key not in ("_target_", "condition", "grid", "probe_size") and value != "null"
    ]
    told = ["told"] if sampler.get("condition") else []
    name = option(sampler).removesuffix("lambda") if sampler else ""
    return (
        "" if name == "fixed" and not chosen + told else " ".join([name, ", ".join(chosen + told)])
    )


def slugs(reference_set: Mapping[str, Any]) -> tuple[str, ...]:
    """References in use; those of all entries where ``use`` is null."""
    use = reference_set.get("use")
    return tuple(map(str, use or [entry["slug"] for entry in reference_set["entries"]]))


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf; a list is one leaf."""
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


def order(loss: str, weighting: str) -> tuple[int, str, int, str]:
    """Sorts methods as the paper does."""
    combination = loss.partition("-")[0]
    return (
        LOSSES.index(combination) if combination in LOSSES else len(LOSSES),
        loss,
        WEIGHTINGS.index(weighting) if weighting in WEIGHTINGS else len(WEIGHTINGS),
        weighting,
    )
