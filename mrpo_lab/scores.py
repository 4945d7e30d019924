"""The value that crosses module boundaries: log-probabilities of replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of R replies to each prompt; a pair is R = 2, reply 0 the chosen one.

    Axes: (B, R) under one model, (B, K, R) under K references. Sums and counts are kept, never
    means, so that one table serves every loss.
    """

    sums: Float[Tensor, "*n R"]
    """Nats per reply, over reply tokens only."""
    counts: Int[Tensor, "*n R"]
    """Number of those reply tokens under the model's own tokenizer."""

    def logps(self, length_normalized: bool = True) -> Float[Tensor, "*n R"]:
        """Nats per token if ``length_normalized``, else nats per reply."""
        return self.sums / self.counts if length_normalized else self.sums

    def margins(self, length_normalized: bool = True) -> Float[Tensor, "*n"]:
        """Chosen minus rejected log-probability: d_m of a pair under each model."""
        logps = self.logps(length_normalized)
        return logps[..., 0] - logps[..., 1]

    def accuracy(self) -> Float[Tensor, "*k"]:
        """Share of pairs whose chosen reply has the higher nats per token; ties count as wrong."""
        return (self.margins() > 0).double().mean(0)

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, rows: Tensor | list[int] | slice) -> Scores:
        return Scores(self.sums[rows], self.counts[rows])

    def to(self, device: torch.device) -> Scores:
        return Scores(self.sums.to(device), self.counts.to(device))

    @staticmethod
    def stack(tables: Sequence[Scores]) -> Scores:
        """K tables of shape (N, R) to one of shape (N, K, R)."""
        return Scores(
            torch.stack([table.sums for table in tables], dim=1),
            torch.stack([table.counts for table in tables], dim=1),
        )


@dataclass(frozen=True)
class Known:
    """The policy's scores at one moment, by pool index, so that no pair is scored twice at it."""

    scores: Scores
    """(N, R); what is not fresh is of some earlier moment."""
    fresh: np.ndarray

    @classmethod
    def none(cls, pairs: int, replies: int) -> Known:
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
