"""What the current policy makes of the data: scores, accuracy, rankings, the trade-off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.errors import UserError
from mrpo_lab.models.policy import Policy
from mrpo_lab.objective.losses import PreferenceLoss, listwise
from mrpo_lab.objective.ranking import rank
from mrpo_lab.objective.scores import Scores
from mrpo_lab.runs.trade_off import named_lambda
from mrpo_lab.scoring.memory import PassSize
from mrpo_lab.training.diagnosis import explain_scores
from mrpo_lab.training.inputs import Data
from mrpo_lab.training.score_cache import ScoreCache
from mrpo_lab.training.workers import Workers


class Evaluation:
    """Evaluates the policy as it is now; no item is scored twice between two optimizer steps."""

    def __init__(
        self,
        policy: Policy,
        data: Data,
        loss: PreferenceLoss,
        workers: Workers,
        token_budget: int,
        mean_lambda: Float[Tensor, " A"],
    ) -> None:
        """
        Args:
            token_budget: tokens in one forward pass; changes memory and speed, never a result.
            mean_lambda: the lambda by which replies are judged where no other one is given.
        """
        self.policy, self.data, self.loss, self.workers = policy, data, loss, workers
        self.mean_lambda = mean_lambda
        self._pass_size = PassSize(token_budget, "train.token_budget")
        self._cache = ScoreCache.empty(len(data.labels), data.refs.sums.shape[-1])
        self._cached_lambda: list[float] | None = None

    def forget(self) -> None:
        """Drop cached scores, because the policy has changed."""
        self._cache.clear()

    def score(self, indices: np.ndarray, lambda_: Float[Tensor, " A"] | None = None) -> Scores:
        """The policy's scores (B, R) of pool indices, computed without gradients by all processes.

        A policy that is conditioned on lambda is given ``lambda_`` (default: the mean lambda).

        Raises:
            UserError: a score is not finite, or one item does not fit into memory.
        """
        lambda_ = self.mean_lambda if lambda_ is None else lambda_
        if self.data.tokens.conditioned and self._cached_lambda != lambda_.tolist():
            self._cache.clear()
            self._cached_lambda = lambda_.tolist()
        missing = self._cache.missing(indices)
        if len(missing):
            mine = self.workers.share(len(missing))
            rows = self.data.tokens.rows([int(missing[i]) for i in mine], lambda_)
            scored = [self.policy.scorer.score(rows, self._pass_size)] if rows else []
            found = self.gather(scored, mine, len(missing))
            if not bool(torch.isfinite(found.sums).all()):
                explained = explain_scores(found, self.data.names(missing.tolist()))
                raise UserError(
                    f"evaluation: {explained}: lower optimizer.lr, or set model.dtype=float32"
                )
            self._cache.add(missing, found)
        return self._cache.scores[indices.tolist()]

    def gather(self, scored: Sequence[Scores], mine: Sequence[int], total: int) -> Scores:
        """Collect the scores of all processes, in the batch's order, on the CPU.

        Args:
            scored: this process's scores, in parts whose longest list may differ.
            mine: the rows of the batch that they are of.
            total: rows of the whole batch.
        """
        width = self.data.refs.sums.shape[-1]
        sums, counts = torch.zeros(len(mine), width).double(), torch.zeros(len(mine), width).long()
        end = 0
        for part in scored:
            rows, replies = part.sums.shape
            sums[end : end + rows, :replies] = part.sums.cpu().double()
            counts[end : end + rows, :replies] = part.counts.cpu()
            end += rows
        return Scores(
            self.workers.gather(sums, mine, total), self.workers.gather(counts, mine, total)
        )

    def target(self, indices: np.ndarray) -> Float[Tensor, "B R"]:
        """How much each reply is to be preferred under the mean lambda."""
        return self.data.target(indices.tolist(), self.mean_lambda)

    def accuracy(self) -> dict[str, float]:
        """Length-normalized preference accuracy on val and test, without any reference term."""
        splits = {"val": self.data.val, "test": self.data.test}
        self.score(np.concatenate(list(splits.values())))  # in one pass
        return {
            f"{name}/accuracy": float(self.score(indices).accuracy(self.target(indices)))
            for name, indices in splits.items()
        }

    def probe(self, *subsets: np.ndarray) -> list[float]:
        """The policy's current accuracy on each of several subsets of val, scored in one pass."""
        parts = [self.data.val[subset] for subset in subsets]
        self.score(np.concatenate(parts))
        return [float(self.score(part).accuracy(self.target(part))) for part in parts]

    def rewards(
        self,
        policy: Scores,
        indices: np.ndarray,
        alpha: Float[Tensor, " K"],
        target: Float[Tensor, "B R"],
    ) -> Float[Tensor, "B R"]:
        """Implicit rewards of replies, with the same ``alpha`` for all prompts."""
        refs = self.data.loss_refs[indices.tolist()]
        policy = self.data.in_loss_unit(policy, indices.tolist())
        return self.loss(policy, refs, alpha.expand(len(indices), -1), target).rewards

    def rankings(self, alpha: Float[Tensor, " K"]) -> dict[str, float]:
        """How implicit rewards rank the replies of lists, by the mean target and by each aspect.

        Metrics are those of ``objective.ranking`` and ``cross_entropy``, the listwise loss in nats.
        """
        found = {}
        for name, indices in {"val": self.data.val, "test": self.data.test}.items():
            policy, target = self.score(indices), self.target(indices)
            rewards = self.rewards(policy, indices, alpha, target)
            labels = self.data.labels[indices.tolist()]
            judged = {"": (target.where(policy.present, torch.nan), target)}
            for a, aspect in enumerate(labels.aspects):
                judged[f"/{aspect}"] = (labels.ratings[:, a], labels.targets[:, a])
            for suffix, (ratings, wanted) in judged.items():
                entropy = float(cross_entropy(rewards, wanted, policy).nanmean())
                for metric, value in (rank(rewards, ratings) | {"cross_entropy": entropy}).items():
                    found[f"{name}/{metric}{suffix}"] = value
        return found

    def probe_loss(self, subset: np.ndarray, alpha: Float[Tensor, " K"]) -> float:
        """The current listwise loss in nats on a subset of val, averaged over the aspects.

        Raises:
            UserError: it is not finite.
        """
        indices = self.data.val[subset]
        policy = self.score(indices)
        rewards = self.rewards(policy, indices, alpha, self.target(indices))
        targets = self.data.labels[indices.tolist()].targets
        by_aspect = [cross_entropy(rewards, target, policy) for target in targets.unbind(1)]
        loss = float(torch.stack(by_aspect).nanmean())
        if not np.isfinite(loss):
            raise UserError(
                f"lambda: the loss of {len(subset)} validation lists is {loss}: increase "
                "lambda.probe_size if few lists are rated, or lower loss.beta"
            )
        return loss

    def trade_off(
        self, points: Float[Tensor, "P A"], alpha: Float[Tensor, " K"], policy: str
    ) -> list[dict[str, Any]]:
        """How the test lists are ranked under each lambda of ``points``, by each aspect.

        Returns:
            One row per lambda, aspect, metric and kind of score (implicit rewards or
            log-probabilities); for rewards also the cross-entropy, of which less is better.
        """
        aspects, indices = self.data.labels.aspects, self.data.test
        labels = self.data.labels[indices.tolist()]
        rows = []
        for lambda_ in points:
            scores = self.score(indices, lambda_)
            target = self.data.target(indices.tolist(), lambda_)
            ranked = {
                "reward": self.rewards(scores, indices, alpha, target),
                "logp": self.loss.logps(self.data.in_loss_unit(scores, indices.tolist())),
            }
            named = named_lambda(aspects, lambda_.tolist())
            for a, aspect in enumerate(aspects):
                found = {by: rank(values, labels.ratings[:, a]) for by, values in ranked.items()}
                entropy = cross_entropy(ranked["reward"], labels.targets[:, a], scores)
                found["reward"]["cross_entropy"] = float(entropy.nanmean())
                for by, values in found.items():
                    for metric, value in values.items():
                        what = {"aspect": aspect, "ranked_by": by, "metric": metric}
                        rows.append({"policy": policy, **named, **what, "value": value})
        return rows


def cross_entropy(
    rewards: Float[Tensor, "B R"], target: Float[Tensor, "B R"], policy: Scores
) -> Float[Tensor, " B"]:
    """The listwise loss of each prompt in nats; NaN where the target prefers nothing."""
    present = rewards.masked_fill(~policy.present, -torch.inf)
    return listwise(present, target, beta=1.0).where(target.sum(-1) > 0, torch.nan)
