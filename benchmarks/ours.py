"""This project's trainer without a configuration, and a clock for its functions."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.types import RunMode
from omegaconf import DictConfig

from benchmarks.workload import BETA
from mrpo_lab.composition import open_hydra, without_hydra
from mrpo_lab.data.texts import TokenRow
from mrpo_lab.models.policy import Policy
from mrpo_lab.objective.aspect_weighting import FixedLambda
from mrpo_lab.objective.labels import Labels
from mrpo_lab.objective.losses import PreferenceLoss, dpo, logistic, no_clip
from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.weighting import Weighting
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.tracking import LocalTracker
from mrpo_lab.seeding import Seeds
from mrpo_lab.training.config import TrainConfig
from mrpo_lab.training.inputs import Data, PolicyTokens
from mrpo_lab.training.recorder import Recorder
from mrpo_lab.training.trainer import Trainer
from mrpo_lab.training.workers import Workers

CONF = Path(__file__).parents[1] / "conf"
DPO = PreferenceLoss(combine=dpo, link=logistic, clip=no_clip, beta=BETA, length_normalized=False)


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration that ``train.py OVERRIDE ...`` would run."""
    return without_hydra(open_hydra(CONF).compose_config("config", list(overrides), RunMode.RUN))


@contextmanager
def trainer_of(
    policy: Policy,
    rows: list[tuple[TokenRow, ...]],
    refs: Scores,
    config: TrainConfig,
    weighting: Weighting,
    loss: PreferenceLoss = DPO,
    splits: tuple[int, int] | None = None,
) -> Iterator[Trainer]:
    """A trainer ready for its first step, in a temporary folder.

    Args:
        rows: token rows of N pairs.
        refs: reference scores (N, K, 2).
        splits: numbers of validation and test pairs, which are the last of ``rows``; None puts all
            pairs into every split.
    """
    train = val = test = np.arange(len(rows))
    if splits:
        train, val, test = np.split(train, [len(rows) - sum(splits), len(rows) - splits[1]])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config=config,
            policy=policy,
            data=Data(
                items=(),
                tokens=GivenTokens(rows),
                refs=refs,
                loss_refs=refs,
                weighting_refs=refs,
                loss_lengths=None,
                labels=Labels.of_pairs(len(rows)),
                slugs=[f"reference-{k}" for k in range(refs.sums.shape[1])],
                fingerprint="",
                ids=np.zeros((len(rows), 2), dtype="S16"),
                train=train,
                val=val,
                test=test,
            ),
            loss=loss,
            weighting=weighting,
            sampler=FixedLambda(),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
            seeds=Seeds(0),
            workers=Workers.start(),
            recorder=Recorder(Run(Path(folder), "bench", {}), LocalTracker(), {}, active=True),
        )
        trainer.start()
        yield trainer


class GivenTokens(PolicyTokens):
    """Token rows that are given instead of made from texts."""

    def __init__(self, given: list[tuple[TokenRow, ...]]) -> None:
        self.conditioned, self._given = False, given

    def rows(self, indices: Sequence[int], lambda_: torch.Tensor) -> list[tuple[TokenRow, ...]]:
        return [self._given[i] for i in indices]


class Clock:
    """Seconds spent in functions, and how often they were called, by name of the function."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def watch(self, owner: Any, name: str) -> None:
        """Measure all calls of ``owner.name`` from now on."""
        real = getattr(owner, name)
        self.seconds[name], self.calls[name] = 0.0, 0

        @functools.wraps(real)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1

        setattr(owner, name, timed)
