"""The training loop: one iteration is one optimizer step on one global batch."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrpo_lab.errors import UserError
from mrpo_lab.models.policy import Policy
from mrpo_lab.objective.aspect_weighting import LambdaContext, LambdaSampler
from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.scores import Scores, per_prompt
from mrpo_lab.objective.weighting import Context, Weighting, to_simplex
from mrpo_lab.progress import progress
from mrpo_lab.runs.trade_off import named_lambda
from mrpo_lab.scoring.memory import PassSize, fitting
from mrpo_lab.seeding import Seeds
from mrpo_lab.training.config import TrainConfig
from mrpo_lab.training.diagnosis import (
    explain_gradient,
    explain_loss,
    explain_parameters,
    explain_weights,
)
from mrpo_lab.training.evaluation import Evaluation
from mrpo_lab.training.inputs import Batch, Data
from mrpo_lab.training.interruption import Interruption
from mrpo_lab.training.metrics import batch_metrics
from mrpo_lab.training.recorder import Recorder
from mrpo_lab.training.schedule import evaluation_steps, learning_rate_factor
from mrpo_lab.training.state import LoopState, load_checkpoint
from mrpo_lab.training.state_file import save_state
from mrpo_lab.training.workers import Workers

logger = logging.getLogger(__name__)


class Trainer:
    """Runs the loop and owns its state; the loss, the weighting and the recorder are given."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        policy: Policy,
        data: Data,
        loss: PreferenceLoss,
        weighting: Weighting,
        sampler: LambdaSampler,
        optimizer: Callable[..., torch.optim.Optimizer],
        seeds: Seeds,
        workers: Workers,
        recorder: Recorder,
        interruption: Interruption | None = None,
    ) -> None:
        self.config, self.policy, self.data = config, policy, data
        self.loss, self.weighting, self.sampler, self.seeds = loss, weighting, sampler, seeds
        self.workers, self.recorder = workers, recorder
        self.interruption = interruption or Interruption()
        self.pass_size = PassSize(config.micro_batch_tokens, "train.micro_batch_tokens")
        self.optimizer = optimizer(list(policy.trainable.values()))
        self.steps_per_epoch = -(-len(data.train) // config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            partial(
                learning_rate_factor,
                schedule=config.schedule,
                warmup_steps=config.warmup_steps,
                total_steps=self.total_steps,
            ),
        )
        self.evaluation_steps = evaluation_steps(config.evaluations, self.total_steps)
        self.state = LoopState(alpha_sum=[0.0] * len(data.slugs))
        mean_lambda = sampler.mean_lambda(data.labels.aspects)
        self.evaluation = Evaluation(policy, data, loss, workers, config.token_budget, mean_lambda)

    def start(self) -> None:
        """Fit the weighting, restore the state from a checkpoint if there is one, open files."""
        mean_lambda, val = self.evaluation.mean_lambda, self.data.val.tolist()
        self.weighting.start(
            Context(
                slugs=self.data.slugs,
                val=self.data.weighting_refs[val],
                target=self.data.target(val, mean_lambda),
                probe=self.evaluation.probe,
                rng=self.seeds.rng("weighting"),
            )
        )
        # A strong reference would be a cycle, which keeps the model until a garbage collection.
        this = weakref.proxy(self)
        self.sampler.start(
            LambdaContext(
                aspects=self.data.labels.aspects,
                rng=self.seeds.rng("lambda"),
                probe_loss=lambda subset: this.evaluation.probe_loss(subset, this.state.mean_alpha),
                num_val=len(self.data.val),
            )
        )
        if self.workers.is_main:
            # The first costs make the scorer decide how it computes.
            self.policy.scorer.costs(self.data.tokens.rows(self.batch(0).tolist(), mean_lambda))
            tokens = f"{self.pass_size.tokens:,}"
            logger.info("%s, %s tokens a pass", self.policy.scorer.description, tokens)
        self.recorder.start(self.restore())
        self.workers.wait()

    def fit(self) -> None:
        """Train from the current state to the last step."""
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
                self.evaluate_base()
            while self.state.step < self.total_steps:
                metrics = self.train_step(self.batch(self.state.step))
                self.state.step += 1
                if self.state.step in self.evaluation_steps:
                    bar.set_postfix_str("evaluating")
                    self.state.latest = self.evaluate()
                    metrics |= self.state.latest
                self.recorder.log(self.state.step, metrics)
                self.state.seconds = time.monotonic() - started
                asked = self.workers.any(self.interruption.asked)
                if asked or self.checkpoint_is_due():
                    self.save()
                if asked:
                    self.interruption.answer()
                loss, test = metrics["train/loss"], self.state.latest["test/accuracy"]
                bar.set_postfix_str(f"loss {loss:.4f}, test {test:.3f}", refresh=False)
                bar.update()

    def checkpoint_is_due(self) -> bool:
        """Whether this step ends with a checkpoint; the last one always does."""
        step = self.state.step
        return step % self.config.checkpoint_every == 0 or step == self.total_steps

    def batch(self, step: int) -> np.ndarray:
        """Pool indices of a step's global batch.

        A pure function of the seed and the step, so that resuming needs no state of a data loader.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self.seeds.rng("order", epoch).permutation(len(self.data.train))
        size = self.config.batch_size
        return self.data.train[order[index * size : (index + 1) * size]]

    def train_step(self, indices: np.ndarray) -> dict[str, float]:
        """Take one optimizer step on the global batch ``indices`` and return its metrics."""
        began = time.monotonic()
        self.seed_dropout()
        lambda_ = self.sampler.draw()
        weighting_refs = self.data.weighting_refs[indices.tolist()]
        target = self.data.target(indices.tolist(), lambda_)
        alpha, undecided = self.choose_alpha(weighting_refs, target, indices)
        batch = Batch(
            indices=indices.tolist(),
            rows=self.data.tokens.rows(indices.tolist(), lambda_),
            refs=self.data.loss_refs[indices.tolist()],
            alpha=alpha,
            target=target,
        )
        policy = self.backward_batch(batch)
        scores = self.data.in_loss_unit(policy, batch.indices)
        self.refuse_infinite_loss(scores, batch)
        slugs, accuracy = self.data.slugs, float(policy.accuracy(target))
        metrics = batch_metrics(self.loss, scores, batch.refs, alpha, target, slugs, accuracy)
        metrics["train/grad_norm"] = self.gradient_norm(batch)
        metrics["train/lr"] = float(self.scheduler.get_last_lr()[0])
        with fitting("the optimizer's state", "set model.lora, or take a smaller model"):
            self.optimizer.step()
        self.refuse_infinite_weights()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.evaluation.forget()
        if self.config.accuracy_after_step:
            after = self.evaluation.score(indices, lambda_)
            metrics["train/accuracy_after"] = float(after.accuracy(target))
        self.weighting.after_step(weighting_refs, target)
        self.sampler.after_step()
        self.state.alpha_sum = (alpha.mean(0).numpy() + self.state.alpha_sum).tolist()
        self.state.undecided += undecided
        metrics["alpha/undecided_pairs"] = float(undecided)
        metrics["perf/pairs_per_second"] = len(indices) / (time.monotonic() - began)
        if self.data.lists:
            metrics |= named_lambda(self.data.labels.aspects, lambda_.tolist())
        return metrics | self.weighting.metrics() | self.sampler.metrics()

    def choose_alpha(self, refs: Scores, target: Tensor, indices: np.ndarray) -> tuple[Tensor, int]:
        """Weights (B, K) of the references in this step, and how many pairs got uniform ones
        because the weighting gave all references 0.

        Raises:
            UserError: a weight is not finite.
        """
        proportions = self.weighting.proportions(refs, target)
        if not bool(torch.isfinite(proportions).all()):
            names = self.data.names(indices.tolist())
            explained = explain_weights(proportions, refs, self.data.slugs, names)
            raise UserError(f"step {self.state.step + 1}: {explained}")
        return to_simplex(proportions, len(indices))

    def backward_batch(self, batch: Batch) -> Scores:
        """Accumulate the gradient of the batch's mean loss over this process's micro-batches.

        Returns:
            The policy's scores of the whole batch, as they were before the step.

        Raises:
            UserError: half of ``micro_batch_tokens`` does not fit into memory, or one item alone.
        """
        share = list(self.workers.share(len(batch)))
        done = self.pass_size.run(
            self.policy.scorer.costs([batch.rows[i] for i in share]),
            lambda group: self.backward(batch[[share[i] for i in group]], len(batch)),
            self.start_over,
        )
        mine = [share[i] for group, _ in done for i in group]
        return self.evaluation.gather([scored for _, scored in done], mine, len(batch))

    def start_over(self) -> None:
        """Undo the passes of this step: one that ran out of memory may have left a part of its
        gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        self.seed_dropout()

    def seed_dropout(self) -> None:
        """Seed this step's dropout, which differs between processes."""
        torch.manual_seed(self.seeds.value("dropout", self.state.step, self.workers.rank))

    def backward(self, micro_batch: Batch, batch_size: int) -> Scores:
        """Forward and backward pass of one micro-batch; returns the policy's scores of it.

        The loss is divided by the size of the global batch, so that gradients add up to its mean.
        """
        device, rows = self.workers.device, micro_batch.rows
        self.policy.model.train()
        replies, width = [len(item) for item in rows], micro_batch.refs.sums.shape[-1]
        sums, counts = self.policy.scorer.logps(rows)
        policy = Scores(per_prompt(sums, replies, width), per_prompt(counts, replies, width))
        output = self.loss(
            self.data.in_loss_unit(policy, micro_batch.indices).to(device),
            micro_batch.refs.to(device),
            micro_batch.alpha.to(device),
            micro_batch.target.to(device),
        )
        (output.loss.sum() / batch_size).backward()
        return Scores(policy.sums.detach(), policy.counts)

    def gradient_norm(self, batch: Batch) -> float:
        """Sum gradients over processes, clip them if asked to, and return their norm.

        Raises:
            UserError: the gradient is not finite; names the pair, before the step is taken.
        """
        parameters = self.policy.trainable
        self.workers.sum_gradients(parameters.values())
        limit = self.config.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
        if not np.isfinite(norm):
            explained = explain_gradient(
                lambda i: self.data.in_loss_unit(
                    self.backward(batch[[i]], len(batch)).to(torch.device("cpu")),
                    [batch.indices[i]],
                ),
                parameters,
                self.loss,
                batch.refs,
                batch.target,
                self.data.slugs,
                self.data.names(batch.indices),
            )
            raise UserError(f"step {self.state.step + 1}: {explained}")
        return norm

    def refuse_infinite_loss(self, policy: Scores, batch: Batch) -> None:
        """Stop before a step with a loss that is not finite spoils the weights and the checkpoint.

        Raises:
            UserError: names the pair, the reference and the term.
        """
        losses = self.loss(policy, batch.refs, batch.alpha, batch.target).loss
        if not bool(torch.isfinite(losses).all()):
            explained = explain_loss(
                self.loss,
                policy,
                batch.refs,
                batch.alpha,
                batch.target,
                self.data.slugs,
                self.data.names(batch.indices),
            )
            raise UserError(f"step {self.state.step + 1}: {explained}")

    def refuse_infinite_weights(self) -> None:
        """Stop before weights that an optimizer step made infinite get into a checkpoint.

        Raises:
            UserError: names the first of them.
        """
        explained = explain_parameters(self.policy.trainable)
        if explained:
            raise UserError(f"step {self.state.step + 1}: {explained}")

    def evaluate_base(self) -> None:
        """Evaluate the policy before the first step."""
        self.state.latest = self.evaluate()
        self.state.base = {f"base/{k.replace('/', '_')}": v for k, v in self.state.latest.items()}
        self.state.base_test = self.state.latest_test
        self.state.base_trade_off = self.trade_off("base")
        self.recorder.log(self.state.step, self.state.latest)

    def evaluate(self) -> dict[str, float]:
        """Accuracy on val and test, and for lists how they are ranked."""
        found = self.evaluation.accuracy()
        test = self.evaluation.score(self.data.test)
        self.state.latest_test = {"sums": test.sums, "counts": test.counts}
        return found | (self.evaluation.rankings(self.state.mean_alpha) if self.data.lists else {})

    def trade_off(self, policy: str) -> list[dict[str, Any]]:
        """How lists are ranked under each lambda at which the sampler wants an evaluation."""
        if not self.data.lists:
            return []
        points = self.sampler.points(self.data.labels.aspects)
        return self.evaluation.trade_off(points, self.state.mean_alpha, policy)

    def save(self) -> None:
        """Write the checkpoint: everything that must survive, in one file."""
        if self.workers.is_main:
            metrics = self.recorder.run.flush_metrics()
            with self.recorder.run.writing():
                save_state(self.recorder.run.checkpoint, {**self.state_dict(), "metrics": metrics})
        self.recorder.write_alpha(self.data.slugs)
        self.workers.wait()

    def state_dict(self) -> dict[str, Any]:
        return {
            "run": self.recorder.run.config,
            "data": self.data.fingerprint,
            "loop": asdict(self.state),
            "trainable": self.policy.trainable,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "weighting": self.weighting.state_dict(),
            "lambda": self.sampler.state_dict(),
        }

    def restore(self) -> bytes:
        """Continue from the run's checkpoint if it has one.

        Returns:
            What ``metrics.jsonl`` held when the checkpoint was written; empty without one.

        Raises:
            UserError: the checkpoint is damaged or of another run, was trained on other data, or is
                not that of the metrics.
        """
        run = self.recorder.run
        if not run.checkpoint.exists():
            return b""
        trainable = self.policy.trainable
        state = load_checkpoint(run, trainable, self.data, self.total_steps)
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state["trainable"][name])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.weighting.load_state_dict(state["weighting"])
            self.sampler.load_state_dict(state["lambda"])
        except ValueError as error:
            raise UserError(f"{run.checkpoint}: {error}") from error
        self.state = LoopState(**state["loop"])
        past = run.metrics_until(self.state.step, state.get("metrics"))
        logger.info("resuming after step %d of %d", self.state.step, self.total_steps)
        return past
