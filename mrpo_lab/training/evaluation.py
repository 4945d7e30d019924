"""What the policy makes of the data at one moment: scores, accuracy, rankings, the trade-off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.data.texts import Replies
from mrpo_lab.models.policy import Policy
from mrpo_lab.objective.labels import PREFERENCE, Labels
from mrpo_lab.objective.losses import PreferenceLoss, listwise
from mrpo_lab.objective.ranking import rank
from mrpo_lab.objective.scores import Scores
from mrpo_lab.runs.trade_off import named_lambda
from mrpo_lab.training.score_cache import ScoreCache
from mrpo_lab.training.workers import Workers

Tokenize = Callable[[Sequence[int], list[float]], list[Replies]]
"""The policy's token rows of pool indices under a lambda."""


@dataclass(frozen=True)
class Data:
    """What the loop is given: the policy's tokens and reference scores, by pool index."""

    tokenize: Tokenize
    refs: Scores
    """(N, K, R) on the CPU, float64 sums."""
    labels: Labels
    slugs: list[str]
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    ids: np.ndarray
    """(N, R) reply ids."""
    names: Callable[[int], str]
    """How to call a pair in a message."""
    fingerprint: str
    told: bool = False
    """Whether the policy's tokens say what lambda is."""

    @property
    def lists(self) -> bool:
        """Whether replies are rated by aspects, rather than chosen and rejected."""
        return self.labels.aspects != [PREFERENCE]

    def target(self, items: Sequence[int], weights: Float[Tensor, " A"]) -> Float[Tensor, "B R"]:
        """What lambda asks for."""
        return self.labels[items].mix(weights)

    def references(self, items: Sequence[int], weights: Float[Tensor, " A"]) -> Scores:
        """(B, K, R), judged by lambda."""
        return self.refs[list(items)].labelled(self.target(items, weights))

    def tokens(self, items: Sequence[int], weights: Float[Tensor, " A"]) -> list[Replies]:
        """The policy's token rows under lambda."""
        return self.tokenize(items, weights.tolist())


