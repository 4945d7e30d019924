"""From a composed configuration to a finished run, for ``train.py`` and the jobs of a sweep."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from mrpo_lab import configs
from mrpo_lab.data.dataset import Dataset, Prepared, describe
from mrpo_lab.data.texts import Item, byte_lengths
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.models.policy import PolicyConfig
from mrpo_lab.models.references import Reference, ReferenceScores, ReferenceSet
from mrpo_lab.objective.aspect_weighting import LambdaSampler
from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.units import ReplyLengths, in_unit
from mrpo_lab.objective.weighting import Weighting
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.inputs import local_inputs
from mrpo_lab.runs.summary import print_summary
from mrpo_lab.runs.tracking import LocalTracker, Tracker
from mrpo_lab.scoring.memory import fitting
from mrpo_lab.seeding import Seeds
from mrpo_lab.storage.hub import NotAtHandError, missing
from mrpo_lab.training.config import TrainConfig
from mrpo_lab.training.determinism import deterministic_algorithms
from mrpo_lab.training.inputs import Data, PolicyTokens
from mrpo_lab.training.interruption import Interruption
from mrpo_lab.training.recorder import Recorder
from mrpo_lab.training.result import compose_result
from mrpo_lab.training.trainer import Trainer
from mrpo_lab.training.workers import Workers

logger = logging.getLogger(__name__)

UNFIT = ("this run", "give it more memory, or take a smaller model or less data")
"""What is said where memory runs out and no setting alone is the cause."""


def run_experiment(
    cfg: DictConfig, name: str, interruption: Interruption | None = None
) -> dict[str, Any]:
    """Train the run called ``name``, or return its result if it is finished.

    Args:
        interruption: by which a signal asks the run to save itself.

    Raises:
        UserError: something that the user can fix, in one line.
    """
    resolved = configs.check(cfg)
    run = Run.open(Path(cfg.outputs), name, resolved)
    finished = run.finished()
    run.check_inputs(finished=finished is not None)
    if finished is not None:
        print_summary(run.folder, finished)
        return finished
    workers = Workers.start()
    locked = run.locked() if workers.is_main else nullcontext()
    with fitting(*UNFIT), undisturbed(), locked:
        run.inputs = local_inputs(resolved) if workers.is_main else {}
        experiment = Experiment.build(cfg, workers)
        recorder = Recorder(run, experiment.tracker, resolved, active=workers.is_main)
        with deterministic_algorithms(experiment.deterministic):
            result = experiment.train(recorder, interruption)
        workers.wait()
    if workers.is_main:
        print_summary(run.folder, result)
    return result


def score_reference(cfg: DictConfig, slug: str) -> int:
    """Store the scores of one reference that a run of ``cfg`` needs; returns the number of items.

    Raises:
        UserError: something that the user can fix, in one line.
    """
    configs.check(cfg)
    experiment = Experiment.build(cfg, Workers.start())
    experiment.check_tracker()  # the runs that wait for these scores would be refused
    alone = replace(experiment.references, use=[slug])
    with fitting(*UNFIT):
        prepared = experiment.prepare(alone.members)
        alone.scores(prepared.items, prepared.ids, experiment.workers.device)
    return len(prepared.items)


@dataclass(frozen=True)
class Experiment:
    """The objects that a configuration describes.

    Building them checks every value and loads nothing, so that mistakes are found in seconds.
    """

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
    deterministic: bool = False
    """Whether results are the same bit for bit on a GPU too; see ``deterministic_algorithms``."""

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)

    @classmethod
    def build(cls, cfg: DictConfig, workers: Workers) -> Experiment:
        """Build all objects of a configuration that ``configs.check`` has passed.

        Raises:
            UserError: a constructor refused a value; names the key.
        """
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
            deterministic=cfg.get("deterministic", False),
        )

    def train(self, recorder: Recorder, interruption: Interruption | None = None) -> dict[str, Any]:
        """Prepare the data, score the references, train the policy, and record the result."""
        began = time.monotonic()
        self.check_tracker()
        prepared = self.prepare()
        if self.threads is not None:  # only from here on: building tiny7 uses all cores
            torch.set_num_threads(self.threads)
        refs, findings = self.reference_scores(prepared)
        data = self.data(prepared, refs)
        policy = self.model.build(self.workers.device, self.seeds.value("init"))
        mean_lambda = self.sampler.mean_lambda(prepared.labels.aspects)
        trainer = Trainer(
            config=self.config,
            policy=policy,
            data=data,
            loss=self.loss,
            weighting=self.weighting,
            sampler=self.sampler,
            optimizer=self.optimizer,
            seeds=self.seeds,
            workers=self.workers,
            recorder=recorder,
            interruption=interruption,
        )
        sampled = [int(i) for i in data.test[: self.config.samples]]
        prompts = [data.tokens.prompt(i, mean_lambda) for i in sampled]
        before = policy.generate(prompts, self.config.sample_tokens)
        trainer.start()
        try:
            with fitting(*UNFIT):
                trainer.fit()
        except (Exception, KeyboardInterrupt) as error:
            recorder.fail(error, trainer.state)
            raise
        after = policy.generate(prompts, self.config.sample_tokens)
        trade_off = [*trainer.state.base_trade_off, *trainer.trade_off("trained")]
        result = compose_result(
            trainer.state,
            data,
            mean_lambda,
            epochs=self.config.epochs,
            trade_off=trade_off,
            counts=prepared.counts,
            findings=findings,
            setup_seconds=time.monotonic() - began - trainer.state.seconds,
            peak_memory_gib=peak_memory() / 2**30,
            samples=[
                {"prompt": prompt[-1]["content"], "before": b, "after": a}
                for prompt, b, a in zip(prompts, before, after, strict=True)
            ],
        )
        target = trainer.evaluation.target(data.test)
        recorder.finish(result, policy, data, target, self.loss, trainer.state, trade_off)
        self.workers.wait()
        return result

    def check_tracker(self) -> None:
        """Refuse what the environment would make impossible for the tracker.

        Raises:
            UserError: says what is wrong and what to do.
        """
        with named("tracker", type(self.tracker)):
            self.tracker.check()

    def prepare(self, scored: Sequence[Reference] | None = None) -> Prepared:
        """Read the data and filter it by the tokenizers of all references and of the policy.

        Args:
            scored: references whose weights will be needed (default: those in use); a damaged file
                of another one does not matter.

        Raises:
            UserError: data or models are missing (all of them are named), or do not fit.
        """
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
        for model in (self.model, *(self.references.members if scored is None else scored)):
            model.check_files()
        self.workers.main_first(self.model.check)
        distinct = {str(m.tokenization.key): m.tokenization for m in models}
        positions = min((m.positions for m in models if m.positions), default=None)
        prepared = self.workers.main_first(
            lambda: self.dataset.prepare(
                items, list(distinct.values()), self.seeds.rng("split"), positions
            )
        )
        if self.workers.is_main:
            logger.info("data: %s", describe(prepared.counts))
        self.check(prepared)
        return prepared

    def check(self, prepared: Prepared) -> None:
        """Check the settings against the data before any model is loaded.

        Raises:
            UserError: a setting does not fit; names its section.
        """
        num_val, labels = len(prepared.splits["val"]), prepared.labels
        with named("weighting", type(self.weighting)):
            self.weighting.check(self.references.slugs, num_val)
        with named("lambda", type(self.sampler)):
            self.sampler.check(labels.aspects, num_val)
        with named("loss.link", self.loss.link):
            self.loss.check(labels.targets.shape[-1])
        self.tokens(prepared).check()

    def reference_scores(self, prepared: Prepared) -> ReferenceScores:
        """Reference scores of the pool, and the gate's findings; what is not stored is computed.

        Raises:
            UserError: a check of the gate failed and ``reference_set.gate`` is stop.
        """
        items, ids, device = prepared.items, prepared.ids, self.workers.device
        return self.workers.main_first(lambda: self.references.scores(items, ids, device))

    def tokens(self, prepared: Prepared, conditioned: bool | None = None) -> PolicyTokens:
        """The pool's token rows under the policy's tokenizer; see ``data``."""
        conditioned = self.sampler.condition if conditioned is None else conditioned
        aspects = prepared.labels.aspects
        return PolicyTokens(self.model.tokenization, prepared.items, aspects, conditioned)

    def data(self, prepared: Prepared, refs: Scores, conditioned: bool | None = None) -> Data:
        """Everything the training loop needs.

        Args:
            refs: reference scores (N, K, R) of the pool.
            conditioned: whether the policy is given lambda in its prompt (default: as configured).
        """
        loss_unit, lengths = self.loss.resolved_unit, self.reply_lengths(prepared)
        return Data(
            items=prepared.items,
            tokens=self.tokens(prepared, conditioned),
            refs=refs,
            loss_refs=in_unit(refs, loss_unit, lengths),
            weighting_refs=in_unit(refs, self.weighting.unit, lengths),
            loss_lengths=lengths.bytes if lengths and loss_unit == "byte" else None,
            labels=prepared.labels,
            slugs=self.references.slugs,
            train=prepared.splits["train"],
            val=prepared.splits["val"],
            test=prepared.splits["test"],
            ids=prepared.ids,
            fingerprint=prepared.fingerprint(),
        )

    def reply_lengths(self, prepared: Prepared) -> ReplyLengths | None:
        """Lengths of the replies, where the unit of the loss or of the weighting needs them."""
        if {self.loss.resolved_unit, self.weighting.unit} <= {"token", "reply"}:
            return None
        policy = self.model.tokenization.lengths(prepared.items, prepared.ids).reply
        return ReplyLengths(
            policy_tokens=torch.from_numpy(policy.astype(np.int64)),
            bytes=torch.from_numpy(byte_lengths(prepared.items)),
        )


def check_optimizer(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """Check the settings of an optimizer, which it only does when it is given parameters.

    Raises:
        UserError: one is out of range.
    """
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise UserError(f"optimizer: {first_line(error)}") from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave torch's number of threads and random state as they are: a notebook goes on."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def named(section: str, function: Any) -> Iterator[None]:
    """Give a ValueError about the arguments of ``function`` its full key, as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(configs.named(section, function, str(error))) from error


@contextmanager
def collecting(absent: list[NotAtHandError]) -> Iterator[None]:
    """Collect what is not to be had from the hub, so that one message can name all of it."""
    try:
        yield
    except NotAtHandError as error:
        absent.append(error)


def peak_memory() -> int:
    """Largest memory use so far in bytes: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
