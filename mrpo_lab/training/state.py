"""The part of a checkpoint that is the loop's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class LoopState:
    """Counters and intermediate results of the training loop that must survive a restart."""

    alpha_sum: list[float]
    """Sum over steps of each reference's mean alpha."""
    step: int = 0
    seconds: float = 0.0
    """Time spent training, over all sessions."""
    base: dict[str, float] = field(default_factory=dict)
    """Metrics of the base model, before training."""
    latest: dict[str, float] = field(default_factory=dict)
    """Metrics at the last evaluation."""
    base_test: dict[str, Tensor] = field(default_factory=dict)
    """Sums and counts of the base model's scores of the test items."""
    latest_test: dict[str, Tensor] = field(default_factory=dict)
    """Sums and counts at the last evaluation."""
    base_trade_off: list[dict[str, Any]] = field(default_factory=list)
    """How the base model ranks the test lists under each lambda; empty for pairs."""
    undecided: int = 0
    """Number of pairs for which the weighting gave all references 0."""
