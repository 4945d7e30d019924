"""Weightings that follow the training data or the policy; their state is checkpointed."""

from collections import deque
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.weighting.base import Context, Weighting


class ARWC(Weighting):
    """Adaptive reference weighting per pair by confidence: alpha_ik ~ |d_ik| (Le et al., eq. 3).

    ``length_normalized=False`` means ``unit="reply"``, summed log-probabilities, as in Le et al.
    """

    def __init__(self, length_normalized: bool = True, unit: str | None = None) -> None:
        super().__init__(unit or ("token" if length_normalized else "reply"))

    def proportions(self, refs: Scores, target: Float[Tensor, "B R"]) -> Float[Tensor, "B K"]:
        return refs.margins(target).abs()


class SWCW(Weighting):
    """Sliding-window confidence: alpha_k ~ sum of |d_ik| over the last ``window`` batches.

    Uniform at the first step (2512.10040, eq. 6; the paper uses window 1).
    """

    def __init__(self, window: int = 1, unit: str = "token") -> None:
        super().__init__(unit)
        if window < 1:
            raise ValueError(f"window must be 1 or more, got {window}")
        self._past: deque[Float[Tensor, " K"]] = deque(maxlen=window)

    def proportions(self, refs: Scores, target: Float[Tensor, "B R"]) -> Float[Tensor, "1 K"]:
        if not self._past:
            return torch.ones_like(refs.sums[:1, :, 0])
        return torch.stack(list(self._past)).sum(0, keepdim=True)

    def after_step(self, refs: Scores, target: Float[Tensor, "B R"]) -> None:
        self._past.append(refs.margins(target).abs().sum(0))

    def state_dict(self) -> dict[str, Any]:
        return {"past": list(self._past)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._past.clear()
        self._past.extend(state["past"])


class SWCWOneHot(SWCW):
    """All weight on the reference that SWCW weights most; ties go to the first.

    At the first step this is the anchor.
    """

    def proportions(self, refs: Scores, target: Float[Tensor, "B R"]) -> Float[Tensor, "1 K"]:
        proportions = super().proportions(refs, target)
        first_largest = proportions.sort(dim=-1, descending=True, stable=True).indices[:, 0]
        return F.one_hot(first_largest, proportions.shape[-1]).to(proportions)


class TSW(Weighting):
    """Thompson sampling with one arm per reference and Beta(``prior``, ``prior``) priors.

    The arm used in a step is rewarded if the policy's accuracy on a fresh random subset of
    ``probe_size`` validation pairs is strictly higher after the step than before (2512.10040,
    section 3.3). The subset of the next step is drawn right after a step, so that one forward pass
    scores both subsets under the same policy.
    """

    def __init__(self, prior: float = 5.0, probe_size: int = 250) -> None:
        super().__init__()
        if not prior > 0:
            raise ValueError(f"prior must be greater than 0, got {prior}")
        if probe_size < 1:
            raise ValueError(f"probe_size must be 1 or more, got {probe_size}")
        self._prior, self._probe_size = prior, probe_size

    def check(self, slugs: list[str], num_val: int) -> None:
        if self._probe_size > num_val:
            raise ValueError(
                f"probe_size is {self._probe_size}, but there are {num_val} validation pairs"
            )

    def start(self, context: Context) -> None:
        self._context = context
        self._successes = np.full(len(context.slugs), self._prior)
        self._failures = np.full(len(context.slugs), self._prior)
        self._arm = 0
        self._probe: np.ndarray | None = None
        self._before = float("nan")
        """Accuracy on the current subset before the step."""
        self._change = (float("nan"), float("nan"))
        """Accuracies on the last step's subset, before and after the step."""

    def proportions(self, refs: Scores, target: Float[Tensor, "B R"]) -> Float[Tensor, "1 K"]:
        draws = self._context.rng.beta(self._successes, self._failures)
        self._arm = int(draws.argmax())
        if self._probe is None:
            self._probe = self._draw()
            (self._before,) = self._context.probe(self._probe)
        return F.one_hot(torch.tensor([self._arm]), len(draws)).to(refs.sums)

    def after_step(self, refs: Scores, target: Float[Tensor, "B R"]) -> None:
        following = self._draw()
        after, upcoming = self._context.probe(self._probe, following)
        counts = self._successes if after > self._before else self._failures
        counts[self._arm] += 1
        self._change = self._before, after
        self._probe, self._before = following, upcoming

    def _draw(self) -> np.ndarray:
        """Draw a subset of the validation pairs without replacement."""
        return self._context.rng.choice(len(self._context.val), self._probe_size, replace=False)

    def metrics(self) -> dict[str, float]:
        mean = self._successes / (self._successes + self._failures)
        return {
            "bandit/arm": float(self._arm),
            "bandit/probe_before": self._change[0],
            "bandit/probe_after": self._change[1],
            **{
                f"bandit/mean/{s}": float(m) for s, m in zip(self._context.slugs, mean, strict=True)
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "successes": self._successes.tolist(),
            "failures": self._failures.tolist(),
            "rng": self._context.rng.bit_generator.state,
            "probe": None if self._probe is None else self._probe.tolist(),
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._successes = np.array(state["successes"])
        self._failures = np.array(state["failures"])
        self._context.rng.bit_generator.state = state["rng"]
        self._probe = None if state["probe"] is None else np.array(state["probe"])
        self._before = state["before"]
