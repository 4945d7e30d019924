"""What changes over the steps of a run: the learning rate, and when the policy is evaluated."""

from __future__ import annotations

import math

import numpy as np

SCHEDULES = ("constant", "linear", "cosine")


def evaluation_steps(evaluations: int, total_steps: int) -> set[int]:
    """Steps, counted from 1, after which the policy is evaluated: evenly spread, the last included.

    There is at most one evaluation a step.
    """
    spread = np.linspace(0, total_steps, min(evaluations, total_steps) + 1)[1:].round().astype(int)
    return {*spread.tolist(), total_steps}


def learning_rate_factor(step: int, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate at ``step``, the same as that of transformers' schedules.

    It rises linearly from 0 to 1 over ``warmup_steps``; then it stays at 1 (constant), or falls to
    0 at ``total_steps`` in a line (linear) or half a cosine wave (cosine).
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    rest = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, (total_steps - step) / rest)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / rest))))
