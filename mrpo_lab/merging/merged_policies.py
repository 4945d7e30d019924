"""Evaluate policies whose adapters were merged, beside one that is conditioned on lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor

from mrpo_lab import configs
from mrpo_lab.errors import UserError
from mrpo_lab.experiment import Experiment
from mrpo_lab.models.policy import Policy
from mrpo_lab.progress import progress
from mrpo_lab.runs.identity import difference
from mrpo_lab.runs.reading import open_run
from mrpo_lab.training.evaluation import Evaluation
from mrpo_lab.training.workers import Workers

SHARED = ("dataset", "model", "seed", "reference_set", "loss")
"""Sections of the configuration in which all runs must agree."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run on lists that trained an adapter."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    trade_off: list[dict[str, Any]]
    """Rows of its own ``trade_off.parquet``, without merged policies."""

    @classmethod
    def open(cls, folder: Path) -> FinishedRun:
        """Open the run in ``folder``.

        Raises:
            UserError: there is no run, or it is not finished, not on lists, or has no adapter; or
                a file is damaged.
        """
        run = open_run(folder)
        if run.result is None:
            raise UserError(f"{folder}: this run is not finished")
        table = run.table("trade_off.parquet")
        if table is None:
            raise UserError(f"{folder}: this run is not on lists with several aspects")
        if run.adapter is None or not (run.adapter / "adapter_config.json").exists():
            raise UserError(f"{folder}: no adapter to merge: this run trained all weights")
        rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
        return cls(folder, run.config, run.result, rows)

    @property
    def aspect(self) -> str:
        """The one aspect that the policy was trained on.

        Raises:
            UserError: there were several, or the policy is conditioned on lambda.
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
        """Weight of each reference, averaged over the steps of the run."""
        references = self.result["references"].values()
        return torch.tensor([r["mean_alpha"] for r in references], dtype=torch.float64)


def by_aspect(conditioned: FinishedRun, single: Sequence[FinishedRun]) -> dict[str, FinishedRun]:
    """Arrange the runs on one aspect by their aspects, in the order of the data set.

    Raises:
        UserError: a run does not belong to ``conditioned``, or there is none for an aspect.
    """
    if not conditioned.config["lambda"]["condition"]:
        raise UserError(
            f"{conditioned.folder}: this policy is not conditioned on lambda "
            "(lambda.condition=true); give the conditioned run first"
        )
    for run in single:
        for section in SHARED:
            if difference(run.config[section], conditioned.config[section], f"{section}."):
                raise UserError(f"{run.folder}: its {section} is not that of {conditioned.folder}")
    aspects = list(dict.fromkeys(row["aspect"] for row in conditioned.trade_off))
    runs = {run.aspect: run for run in single}
    if lacking := [aspect for aspect in aspects if aspect not in runs]:
        raise UserError(f"no run was given that was trained on {lacking[0]} alone")
    return {aspect: runs[aspect] for aspect in aspects}


def merged_trade_off(
    conditioned: FinishedRun, single: Mapping[str, FinishedRun]
) -> list[dict[str, Any]]:
    """Trade-off rows of the conditioned policy, of each single policy, and of their merges.

    Args:
        single: runs on one aspect, by aspect.
    """
    cfg = OmegaConf.create(conditioned.config)
    configs.check(cfg)
    experiment = Experiment.build(cfg, Workers.start())
    prepared = experiment.prepare()
    refs = experiment.reference_scores(prepared).scores
    # Merged policies consist of policies that have no lambda in their prompt.
    data = experiment.data(prepared, refs, conditioned=False)
    aspects = data.labels.aspects
    points = experiment.sampler.points(aspects)
    rows = list(conditioned.trade_off)
    for aspect, run in single.items():
        trained = (row for row in run.trade_off if row["policy"] == "trained")
        rows += [row | {"policy": f"{aspect} alone"} for row in trained]
    policy = load_adapters(experiment, {a: run.folder / "adapter" for a, run in single.items()})
    model: Any = policy.model
    alpha = torch.stack([run.alpha for run in single.values()]).mean(0)
    with progress(len(points), "merging", "lambda") as bar:
        for number, weights in enumerate(points):
            shares = [float(weights[aspects.index(aspect)]) for aspect in single]
            name = f"merged{number}"
            model.add_weighted_adapter(list(single), shares, name, combination_type="linear")
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


def load_adapters(experiment: Experiment, adapters: Mapping[str, Path]) -> Policy:
    """Load the base model with all ``adapters``, each under the name of its aspect."""
    import peft

    base: Any = experiment.model.load(experiment.workers.device)
    (first, folder), *others = adapters.items()
    model = peft.PeftModel.from_pretrained(base, str(folder), adapter_name=first)
    for aspect, folder in others:
        model.load_adapter(str(folder), adapter_name=aspect)
    return Policy(model.eval(), experiment.model.tokenization, experiment.model.kernels)
