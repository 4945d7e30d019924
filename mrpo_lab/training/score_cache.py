"""The policy's scores at one moment, so that no item is scored twice between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mrpo_lab.objective.scores import Scores


@dataclass(frozen=True)
class ScoreCache:
    """The policy's scores by pool index, and which of them are still valid."""

    scores: Scores
    """Scores (N, R); rows that are not ``valid`` are of an earlier step."""
    valid: np.ndarray

    @classmethod
    def empty(cls, items: int, replies: int) -> ScoreCache:
        counts = torch.ones(items, replies, dtype=torch.int64)
        return cls(Scores(counts.double(), counts), np.zeros(items, dtype=bool))

    def clear(self) -> None:
        """Forget all scores, as after an optimizer step."""
        self.valid[:] = False

    def missing(self, indices: np.ndarray) -> np.ndarray:
        """Those of ``indices`` that have to be scored, each once, in ascending order."""
        return np.unique(indices[~self.valid[indices]])

    def add(self, indices: np.ndarray, scores: Scores) -> None:
        self.scores.sums[indices.tolist()] = scores.sums
        self.scores.counts[indices.tolist()] = scores.counts
        self.valid[indices] = True
