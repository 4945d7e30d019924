"""The value that crosses module boundaries: log-probabilities of replies, and what to prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of R replies to each prompt; a pair is R = 2, reply 0 the chosen one.

    Axes: (B, R) under one model, (B, K, R) under K references. Sums and counts are kept, never
    means, so that one table serves every loss. A list with fewer than R replies has counts of 0.
    """

    sums: Float[Tensor, "*n R"]
    """Nats per reply, over reply tokens only."""
    counts: Int[Tensor, "*n R"]
    """Number of those reply tokens under the model's own tokenizer."""
    target: Float[Tensor, "B R"] | None = None
    """How much each reply is to be preferred, summing to 1; None prefers reply 0 alone."""

    def logps(self, length_normalized: bool = True) -> Float[Tensor, "*n R"]:
        """Nats per token if ``length_normalized``, else nats per reply; 0 where there is none."""
        return self.sums / self.counts.clamp(min=1) if length_normalized else self.sums

    @property
    def present(self) -> Bool[Tensor, "B R"]:
        """Which of the R replies a prompt has."""
        return (self.counts if self.counts.ndim == 2 else self.counts[:, 0]) > 0

    @property
    def labels(self) -> Float[Tensor, "B R"]:
        """``target``, or reply 0 where there is none."""
        if self.target is not None:
            return self.target
        first = torch.zeros_like(self.sums if self.sums.ndim == 2 else self.sums[:, 0])
        first[:, 0] = 1
        return first

    @property
    def contrast(self) -> Float[Tensor, "B R"]:
        """What each reply's log-probability counts in the margin: (1, -1) for a pair."""
        return contrast(self.labels, self.present)

    def margins(self, length_normalized: bool = True) -> Float[Tensor, "*n"]:
        """Chosen minus rejected log-probability: d_m of a pair under each model.

        Of a list with target p it is the mean of l_i - l_j over all pairs of replies, weighted by
        |p_i - p_j| and taken in the direction that p prefers; 0 if p prefers none.
        """
        weights = self.contrast if self.sums.ndim == 2 else self.contrast.unsqueeze(1)
        return (weights * self.logps(length_normalized)).sum(-1)

    def accuracy(self) -> Float[Tensor, "*k"]:
        """Share of prompts with a margin above 0, in nats per token: of pairs, those whose chosen
        reply is the more probable. Ties count as wrong."""
        return (self.margins() > 0).double().mean(0)

    def labelled(self, target: Float[Tensor, "B R"]) -> Scores:
        """The same numbers, to be judged by ``target``."""
        return replace(self, target=target)

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, rows: Tensor | list[int] | slice) -> Scores:
        target = None if self.target is None else self.target[rows]
        return Scores(self.sums[rows], self.counts[rows], target)

    def to(self, device: torch.device) -> Scores:
        target = None if self.target is None else self.target.to(device)
        return Scores(self.sums.to(device), self.counts.to(device), target)

    @staticmethod
    def stack(tables: Sequence[Scores]) -> Scores:
        """K tables of shape (N, R) to one of shape (N, K, R)."""
        return Scores(
            torch.stack([table.sums for table in tables], dim=1),
            torch.stack([table.counts for table in tables], dim=1),
        )


def contrast(target: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """c with ``sum_i c_i l_i`` the weighted mean of the pairs' margins, weights |p_i - p_j|.

    (R p_i - 1) / sum_{j<k} |p_j - p_k| for the R replies that are present; 0 where all are equal.
    """
    replies = present.sum(-1, keepdim=True)
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    apart = ((target.unsqueeze(-1) - target.unsqueeze(-2)).abs() * both).sum((-1, -2)) / 2
    apart = apart.unsqueeze(-1)
    return ((replies * target - 1) * present / apart.where(apart > 0, 1)) * (apart > 0)


def per_prompt(flat: Tensor, replies: Sequence[int], width: int) -> Shaped[Tensor, "B R"]:
    """Numbers of all replies, one prompt after the other, as a row a prompt; 0 where a prompt has
    fewer than ``width`` replies. Differentiable."""
    number = torch.tensor(replies, device=flat.device)
    there = torch.arange(width, device=flat.device) < number.unsqueeze(-1)
    return torch.zeros_like(there, dtype=flat.dtype).masked_scatter(there, flat)
