"""The numbers of the training loop: what is asked of it, and what must survive a restart."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The numbers of the loop."""

    batch_size: int
    """Pairs per optimizer step, over all processes."""
    micro_batch_tokens: int
    """Tokens in one forward and backward pass, prompts counted once; a longer pair makes a pass of
    its own. Changes memory and speed, never the result."""
    epochs: int = 1
    evaluations: int = 10
    """Accuracy on val and test this many times, evenly spread, the last at the end."""
    accuracy_after_step: bool = True
    """Score each batch again after its step: batch accuracy before and after."""
    schedule: str = "constant"
    """Of the learning rate after warm-up: constant, linear or cosine, to 0 at the end."""
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    """Clip the gradient's norm to this; null does not clip."""
    checkpoint_every: int = 50
    """Optimizer steps between two checkpoints."""
    token_budget: int = 8192
    """Tokens in one forward pass of an evaluation."""
    samples: int = 0
    """Test prompts to answer before and after training."""
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "micro_batch_tokens",
            "epochs",
            "checkpoint_every",
            "token_budget",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluations", "warmup_steps", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be null or above 0, got {self.max_grad_norm}")


@dataclass
class LoopState:
    """What of the loop itself must survive a restart."""

    alpha_sum: list[float]
    """Sum over steps of each reference's mean alpha."""
    step: int = 0
    seconds: float = 0.0
    base: dict[str, float] = field(default_factory=dict)
    """Accuracies before training."""
    latest: dict[str, float] = field(default_factory=dict)
    """Accuracies at the last evaluation."""
    base_test: dict[str, Tensor] = field(default_factory=dict)
    """Fields of the base model's ``Scores`` of the test pairs."""
    latest_test: dict[str, Tensor] = field(default_factory=dict)
    """The same at the last evaluation."""
    base_trade_off: list[dict[str, Any]] = field(default_factory=list)
    """Of lists: how the base model ranks the test lists under each lambda."""
    undecided: int = 0
    """Pairs for which the weighting had no opinion."""
