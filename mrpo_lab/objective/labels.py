"""Ratings of replies by several aspects, and the target that they give under a lambda.

Axes: N prompts, A aspects, R replies. A pair has one aspect, under which reply 0 is preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PREFERENCE = "preference"
"""Name of the one aspect that preference pairs have."""


@dataclass(frozen=True)
class Labels:
    """Ratings and targets of the replies to N prompts, by aspect."""

    aspects: list[str]
    ratings: Float[Tensor, "N A R"]
    """NaN for missing replies, and for all replies if the aspect lacks a rating of one."""
    targets: Float[Tensor, "N A R"]
    """Target of each aspect alone, summing to 1 over the replies; 0 where the aspect is unrated."""

    @classmethod
    def of_pairs(cls, number: int) -> Labels:
        """Labels of preference pairs, whose reply 0 is chosen and reply 1 rejected."""
        first = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(number, 1, 2)
        return cls([PREFERENCE], first, first)

    @classmethod
    def of_ratings(
        cls,
        aspects: list[str],
        ratings: Float[Tensor, "N A R"],
        present: Bool[Tensor, "N R"],
        temperature: float,
    ) -> Labels:
        """Labels with targets softmax(rating / temperature) (2506.19780).

        An aspect that lacks a rating for one reply is left out for that prompt. Equal ratings give
        a uniform target.
        """
        present = present.unsqueeze(1)
        rated = (~ratings.isnan() | ~present).all(-1, keepdim=True)
        there = rated & present
        logits = (ratings / temperature).where(there, -torch.inf)
        targets = logits.softmax(-1).where(there, 0.0)
        return cls(aspects, ratings.where(there, torch.nan), targets)

    @property
    def rated(self) -> Bool[Tensor, "N A"]:
        """Whether a prompt has ratings of all its replies by an aspect."""
        return (self.targets > 0).any(-1)

    def mix(self, weights: Float[Tensor, " A"]) -> Float[Tensor, "N R"]:
        """The target sum_a lambda_a p_a over the rated aspects, with lambda renormalized over them.

        The target is all 0, so nothing is preferred, where lambda is 0 on all rated aspects.
        """
        shares = weights * self.rated
        total = shares.sum(-1, keepdim=True)
        shares = shares / total.where(total > 0, 1)
        return (shares.unsqueeze(-1) * self.targets).sum(1)

    def __getitem__(self, rows: Sequence[int]) -> Labels:
        return Labels(self.aspects, self.ratings[list(rows)], self.targets[list(rows)])

    def __len__(self) -> int:
        return len(self.targets)
