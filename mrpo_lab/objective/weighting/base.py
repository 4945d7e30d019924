"""What every weighting is, and the one place where its answer becomes alpha."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.objective.scores import Scores


@dataclass(frozen=True)
class Context:
    """All that a weighting may know before step 0. Nothing of the test split is here."""

    slugs: list[str]
    """Names of the K references; the first is the anchor."""
    val: Scores
    """(N_val, K, R) reference scores of the validation split, labels included."""
    probe: Callable[..., list[float]]
    """``probe(subset, ...)`` is the policy's accuracy now on each of several subsets of the
    validation pairs, given by their numbers from 0; one pass scores them all."""
    rng: np.random.Generator


class Weighting(ABC):
    """Says, at every step, what alpha is proportional to.

    Every hook is called on every weighting; a subclass overrides those it needs.
    """

    def check(self, slugs: list[str], num_val: int) -> None:
        """Refuse, with a ValueError, what does not fit the references (the first is the anchor) or
        the number of validation pairs. Called before any model is loaded."""

    def start(self, context: Context) -> None:
        """Once, before the first step and before any state is restored."""

    @abstractmethod
    def proportions(self, refs: Scores) -> Float[Tensor, "#B K"]:
        """Non-negative numbers that alpha is proportional to, for the global batch ``refs``
        of shape (B, K, R); one row if all pairs share it. A row of zeros means 'no opinion'."""

    def after_step(self, refs: Scores) -> None:
        """After the optimizer step that used ``proportions(refs)``."""

    def metrics(self) -> dict[str, float]:
        """What is worth a curve beside alpha."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that ``proportions`` depends on beside the configuration: goes into checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; called after ``start``."""


def to_simplex(
    proportions: Float[Tensor, "#B K"], rows: int
) -> tuple[Float[Tensor, "{rows} K"], int]:
    """(alpha, number of rows without an opinion, which become uniform).

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