class Evaluation:
    """The policy's scores as it is now; nothing is scored twice between two steps."""

    def __init__(
        self,
        policy: Policy,
        data: Data,
        loss: PreferenceLoss,
        workers: Workers,
        token_budget: int,
        centre: Float[Tensor, " A"],
    ) -> None:
        """``centre``: the lambda that data are judged by unless another one is given."""
        self.policy, self.data, self.loss, self.workers = policy, data, loss, workers
        self.centre, self._token_budget = centre, token_budget
        self._known = ScoreCache.none(len(data.labels), data.refs.sums.shape[-1])
        self._told: list[float] | None = None

    def forget(self) -> None:
        """The policy has changed."""
        self._known.forget()

    def score(self, items: np.ndarray, weights: Float[Tensor, " A"] | None = None) -> Scores:
        """The policy's scores (B, R) of pool indices, without gradients, shared out over
        processes."""
        weights = self.centre if weights is None else weights
        if self.data.told and self._told != weights.tolist():
            self._known.forget()
            self._told = weights.tolist()
        unknown = self._known.lacks(items)
        if len(unknown):
            mine = self.workers.share(len(unknown))
            rows = self.data.tokens([int(unknown[i]) for i in mine], weights)
            scored = [self.policy.scorer.score(rows, self._token_budget)] if rows else []
            self._known.add(unknown, self.gather(scored, mine, len(unknown)))
        target = self.data.target(items.tolist(), weights)
        return self._known.scores[items.tolist()].labelled(target)

    def gather(self, scored: Sequence[Scores], mine: Sequence[int], total: int) -> Scores:
        """The scores of ``mine`` and of all other processes, in the batch's order, on the CPU."""
        width = self.data.refs.sums.shape[-1]
        sums, counts = torch.zeros(len(mine), width).double(), torch.zeros(len(mine), width).long()
        end = 0
        for part in scored:  # whose longest list may be shorter
            rows, replies = part.sums.shape
            sums[end : end + rows, :replies] = part.sums.cpu().double()
            counts[end : end + rows, :replies] = part.counts.cpu()
            end += rows
        return Scores(
            self.workers.gather(sums, mine, total), self.workers.gather(counts, mine, total)
        )

    def accuracy(self) -> dict[str, float]:
        """Length-normalised preference accuracy on val and test, without any reference term."""
        splits = {"val": self.data.val, "test": self.data.test}
        self.score(np.concatenate(list(splits.values())))  # in one pass
        return {
            f"{name}/accuracy": float(self.score(items).accuracy())
            for name, items in splits.items()
        }

    def probe(self, *subsets: np.ndarray) -> list[float]:
        """The policy's accuracy now on each of several subsets of val, scored in one pass."""
        parts = [self.data.val[subset] for subset in subsets]
        self.score(np.concatenate(parts))
        return [float(self.score(part).accuracy()) for part in parts]

    def rewards(
        self, policy: Scores, items: np.ndarray, alpha: Float[Tensor, " K"]
    ) -> Float[Tensor, "B R"]:
        """Implicit rewards against the references, weighted by ``alpha`` for all alike."""
        refs = self.data.refs[items.tolist()].labelled(policy.labels)
        return self.loss(policy, refs, alpha.expand(len(items), -1)).rewards

    def rankings(self, alpha: Float[Tensor, " K"]) -> dict[str, float]:
        """How implicit rewards rank the replies of lists, by lambda's target and by each aspect;
        see ``ranking``. ``cross_entropy`` is the listwise loss in nats."""
        found = {}
        for name, items in {"val": self.data.val, "test": self.data.test}.items():
            policy = self.score(items)
            rewards = self.rewards(policy, items, alpha)
            labels = self.data.labels[items.tolist()]
            judged = {"": (policy.labels.where(policy.present, torch.nan), policy.labels)}
            for a, aspect in enumerate(labels.aspects):
                judged[f"/{aspect}"] = (labels.ratings[:, a], labels.targets[:, a])
            for suffix, (ratings, target) in judged.items():
                entropy = float(cross_entropy(rewards, target, policy).nanmean())
                for metric, value in (rank(rewards, ratings) | {"cross_entropy": entropy}).items():
                    found[f"{name}/{metric}{suffix}"] = value
        return found

    def probe_loss(self, subset: np.ndarray, alpha: Float[Tensor, " K"]) -> float:
        """The listwise loss now on a subset of val, the mean over aspects."""
        items = self.data.val[subset]
        policy = self.score(items)
        rewards = self.rewards(policy, items, alpha)
        targets = self.data.labels[items.tolist()].targets
        by_aspect = [cross_entropy(rewards, target, policy) for target in targets.unbind(1)]
        return float(torch.stack(by_aspect).nanmean())

    def trade_off(
        self, points: Float[Tensor, "P A"], alpha: Float[Tensor, " K"], policy: str
    ) -> list[dict[str, Any]]:
        """How well the test lists are ranked under each lambda, by each aspect: a row for every
        point, aspect, metric and kind of score (implicit rewards, log-probabilities); of rewards
        the cross-entropy too, of which less is better."""
        aspects, items = self.data.labels.aspects, self.data.test
        labels = self.data.labels[items.tolist()]
        rows = []
        for weights in points:
            scores = self.score(items, weights)
            ranked = {
                "reward": self.rewards(scores, items, alpha),
                "logp": scores.logps(self.loss.length_normalized),
            }
            told = named_lambda(aspects, weights.tolist())
            for a, aspect in enumerate(aspects):
                found = {by: rank(values, labels.ratings[:, a]) for by, values in ranked.items()}
                entropy = cross_entropy(ranked["reward"], labels.targets[:, a], scores)
                found["reward"]["cross_entropy"] = float(entropy.nanmean())
                for by, values in found.items():
                    for metric, value in values.items():
                        what = {"aspect": aspect, "ranked_by": by, "metric": metric}
                        rows.append({"policy": policy, **told, **what, "value": value})
        return rows


def cross_entropy(
    rewards: Float[Tensor, "B R"], target: Float[Tensor, "B R"], policy: Scores
) -> Float[Tensor, " B"]:
    """The listwise loss of each prompt in nats, NaN where the target asks for nothing."""
    there = rewards.masked_fill(~policy.present, -torch.inf)
    return listwise(there, target, beta=1.0).where(target.sum(-1) > 0, torch.nan)
