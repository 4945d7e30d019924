"""The interface of a weighting, and the one place where its output becomes alpha."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.stateful import Stateful
from mrpo_lab.objective.units import Unit, check_unit


@dataclass(frozen=True)
class Context:
    """Everything a weighting may know before the first step; nothing comes from the test split."""

    slugs: list[str]
    """Names of the K references; the first is the anchor."""
    val: Scores
    """Reference scores (N_val, K, R) of the validation split, in the unit of the weighting."""
    target: Float[Tensor, "N_val R"]
    """How much each validation reply is to be preferred; (1, 0) for a pair."""
    probe: Callable[..., list[float]]
    """``probe(subset, ...)`` returns the policy's current accuracy on each of several subsets of
    the validation pairs, given as index arrays; one forward pass scores them all."""
    rng: np.random.Generator

    @property
    def margins(self) -> Float[Tensor, "N_val K"]:
        """Margins d_ik of the references on the validation split, in nats per unit."""
        return self.val.margins(self.target)


class Weighting(Stateful, ABC):
    """Decides at every step what alpha is proportional to.

    Every method is called on every weighting; a subclass overrides those it needs. A weighting that
    looks at margins takes ``unit``, the unit of log-probabilities (see ``objective.units``).
    """

    def __init__(self, unit: str = "token") -> None:
        check_unit(unit)
        self.unit = cast(Unit, unit)

    def check(self, slugs: list[str], num_val: int) -> None:
        """Check the settings against the references and the size of the validation split.

        Called before any model is loaded. The first slug is the anchor.

        Raises:
            ValueError: a setting does not fit.
        """

    def start(self, context: Context) -> None:
        """Prepare for the first step; called once, before any state is restored."""

    @abstractmethod
    def proportions(self, refs: Scores, target: Float[Tensor, "B R"]) -> Float[Tensor, "#B K"]:
        """Non-negative numbers that alpha is proportional to in the next step.

        Args:
            refs: reference scores (B, K, R) of the global batch, with counts in ``unit``.
            target: how much each reply is to be preferred; (1, 0) for a pair.

        Returns:
            One row per pair, or one row if all pairs share it. A row of zeros becomes uniform.
        """

    def after_step(self, refs: Scores, target: Float[Tensor, "B R"]) -> None:
        """Update after the optimizer step that used ``proportions(refs, target)``."""


def to_simplex(
    proportions: Float[Tensor, "#B K"], rows: int
) -> tuple[Float[Tensor, "{rows} K"], int]:
    """Normalize proportions to alpha, one row per pair.

    Returns:
        alpha (rows, K), and how many rows were all zeros and therefore became uniform.

    Raises:
        ValueError: a proportion is negative or not finite.
    """
    total = proportions.sum(-1, keepdim=True)
    if not bool((torch.isfinite(total) & (proportions >= 0)).all()):
        raise ValueError(f"weights must be finite and not negative, got {proportions.tolist()}")
    uniform = torch.full_like(proportions, 1 / proportions.shape[-1])
    alpha = torch.where(total > 0, proportions / total.where(total > 0, 1), uniform)
    undecided = (total <= 0).expand(rows, 1)
    return alpha.expand(rows, -1), int(undecided.sum())
