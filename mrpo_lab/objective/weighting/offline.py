"""Weightings that are fixed before the first step, most of them from the validation split.

``context.margins`` (N_val, K) are the references' margins d_ik in nats per ``unit``.
"""

import itertools
import math
from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from mrpo_lab.objective import simplex
from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.weighting.base import Context, Weighting


class Offline(Weighting):
    """Base class of weightings with one alpha for all pairs of all steps; they have no state."""

    def start(self, context: Context) -> None:
        self._fitted = self.fit(context).unsqueeze(0)

    def proportions(self, refs: Scores, target: Float[Tensor, "B R"]) -> Float[Tensor, "1 K"]:
        return self._fitted

    @abstractmethod
    def fit(self, context: Context) -> Float[Tensor, " K"]:
        """Non-negative numbers that alpha is proportional to."""


class Uniform(Offline):
    """Equal weights, alpha_k = 1 / K."""

    def __init__(self) -> None:
        super().__init__()

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        return torch.ones(len(context.slugs), dtype=torch.float64)


class Single(Offline):
    """All weight on the reference called ``slug`` (default: the anchor): single-reference DPO."""

    def __init__(self, slug: str | None = None) -> None:
        super().__init__()
        self._slug = slug

    def check(self, slugs: list[str], num_val: int) -> None:
        if self._slug is not None and self._slug not in slugs:
            raise ValueError(f"slug: no reference is called {self._slug!r}; choose from {slugs}")

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        slug = context.slugs[0] if self._slug is None else self._slug
        return torch.tensor([float(slug == name) for name in context.slugs], dtype=torch.float64)


class Fixed(Offline):
    """Given ``weights``, in the order of the references; they are normalized."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        if any(w < 0 for w in weights) or not math.isfinite(sum(weights)):
            raise ValueError(f"weights must be finite and not negative, got {weights}")
        if not sum(weights) > 0:
            raise ValueError(f"weights must not all be 0, got {weights}")
        self._weights = weights

    def check(self, slugs: list[str], num_val: int) -> None:
        if len(self._weights) != len(slugs):
            raise ValueError(
                f"weights has {len(self._weights)} numbers for the {len(slugs)} references {slugs}"
            )

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        return torch.tensor(self._weights, dtype=torch.float64)


class VDW(Offline):
    """Validation discrimination: alpha_k ~ sum of |d_ik| over val (2512.10040, eq. 4)."""

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        return context.margins.abs().sum(0)


class VAW(Offline):
    """Validation accuracy: alpha_k ~ number of val pairs with d_ik > 0 (2512.10040, eq. 5)."""

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        return (context.margins > 0).double().sum(0)


class RMC(Offline):
    """Agreement with the labels above chance: alpha_k ~ max(0, 2 accuracy_k - 1) on val."""

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        return (2 * context.val.accuracy(context.target) - 1).clamp(min=0)


class VSW(Offline):
    """Logistic regression of the val labels on the margins, with non-negative weights.

    Minimizes mean -log sigmoid(sum_k w_k d_ik) + relative_ridge s^2 |w|^2 over w >= 0, where s^2 is
    the mean of d_ik^2; this is convex. alpha is w normalized, uniform if w = 0. Because the penalty
    grows with the margins, alpha does not depend on their scale or unit.
    """

    def __init__(self, relative_ridge: float = 1e-4, unit: str = "token") -> None:
        super().__init__(unit)
        if not relative_ridge > 0:
            raise ValueError(
                f"relative_ridge must be greater than 0 for a unique optimum, got {relative_ridge}"
            )
        self._ridge = relative_ridge

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        margins = context.margins.double().cpu().numpy()
        scale = np.sqrt((margins**2).mean())
        if scale == 0:
            return torch.zeros(margins.shape[1], dtype=torch.float64)
        margins = margins / scale

        def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
            z = margins @ w
            loss = np.logaddexp(0, -z).mean() + self._ridge * (w @ w)
            slope = -np.exp(-np.logaddexp(0, z))  # -sigmoid(-z)
            return loss, margins.T @ slope / len(z) + 2 * self._ridge * w

        best = minimize(
            objective,
            x0=np.zeros(margins.shape[1]),
            jac=True,
            bounds=[(0, None)] * margins.shape[1],
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
        )
        return torch.from_numpy(np.asarray(best.x, dtype=np.float64))


class Grid(Offline):
    """Best alpha on val among the multiples of 1 / ``resolution`` on the simplex.

    Ranked by the accuracy of the mixture margin sum_k alpha_k d_ik; ties by the lower mean
    -log sigmoid of it, then by the lexicographically smaller alpha.
    """

    MAX_POINTS = 200_000

    def __init__(self, resolution: int = 10, unit: str = "token") -> None:
        super().__init__(unit)
        if resolution < 1:
            raise ValueError(f"resolution must be 1 or more, got {resolution}")
        self._resolution = resolution

    def check(self, slugs: list[str], num_val: int) -> None:
        points = simplex.grid_size(self._resolution, len(slugs))
        if points > self.MAX_POINTS:
            raise ValueError(
                f"resolution {self._resolution} with {len(slugs)} references is {points:,} grid "
                f"points, more than {self.MAX_POINTS:,}: lower resolution"
            )

    def fit(self, context: Context) -> Float[Tensor, " K"]:
        margins = context.margins.double().cpu()
        num_refs, m = margins.shape[1], self._resolution
        best: tuple[float, float, tuple[int, ...]] | None = None
        points = simplex.grid(m, num_refs)
        while chunk := list(itertools.islice(points, 512)):
            units = np.array(chunk)
            # Whole units and losses rounded to 10 decimals, so that rounding errors decide no tie.
            mixture = margins @ torch.from_numpy(units).double().T  # (N_val, points)
            wrong = (mixture <= 0).double().mean(0).tolist()
            entropy = -F.logsigmoid(mixture / m).mean(0).round(decimals=10)
            rows = zip(wrong, entropy.tolist(), map(tuple, units.tolist()), strict=True)
            best = min([*rows, best] if best else rows)
        assert best is not None
        return torch.tensor(best[2], dtype=torch.float64)
