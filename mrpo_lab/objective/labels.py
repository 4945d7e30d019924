"""Ratings of replies by several aspects, and what they say is to be preferred under a lambda.

Axes: N prompts, A aspects, R replies. A pair has one aspect, under which reply 0 is preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PREFERENCE = "preference"
"""The one aspect of pairs."""


@dataclass(frozen=True)
class Labels:
    """What is known of the replies to N prompts."""

    aspects: list[str]
    ratings: Float[Tensor, "N A R"]
    """NaN where a prompt has no such reply, and in all of an aspect that lacks a rating."""
    targets: Float[Tensor, "N A R"]
    """Of each aspect alone, summing to 1 over the replies; 0 in an aspect that lacks a rating."""

    @classmethod
    def of_pairs(cls, number: int) -> Labels:
        """Reply 0 is preferred to reply 1."""
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
        """Targets softmax(rating / temperature) (2506.19780). A missing rating drops its aspect
        for that prompt; where all ratings are equal the target is uniform."""
        present = present.unsqueeze(1)
        rated = (~ratings.isnan() | ~present).all(-1, keepdim=True)
        there = rated & present
        logits = (ratings / temperature).where(there, -torch.inf)
        targets = logits.softmax(-1).where(there, 0.0)
        return cls(aspects, ratings.where(there, torch.nan), targets)

    @property
    def rated(self) -> Bool[Tensor, "N A"]:
        """Which aspects of which prompts have all their ratings."""
        return (self.targets > 0).any(-1)

    def mix(self, weights: Float[Tensor, " A"]) -> Float[Tensor, "N R"]:
        """The target sum_a lambda_a p_a, over the aspects that are rated, renormalised; all 0,
        which asks for nothing, where lambda is 0 on all of those."""
        shares = weights * self.rated
        total = shares.sum(-1, keepdim=True)
        shares = shares / total.where(total > 0, 1)
        return (shares.unsqueeze(-1) * self.targets).sum(1)

    def __getitem__(self, rows: Sequence[int]) -> Labels:
        return Labels(self.aspects, self.ratings[list(rows)], self.targets[list(rows)])

    def __len__(self) -> int:
        return len(self.targets)
