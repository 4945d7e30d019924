"""The part of a checkpoint that is the loop's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mrpo_lab.runs.identity import difference


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


def check_state(
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    trainable: Mapping[str, Tensor],
    num_refs: int,
    total_steps: int,
) -> None:
    """Check that a checkpoint is one of the run that is about to go on from it.

    Args:
        state: what ``Trainer.state_dict`` returned. Those of earlier versions do not say of which
            configuration they are.
        config: the run's configuration.
        trainable: the parameters that the run trains, by name.

    Raises:
        ValueError: it is of another run, or a number is out of range.
    """
    if differing := difference(config, state.get("run", config)):
        raise ValueError(f"it is of another run ({'; '.join(differing)})")
    weights, loop = state["trainable"], state["loop"]
    if {n: (w.shape, w.dtype) for n, w in weights.items()} != {
        n: (p.shape, p.dtype) for n, p in trainable.items()
    }:
        raise ValueError("it holds other weights than the run trains")
    if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        raise ValueError("a weight is not finite")
    if not 0 < loop["step"] <= total_steps:
        raise ValueError(f"it is of step {loop['step']} of {total_steps}")
    numbers = [loop["seconds"], *loop["alpha_sum"]]
    if len(loop["alpha_sum"]) != num_refs or not all(0 <= n < math.inf for n in numbers):
        raise ValueError("a number is out of range")
