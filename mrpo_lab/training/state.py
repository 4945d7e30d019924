"""What a checkpoint holds: the part that is the loop's own, and what is checked of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mrpo_lab.errors import UserError
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.identity import difference
from mrpo_lab.storage.checksums import DamagedError
from mrpo_lab.training.inputs import Data
from mrpo_lab.training.state_file import load_state


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

    @property
    def mean_alpha(self) -> Tensor:
        """Mean weights (K,) of the references over the steps so far; equal before the first."""
        total = torch.tensor(self.alpha_sum, dtype=torch.float64)
        return total / total.sum() if self.step else torch.full_like(total, 1 / len(total))


def load_checkpoint(
    run: Run, trainable: Mapping[str, Tensor], data: Data, total_steps: int
) -> dict[str, Any]:
    """Load a run's checkpoint, with tensors on the CPU.

    Args:
        trainable: the parameters that the run trains, by name.

    Raises:
        UserError: it is damaged or of another run, or was trained on other data.
    """
    path, advice = run.checkpoint, "delete it to start this run over"
    state = load_state(path)
    try:
        check_state(state, run.config, trainable, len(data.slugs), total_steps)
        same_data = state["data"] == data.fingerprint
    except ValueError as error:
        raise UserError(f"{path}: {error}: {advice}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(path, repr(error), advice) from error
    if not same_data:
        raise UserError(
            f"{path} was trained on other data than {run.name} has now: "
            "delete its folder to start over"
        )
    return state


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
