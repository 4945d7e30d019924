"""From a composed configuration to a finished run: what ``train.py`` calls."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mrpo_lab import configs
from mrpo_lab.data.conditioning import conditioned
from mrpo_lab.data.dataset import Dataset, Prepared, describe
from mrpo_lab.data.texts import Item, Message, Replies
from mrpo_lab.errors import UserError
from mrpo_lab.models.gate import Finding
from mrpo_lab.models.policy import PolicyConfig
from mrpo_lab.models.references import ReferenceSet
from mrpo_lab.objective.aspect_weighting import LambdaSampler
from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.weighting import Weighting
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.summary import summary
from mrpo_lab.runs.tracking import LocalTracker, Tracker
from mrpo_lab.runs.trade_off import hypervolumes
from mrpo_lab.seeding import Seeds
from mrpo_lab.storage.hub import NotAtHandError, missing
from mrpo_lab.training.config import TrainConfig
from mrpo_lab.training.evaluation import Data, Tokenize
from mrpo_lab.training.interruption import Interruption
from mrpo_lab.training.trainer import Trainer
from mrpo_lab.training.workers import Workers

logger = logging.getLogger(__name__)


def run_experiment(
    cfg: DictConfig, name: str, interruption: Interruption | None = None
) -> dict[str, Any]:
    """Train the run ``name``, or return its result if it is finished.

    Args:
        interruption: asks the run to save itself, if somebody may.

    Raises:
        UserError: what the user can mend, in one line.
    """
    resolved = configs.check(cfg)
    run = Run.open(Path(cfg.outputs), name, resolved)
    if run.result:
        print(summary(run.folder, run.result), flush=True)
        return run.result
    workers = Workers.start()
    with run.held() if workers.is_main else nullcontext():
        experiment = Experiment.build(cfg, workers)
        result = experiment.train(run, resolved, interruption)
        workers.wait()
    if workers.is_main:
        print(summary(run.folder, result), flush=True)
    return result


def score_reference(cfg: DictConfig, slug: str) -> int:
    """Put into the store what a run of ``cfg`` will ask of one reference; the number of pairs.

    Raises:
        UserError: what the user can mend, in one line.
    """
    configs.check(cfg)
    experiment = Experiment.build(cfg, Workers.start())
    prepared = experiment.prepare()
    alone = replace(experiment.references, use=[slug])
    alone.scores(prepared.items, prepared.ids, experiment.workers.device)
    return len(prepared.items)


@dataclass(frozen=True)
class Experiment:
    """The objects that a configuration describes. Building them checks every value and loads
    nothing, so that mistakes are found in seconds."""

    seeds: Seeds
    config: TrainConfig
    dataset: Dataset
    references: ReferenceSet
    model: PolicyConfig
    loss: PreferenceLoss
    weighting: Weighting
    sampler: LambdaSampler
    optimizer: Callable[..., torch.optim.Optimizer]
    tracker: Tracker
    workers: Workers
    threads: int | None

    def __post_init__(self) -> None:
        try:  # an optimizer checks its values when it is given parameters
            self.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except ValueError as error:
            raise UserError(f"optimizer: {error}") from error

    @classmethod
    def build(cls, cfg: DictConfig, workers: Workers) -> Experiment:
        return cls(
            seeds=configs.build(cfg, "seed"),
            config=configs.build(cfg, "train"),
            dataset=configs.build(cfg, "dataset"),
            references=configs.build(cfg, "reference_set"),
            model=configs.build(cfg, "model"),
            loss=configs.build(cfg, "loss"),
            weighting=configs.build(cfg, "weighting"),
            sampler=configs.build(cfg, "lambda"),
            optimizer=configs.build(cfg, "optimizer"),
            tracker=configs.build(cfg, "tracker") if workers.is_main else LocalTracker(),
            workers=workers,
            threads=cfg.threads,
        )

    def train(
        self, run: Run, resolved: dict[str, Any], interruption: Interruption | None = None
    ) -> dict[str, Any]:
        """Data, reference scores, policy, training, result."""
        began = time.monotonic()
        prepared = self.prepare()
        if self.threads is not None:  # from here on: tiny7, if it had to be built, used all cores
            torch.set_num_threads(self.threads)
        data, findings = self.data_and_findings(prepared)
        policy = self.model.build(self.workers.device, self.seeds.value("init"))
        trainer = Trainer(
            self.config,
            policy,
            data,
            self.loss,
            self.weighting,
            self.sampler,
            self.optimizer,
            self.seeds,
            self.workers,
            run,
            self.tracker,
            interruption,
        )
        prompts = [self.prompt(prepared, i) for i in data.test[: self.config.samples]]
        before = policy.generate(prompts, self.config.sample_tokens)
        trainer.start(resolved)
        try:
            trainer.fit()
        except (Exception, KeyboardInterrupt) as error:
            trainer.fail(error)
            raise
        after = policy.generate(prompts, self.config.sample_tokens)
        trade_off = [*trainer.state.base_trade_off, *trainer.trade_off("trained")]
        result = {
            **trainer.result(),
            **({"hypervolume": hypervolumes(trade_off, "pairwise")} if trade_off else {}),
            "counts": prepared.counts,
            "gate": [asdict(finding) for finding in findings],
            "setup_seconds": round(time.monotonic() - began - trainer.state.seconds, 3),
            "peak_memory_gib": round(peak_memory() / 2**30, 3),
            "samples": [
                {"prompt": prompt[-1]["content"], "before": b, "after": a}
                for prompt, b, a in zip(prompts, before, after, strict=True)
            ],
        }
        trainer.finish(result, trade_off)
        return result

    def prompt(self, prepared: Prepared, item: int) -> tuple[Message, ...]:
        """What the policy is asked, told the mean lambda if it is told any."""
        prompt, aspects = prepared.items[item].prompt, prepared.labels.aspects
        if not self.sampler.condition:
            return prompt
        return conditioned(prompt, aspects, self.sampler.centre(aspects).tolist())

    def prepare(self) -> Prepared:
        """The pairs, filtered by the tokenizers of all references and of the policy."""
        models = [self.model, *self.references.all]
        absent: list[NotAtHandError] = []
        items: Sequence[Item] = ()
        with collecting(absent):
            items = self.dataset.read()
        for model in models:
            with collecting(absent):
                model.fetch()
        if absent:
            raise UserError(missing(absent))
        distinct = {m.tokenization.fingerprint: m.tokenization for m in models}
        prepared = self.workers.main_first(
            lambda: self.dataset.prepare(items, list(distinct.values()), self.seeds.rng("split"))
        )
        if self.workers.is_main:
            logger.info("data: %s", describe(prepared.counts))
        self.check(prepared)
        return prepared

    def check(self, prepared: Prepared) -> None:
        """Refuse what does not fit the data before any model is loaded."""
        num_val, labels = len(prepared.splits["val"]), prepared.labels
        with named("weighting"):
            self.weighting.check(self.references.slugs, num_val)
        with named("lambda"):
            self.sampler.check(labels.aspects, num_val)
        with named("loss.link"):
            self.loss.check(labels.targets.shape[-1])

    def data(self, prepared: Prepared) -> Data:
        """Reference scores from the store, filled first where needed, and the policy's tokens."""
        return self.data_and_findings(prepared)[0]

    def data_and_findings(self, prepared: Prepared) -> tuple[Data, list[Finding]]:
        """``data``, and the checks of the gate that a reference failed."""
        items, device = prepared.items, self.workers.device
        refs, findings = self.workers.main_first(
            lambda: self.references.scores(items, prepared.ids, device)
        )
        told = self.sampler.condition
        data = Data(
            tokenize=self.telling(prepared) if told else self.untold(prepared),
            told=told,
            refs=refs,
            labels=prepared.labels,
            slugs=self.references.slugs,
            train=prepared.splits["train"],
            val=prepared.splits["val"],
            test=prepared.splits["test"],
            ids=prepared.ids,
            names=lambda i: f"pair {i} of the pool ({items[i].prompt[-1]['content'][:60]!r})",
            fingerprint=prepared.fingerprint(),
        )
        return data, findings

    def untold(self, prepared: Prepared) -> Tokenize:
        """The policy's tokens, found out when they are first needed."""
        known: dict[int, Replies] = {}

        def tokenize(chosen: Sequence[int], _: list[float]) -> list[Replies]:
            new = [i for i in dict.fromkeys(chosen) if i not in known]
            known.update(zip(new, self.rows([prepared.items[i] for i in new]), strict=True))
            return [known[i] for i in chosen]

        return tokenize

    def telling(self, prepared: Prepared) -> Tokenize:
        """The policy's tokens with lambda in the system message."""
        aspects = prepared.labels.aspects

        def tokenize(chosen: Sequence[int], weights: list[float]) -> list[Replies]:
            items = [prepared.items[i] for i in chosen]
            prompts = [conditioned(item.prompt, aspects, weights) for item in items]
            return self.rows([replace(i, prompt=p) for i, p in zip(items, prompts, strict=True)])

        return tokenize

    def rows(self, items: Sequence[Item]) -> list[Replies]:
        """The policy's tokens."""
        rows = [row for row in self.model.tokenization.rows(items) if row is not None]
        if len(rows) < len(items):  # as it is, every prompt has passed the filters
            raise UserError("lambda.condition: the policy's template refuses a system message")
        return rows


@contextmanager
def named(section: str) -> Iterator[None]:
    """Say where in the configuration a value that does not fit is."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{section}: {error}") from error


@contextmanager
def collecting(absent: list[NotAtHandError]) -> Iterator[None]:
    """Note what the hub does not give and go on, so that one message can name all of it."""
    try:
        yield
    except NotAtHandError as error:
        absent.append(error)


def peak_memory() -> int:
    """Most bytes held so far: on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
