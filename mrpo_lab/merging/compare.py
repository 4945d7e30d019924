"""One policy that was told lambda, beside policies of one aspect and merges of their adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor

from mrpo_lab import configs
from mrpo_lab.errors import UserError
from mrpo_lab.experiment import Experiment
from mrpo_lab.models.policy import Policy
from mrpo_lab.progress import progress
from mrpo_lab.runs.folder import finished
from mrpo_lab.training.evaluation import Evaluation
from mrpo_lab.training.workers import Workers

SHARED = ("dataset", "model", "seed", "reference_set", "loss")
"""Sections of the configuration in which the runs must be alike."""


@dataclass(frozen=True)
class Finished:
    """A run on disk."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Finished:
        """
        Raises:
            UserError: there is no finished run of lists with an adapter.
        """
        config = folder / "config.yaml"
        if not config.exists():
            raise UserError(f"{folder}: no run; a run is a folder with config.yaml")
        result = finished(folder)
        if result is None:
            raise UserError(f"{folder}: this run is not finished")
        if not (folder / "trade_off.parquet").exists():
            raise UserError(f"{folder}: this run is not of lists with several aspects")
        if not (folder / "adapter" / "adapter_config.json").exists():
            raise UserError(f"{folder}: no adapter to merge: this run trained all weights")
        return cls(folder, yaml.safe_load(config.read_text()), result)

    @property
    def aspect(self) -> str:
        """The one aspect that it was trained on.

        Raises:
            UserError: there were several, or it was told lambda.
        """
        settings = self.config["lambda"]
        weights = [aspect for aspect, w in (settings.get("weights") or {}).items() if w]
        if len(weights) != 1 or settings["condition"]:
            raise UserError(
                f"{self.folder}: not trained on one aspect alone, as with "
                "lambda=fixed lambda.weights={ASPECT: 1}"
            )
        return str(weights[0])

    @property
    def alpha(self) -> Float[Tensor, " K"]:
        """Mean weight of each reference over its steps."""
        references = self.result["references"].values()
        return torch.tensor([r["mean_alpha"] for r in references], dtype=torch.float64)


def compare(told: Finished, alone: Mapping[str, Finished]) -> list[dict[str, Any]]:
    """The trade-off of the told policy, of each policy of one aspect, and of their merges."""
    cfg = OmegaConf.create(told.config)
    configs.check(cfg)
    experiment = Experiment.build(cfg, Workers.start())
    prepared = experiment.prepare()
    # Merged policies were trained on one aspect each, and are not told lambda.
    data = experiment.data(prepared, conditioned=False)
    aspects = data.labels.aspects
    points = experiment.sampler.points(aspects)
    rows: list[dict[str, Any]] = pq.read_table(told.folder / "trade_off.parquet").to_pylist()
    for run in alone.values():
        trained = pq.read_table(run.folder / "trade_off.parquet").to_pylist()
        rows += [
            row | {"policy": f"{run.aspect} alone"} for row in trained if row["policy"] == "trained"
        ]
    policy = merged_policy(experiment, {a: run.folder / "adapter" for a, run in alone.items()})
    model: Any = policy.model
    alpha = torch.stack([run.alpha for run in alone.values()]).mean(0)
    with progress(len(points), "merging", "lambda") as bar:
        for number, weights in enumerate(points):
            shares = [float(weights[aspects.index(aspect)]) for aspect in alone]
            name = f"merged{number}"
            model.add_weighted_adapter(list(alone), shares, name, combination_type="linear")
            model.set_adapter(name)
            evaluation = Evaluation(
                policy,
                data,
                experiment.loss,
                experiment.workers,
                experiment.config.token_budget,
                weights,
            )
            rows += evaluation.trade_off(weights.unsqueeze(0), alpha, "merged")
            bar.update()
    return rows


def merged_policy(experiment: Experiment, adapters: Mapping[str, Path]) -> Policy:
    """The base model with all adapters, by aspect."""
    import peft

    base: Any = experiment.model.load(experiment.workers.device, frozen=True)
    (first, folder), *others = adapters.items()
    model = peft.PeftModel.from_pretrained(base, str(folder), adapter_name=first)
    for aspect, folder in others:
        model.load_adapter(str(folder), adapter_name=aspect)
    return Policy(model.eval(), experiment.model.tokenization)


def check(told: Finished, alone: Sequence[Finished]) -> dict[str, Finished]:
    """The policies of one aspect, by aspect.

    Raises:
        UserError: they do not belong together.
    """
    if not told.config["lambda"]["condition"]:
        raise UserError(f"{told.folder}: this policy was not told lambda (lambda.condition=true)")
    for run in alone:
        for section in SHARED:
            if run.config[section] != told.config[section]:
                raise UserError(f"{run.folder}: its {section} is not that of {told.folder}")
    rows = pq.read_table(told.folder / "trade_off.parquet", columns=["aspect"])
    aspects = list(dict.fromkeys(rows["aspect"].to_pylist()))
    by_aspect = {run.aspect: run for run in alone}
    if lacking := [aspect for aspect in aspects if aspect not in by_aspect]:
        raise UserError(f"no run was given that was trained on {lacking[0]} alone")
    return {aspect: by_aspect[aspect] for aspect in aspects}
