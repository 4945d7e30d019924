"""The training loop. One turn is one optimizer step on one global batch."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from mrpo_lab.data.texts import Replies
from mrpo_lab.errors import UserError
from mrpo_lab.models.policy import Policy
from mrpo_lab.objective.aspect_weighting import LambdaContext, LambdaSampler
from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.scores import Scores, per_prompt
from mrpo_lab.objective.weighting import Context, Weighting, to_simplex
from mrpo_lab.progress import progress
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.test_pairs import write_test_pairs
from mrpo_lab.runs.tracking import Tracker
from mrpo_lab.runs.trade_off import named_lambda, write_trade_off
from mrpo_lab.scoring.packing import balanced
from mrpo_lab.seeding import Seeds
from mrpo_lab.training.config import LoopState, TrainConfig
from mrpo_lab.training.diagnosis import explain_gradient, explain_loss, explain_weights
from mrpo_lab.training.evaluation import Data, Evaluation
from mrpo_lab.training.interruption import Interruption
from mrpo_lab.training.metrics import batch_metrics
from mrpo_lab.training.state_file import load_state, save_state
from mrpo_lab.training.workers import Workers

logger = logging.getLogger(__name__)


class Trainer:
    """Owns the loop and its state; owns no loss and no weighting."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        data: Data,
        loss: PreferenceLoss,
        weighting: Weighting,
        sampler: LambdaSampler,
        optimizer: Callable[..., torch.optim.Optimizer],
        seeds: Seeds,
        workers: Workers,
        run: Run,
        tracker: Tracker,
        interruption: Interruption | None = None,
    ) -> None:
        self.interruption = interruption or Interruption()
        self.config, self.policy, self.data = config, policy, data
        self.loss, self.weighting, self.sampler, self.seeds = loss, weighting, sampler, seeds
        self.run, self.tracker, self.workers = run, tracker, workers
        self.optimizer = optimizer(list(policy.trainable.values()))
        self.steps_per_epoch = -(-len(data.train) // config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.scheduler = get_scheduler(
            f"{config.schedule}_with_warmup" if config.schedule == "constant" else config.schedule,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self.total_steps,
        )
        marks = np.linspace(0, self.total_steps, config.evaluations + 1)[1:].round().astype(int)
        self.evaluation_steps = {*marks.tolist(), self.total_steps}
        self.state = LoopState(alpha_sum=[0.0] * len(data.slugs))
        centre = sampler.centre(data.labels.aspects)
        self.evaluation = Evaluation(policy, data, loss, workers, config.token_budget, centre)

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoint" / "state.safetensors"

    def start(self, resolved: dict[str, Any]) -> None:
        """Fit the weighting, restore the state, open the run's files and its tracker."""
        self.weighting.start(
            Context(
                slugs=self.data.slugs,
                val=self.data.references(self.data.val.tolist(), self.evaluation.centre),
                probe=self.evaluation.probe,
                rng=self.seeds.rng("weighting"),
            )
        )
        self.sampler.start(
            LambdaContext(
                aspects=self.data.labels.aspects,
                rng=self.seeds.rng("lambda"),
                probe_loss=lambda subset: self.evaluation.probe_loss(subset, self.mean_alpha),
                num_val=len(self.data.val),
            )
        )
        self.restore()
        if self.workers.is_main:
            self.run.begin()
            mirrored = self.run.rewind(self.state.step if self.checkpoint.exists() else -1)
            self.tracker.start(self.run.folder, self.run.name, resolved, mirrored)
        self.workers.wait()

    def fit(self) -> None:
        """Train from where the state is to the last step."""
        started = time.monotonic() - self.state.seconds
        bar = progress(
            self.total_steps,
            "training",
            "step",
            initial=self.state.step,
            disable=not self.workers.is_main,
        )
        with bar, self.interruption.training():
            if self.state.step == 0:
                bar.set_postfix_str("evaluating the base model")
                self.state.latest = self.evaluate()
                self.state.base = {
                    f"base/{k.replace('/', '_')}": v for k, v in self.state.latest.items()
                }
                self.state.base_test = self.state.latest_test
                self.state.base_trade_off = self.trade_off("base")
                self.record(self.state.latest)
            while self.state.step < self.total_steps:
                metrics = self.train_step(self.batch(self.state.step))
                self.state.step += 1
                if self.state.step in self.evaluation_steps:
                    bar.set_postfix_str("evaluating")
                    self.state.latest = self.evaluate()
                    metrics |= self.state.latest
                self.record(metrics)
                self.state.seconds = time.monotonic() - started
                asked = self.workers.any(self.interruption.asked)
                if (
                    asked
                    or self.state.step % self.config.checkpoint_every == 0
                    or self.state.step == self.total_steps
                ):
                    self.save()
                if asked:
                    self.interruption.answer()
                loss, test = metrics["train/loss"], self.state.latest["test/accuracy"]
                bar.set_postfix_str(f"loss {loss:.4f}, test {test:.3f}", refresh=False)
                bar.update()

    def batch(self, step: int) -> np.ndarray:
        """Pool indices of a step: a pure function, so that resuming needs no loader's state."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self.seeds.rng("order", epoch).permutation(len(self.data.train))
        size = self.config.batch_size
        return self.data.train[order[index * size : (index + 1) * size]]

    def train_step(self, pairs: np.ndarray) -> dict[str, float]:
        """One optimizer step on the global batch ``pairs``."""
        began = time.monotonic()
        torch.manual_seed(self.seeds.value("dropout", self.state.step, self.workers.rank))
        weights = self.sampler.draw()
        refs = self.data.references(pairs.tolist(), weights)
        proportions = self.weighting.proportions(refs)
        if not bool(torch.isfinite(proportions).all()):
            names = [self.data.names(int(i)) for i in pairs]
            explained = explain_weights(proportions, refs, self.data.slugs, names)
            raise UserError(f"step {self.state.step + 1}: {explained}")
        alpha, undecided = to_simplex(proportions, len(pairs))
        rows = self.data.tokens(pairs.tolist(), weights)
        policy = self.backward_batch(rows, refs, alpha)
        self.refuse_infinite_loss(policy, refs, alpha, pairs)
        metrics = batch_metrics(self.loss, policy, refs, alpha, self.data.slugs)
        metrics["train/grad_norm"] = self.gradient_norm(pairs, rows, refs, alpha)
        metrics["train/lr"] = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.evaluation.forget()
        if self.config.accuracy_after_step:
            after = self.evaluation.score(pairs, weights)
            metrics["train/accuracy_after"] = float(after.accuracy())
        self.weighting.after_step(refs)
        self.sampler.after_step()
        self.state.alpha_sum = (alpha.mean(0).numpy() + self.state.alpha_sum).tolist()
        self.state.undecided += undecided
        metrics["alpha/undecided_pairs"] = float(undecided)
        metrics["perf/pairs_per_second"] = len(pairs) / (time.monotonic() - began)
        if self.data.lists:
            metrics |= named_lambda(self.data.labels.aspects, weights)
        return metrics | self.weighting.metrics() | self.sampler.metrics()

    def backward_batch(self, rows: Sequence[Replies], refs: Scores, alpha: Tensor) -> Scores:
        """Gradients of the batch's mean loss, from this process's share of it in micro-batches;
        the policy's scores of the whole batch, as they were before the step."""
        share = list(self.workers.share(len(rows)))
        costs = self.policy.scorer.costs([rows[i] for i in share])
        scored, mine = [], []
        for group in balanced(costs, self.config.micro_batch_tokens):
            part = [share[i] for i in group]
            micro_batch = [rows[i] for i in part]
            scored.append(self.backward(micro_batch, refs[part], alpha[part], len(rows)))
            mine += part
        return self.evaluation.gather(scored, mine, len(rows))

    def backward(
        self, rows: Sequence[Replies], refs: Scores, alpha: Tensor, batch_size: int
    ) -> Scores:
        """Forward and backward of one micro-batch, scaled so that all sum to the batch's mean."""
        device = self.workers.device
        self.policy.model.train()
        replies, width = [len(item) for item in rows], refs.sums.shape[-1]
        sums, counts = self.policy.scorer.logps(rows)
        policy = Scores(per_prompt(sums, replies, width), per_prompt(counts, replies, width))
        output = self.loss(policy, refs.to(device), alpha.to(device))
        (output.loss.sum() / batch_size).backward()
        return Scores(policy.sums.detach(), policy.counts)

    def gradient_norm(
        self, pairs: np.ndarray, rows: Sequence[Replies], refs: Scores, alpha: Tensor
    ) -> float:
        """Sum gradients over processes, clip if asked to, and refuse what is not finite."""
        parameters = self.policy.trainable
        self.workers.sum_gradients(parameters.values())
        limit = self.config.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
        if not np.isfinite(norm):
            explained = explain_gradient(
                lambda i: self.backward([rows[i]], refs[[i]], alpha[[i]], len(rows)),
                parameters,
                self.loss,
                refs,
                self.data.slugs,
                [self.data.names(int(i)) for i in pairs],
            )
            raise UserError(f"step {self.state.step + 1}: {explained}")
        return norm

    def refuse_infinite_loss(
        self, policy: Scores, refs: Scores, alpha: Tensor, pairs: np.ndarray
    ) -> None:
        """Stop before the step, so that neither weights nor checkpoint are spoilt."""
        if not bool(torch.isfinite(self.loss(policy, refs, alpha).loss).all()):
            names = [self.data.names(int(i)) for i in pairs]
            explained = explain_loss(self.loss, policy, refs, alpha, self.data.slugs, names)
            raise UserError(f"step {self.state.step + 1}: {explained}")

    def evaluate(self) -> dict[str, float]:
        """Accuracy, and of lists how they are ranked."""
        found = self.evaluation.accuracy()
        test = self.evaluation.score(self.data.test)
        self.state.latest_test = {"sums": test.sums, "counts": test.counts}
        return found | (self.evaluation.rankings(self.mean_alpha) if self.data.lists else {})

    @property
    def mean_alpha(self) -> Tensor:
        """(K,) over the steps so far; equal before the first."""
        total = torch.tensor(self.state.alpha_sum, dtype=torch.float64)
        return total / total.sum() if self.state.step else torch.full_like(total, 1 / len(total))

    def trade_off(self, policy: str) -> list[dict[str, Any]]:
        """How lists are ranked under each lambda that the sampler wants tried."""
        if not self.data.lists:
            return []
        points = self.sampler.points(self.data.labels.aspects)
        return self.evaluation.trade_off(points, self.mean_alpha, policy)

    def record(self, metrics: dict[str, float]) -> None:
        if self.workers.is_main:
            self.run.log(self.state.step, metrics)
            self.tracker.log(self.state.step, metrics)

    def fail(self, error: BaseException) -> None:
        """Record a run that could not go on; the last checkpoint stays as it was."""
        interrupted = isinstance(error, KeyboardInterrupt)
        failure = {
            "status": "interrupted" if interrupted else "failed",
            "error": str(error) or type(error).__name__,
            "steps": self.state.step,
            "wall_seconds": round(self.state.seconds, 3),
        }
        if not isinstance(error, (UserError, KeyboardInterrupt)):
            failure["traceback"] = "".join(traceback.format_exception(error))
        if self.workers.is_main:
            self.run.finish(failure)
            self.tracker.finish(failure, failed=True)

    def finish(self, result: dict[str, Any], trade_off: list[dict[str, Any]]) -> None:
        """Save what was trained, then the result, which marks the run as done."""
        if self.workers.is_main:
            self.policy.save(self.run.folder / "adapter")
            refs = self.data.references(self.data.test.tolist(), self.evaluation.centre)
            before, after = self.state.base_test, self.state.latest_test
            write_test_pairs(
                self.run.folder / "test_pairs.parquet",
                self.data.ids[self.data.test],
                self.data.slugs,
                refs,
                Scores(**before, target=refs.target),
                Scores(**after, target=refs.target),
                self.loss,
            )
            if trade_off:
                write_trade_off(self.run.folder / "trade_off.parquet", trade_off)
            self.run.finish(result)
            self.tracker.finish(result)
        self.workers.wait()

    def result(self) -> dict[str, Any]:
        """What a finished run is compared by."""
        splits = {"train": self.data.train, "val": self.data.val, "test": self.data.test}
        centre = self.evaluation.centre
        tables = {n: self.data.references(splits[n].tolist(), centre) for n in ("val", "test")}
        alpha = np.array(self.state.alpha_sum) / self.total_steps
        return {
            "status": "finished",
            **self.state.latest,
            **self.state.base,
            "references": {
                slug: {
                    "mean_alpha": float(alpha[k]),
                    "val_accuracy": float(tables["val"].accuracy()[k]),
                    "test_accuracy": float(tables["test"].accuracy()[k]),
                    "val_mean_abs_margin": float(tables["val"].margins()[:, k].abs().mean()),
                    "test_mean_abs_margin": float(tables["test"].margins()[:, k].abs().mean()),
                }
                for k, slug in enumerate(self.data.slugs)
            },
            "pairs": {name: len(ids) for name, ids in splits.items()},
            "steps": self.state.step,
            "wall_seconds": round(self.state.seconds, 3),
            "pairs_per_second": round(
                len(self.data.train) * self.config.epochs / self.state.seconds, 3
            ),
            "undecided_pairs": self.state.undecided,
        }

    def save(self) -> None:
        """Everything that must survive, in one file."""
        if self.workers.is_main:
            save_state(self.checkpoint, self.state_dict())
            self.run.write_alpha(self.data.slugs)
        self.workers.wait()

    def state_dict(self) -> dict[str, Any]:
        return {
            "data": self.data.fingerprint,
            "loop": asdict(self.state),
            "trainable": self.policy.trainable,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "weighting": self.weighting.state_dict(),
            "lambda": self.sampler.state_dict(),
        }

    def restore(self) -> None:
        """Continue from the checkpoint, if any, and forget what was logged after it."""
        if not self.checkpoint.exists():
            return
        state = load_state(self.checkpoint)
        if state["data"] != self.data.fingerprint:
            raise UserError(
                f"{self.checkpoint} was trained on other data than {self.run.name} has now: "
                "delete its folder to start over"
            )
        with torch.no_grad():
            for name, parameter in self.policy.trainable.items():
                parameter.copy_(state["trainable"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.weighting.load_state_dict(state["weighting"])
        self.sampler.load_state_dict(state["lambda"])
        self.state = LoopState(**state["loop"])
        logger.info("resuming after step %d of %d", self.state.step, self.total_steps)
