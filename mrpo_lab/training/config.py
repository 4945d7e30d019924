"""The settings of the training loop."""

from dataclasses import dataclass

from mrpo_lab.training.schedule import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The keys of ``conf/train``."""

    batch_size: int
    """Pairs per optimizer step, over all processes."""
    micro_batch_tokens: int
    """Tokens in one forward and backward pass, with a shared prompt counted once; a longer pair
    makes a pass of its own. Changes memory, speed and rounding, nothing else."""
    epochs: int = 1
    evaluations: int = 10
    """Number of evaluations on val and test, evenly spread, the last at the end."""
    accuracy_after_step: bool = True
    """Score each batch again after its step, to log the batch accuracy before and after."""
    schedule: str = "constant"
    """Learning rate after warm-up: constant, or linear or cosine decay to 0."""
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    """Largest norm of the gradient, which is scaled down to it; null does not clip."""
    checkpoint_every: int = 50
    """Optimizer steps between two checkpoints."""
    token_budget: int = 8192
    """Tokens in one forward pass of an evaluation, as ``micro_batch_tokens`` in training."""
    samples: int = 0
    """Number of test prompts that the policy answers before and after training."""
    sample_tokens: int = 64
    """Longest of these answers in tokens."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "micro_batch_tokens",
            "epochs",
            "checkpoint_every",
            "token_budget",
            "sample_tokens",
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
