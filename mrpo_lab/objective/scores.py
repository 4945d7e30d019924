"""Log-probabilities of replies under a model, and the margins between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of the R replies to each prompt.

    Axes: (B, R) under one model, (B, K, R) under K references. A preference pair has R = 2 with the
    chosen reply first. A prompt with fewer than R replies has counts of 0 for the missing ones.
    Sums and counts are kept, never means, so that one table of scores serves every loss.
    """

    sums: Float[Tensor, "*n R"]
    """Log-probability of each reply in nats, summed over its tokens."""
    counts: Int[Tensor, "*n R"]
    """Number of those tokens under the model's own tokenizer."""

    def logps(self, length_normalized: bool = True) -> Float[Tensor, "*n R"]:
        """Log-probabilities in nats per token if ``length_normalized``, else per reply.

        A missing reply has 0.
        """
        return self.sums / self.counts.clamp(min=1) if length_normalized else self.sums

    @property
    def present(self) -> Bool[Tensor, "B R"]:
        """Whether a prompt has an r-th reply."""
        return (self.counts if self.counts.ndim == 2 else self.counts[:, 0]) > 0

    def margins(
        self, target: Float[Tensor, "B R"], length_normalized: bool = True
    ) -> Float[Tensor, "*n"]:
        """Log-probability of the preferred reply minus that of the other, d_m of a pair.

        For a list of replies with target p it is the mean of l_i - l_j over all pairs of replies,
        weighted by |p_i - p_j| and taken in the direction that p prefers; 0 if p prefers none.

        Args:
            target: how much each reply is to be preferred, summing to 1; (1, 0) for a pair.
        """
        weights = contrast(target, self.present)
        weights = weights if self.sums.ndim == 2 else weights.unsqueeze(1)
        return (weights * self.logps(length_normalized)).sum(-1)

    def accuracy(self, target: Float[Tensor, "B R"]) -> Float[Tensor, "*k"]:
        """Share of prompts whose margin in nats per token is above 0; ties count as wrong."""
        return (self.margins(target) > 0).double().mean(0)

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, rows: Tensor | list[int] | slice) -> Scores:
        return Scores(self.sums[rows], self.counts[rows])

    def to(self, device: torch.device) -> Scores:
        return Scores(self.sums.to(device), self.counts.to(device))

    @staticmethod
    def stack(tables: Sequence[Scores]) -> Scores:
        """Stack K tables of shape (N, R) to one of shape (N, K, R)."""
        return Scores(
            torch.stack([table.sums for table in tables], dim=1),
            torch.stack([table.counts for table in tables], dim=1),
        )


def chosen_first(pairs: int, replies: int = 2) -> Float[Tensor, "B R"]:
    """The target of preference pairs: reply 0 is preferred to all others."""
    target = torch.zeros(pairs, replies, dtype=torch.float64)
    target[:, 0] = 1
    return target


def contrast(target: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Coefficient of each reply's log-probability in the margin: (1, -1) for a pair.

    The margin is the weighted mean of l_i - l_j over pairs of replies with weights |p_i - p_j|, so
    the coefficient is (R p_i - 1) / sum_{j<k} |p_j - p_k| over the R replies that are present; 0
    where all targets are equal.
    """
    replies = present.sum(-1, keepdim=True)
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    apart = ((target.unsqueeze(-1) - target.unsqueeze(-2)).abs() * both).sum((-1, -2)) / 2
    apart = apart.unsqueeze(-1)
    return ((replies * target - 1) * present / apart.where(apart > 0, 1)) * (apart > 0)


def per_prompt(flat: Tensor, replies: Sequence[int], width: int) -> Shaped[Tensor, "B R"]:
    """Arrange numbers of all replies, prompt after prompt, as one row per prompt.

    Rows with fewer than ``width`` replies are padded with 0. Differentiable.
    """
    number = torch.tensor(replies, device=flat.device)
    there = torch.arange(width, device=flat.device) < number.unsqueeze(-1)
    return torch.zeros_like(there, dtype=flat.dtype).masked_scatter(there, flat)
