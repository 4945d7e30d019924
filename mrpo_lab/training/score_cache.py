"""The policy's scores at one moment, so that no pair is scored twice between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mrpo_lab.objective.scores import Scores


@dataclass(frozen=True)
class ScoreCache:
    """The policy's scores at one moment, by pool index, so that no pair is scored twice at it."""

    scores: Scores
    """(N, R); what is not fresh is of some earlier moment."""
    fresh: np.ndarray

    @classmethod
    def none(cls, pairs: int, replies: int) -> ScoreCache:
        counts = torch.ones(pairs, replies, dtype=torch.int64)
        return cls(Scores(counts.double(), counts), np.zeros(pairs, dtype=bool))

    def forget(self) -> None:
        self.fresh[:] = False

    def lacks(self, pairs: np.ndarray) -> np.ndarray:
        return np.unique(pairs[~self.fresh[pairs]])

    def add(self, pairs: np.ndarray, scores: Scores) -> None:
        self.scores.sums[pairs.tolist()] = scores.sums
        self.scores.counts[pairs.tolist()] = scores.counts
        self.fresh[pairs] = True
