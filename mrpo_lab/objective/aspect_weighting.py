"""How lambda, the weights of the aspects, is chosen once per optimizer step.

lambda is a point of the simplex over the A aspects by which the replies of lists are rated, in the
data set's order. Preference pairs have one aspect, so lambda is (1,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.objective import simplex
from mrpo_lab.objective.stateful import Stateful

MAX_POINTS = 1000
FIRST_USES = 3
"""How often every row of a learned table is used in turn: fewer rewards tell nothing of noise."""


@dataclass(frozen=True)
class LambdaContext:
    """Everything a lambda sampler may know before the first step."""

    aspects: list[str]
    rng: np.random.Generator
    probe_loss: Callable[[np.ndarray], float]
    """The policy's current listwise loss in nats, averaged over the aspects, on a subset of the
    validation lists, given as an index array."""
    num_val: int


class LambdaSampler(Stateful, ABC):
    """Chooses lambda for every step. Every method is called on every sampler."""

    def __init__(self, condition: bool = False, grid: int = 4) -> None:
        """
        Args:
            condition: write lambda into the policy's system prompt, so that one trained policy can
                be steered by choosing lambda at inference.
            grid: after training, the policy is evaluated at all multiples of 1 / ``grid``.
        """
        if grid < 1:
            raise ValueError(f"grid must be 1 or more, got {grid}")
        self.condition, self._grid = condition, grid

    def check(self, aspects: list[str], num_val: int) -> None:
        """Check the settings against the aspects and the size of the validation split.

        Called before any model is loaded.

        Raises:
            ValueError: a setting does not fit.
        """
        if self.condition and len(aspects) < 2:
            raise ValueError(f"condition: {aspects[0]} is the only aspect, there is no trade-off")
        if self.condition and simplex.grid_size(self._grid, len(aspects)) > MAX_POINTS:
            raise ValueError(f"grid: more than {MAX_POINTS:,} points for {len(aspects)} aspects")

    def start(self, context: LambdaContext) -> None:
        """Prepare for the first step; called once, before any state is restored."""
        self._context = context

    @abstractmethod
    def draw(self) -> Float[Tensor, " A"]:
        """Draw lambda for the next step."""

    @abstractmethod
    def mean_lambda(self, aspects: Sequence[str]) -> Float[Tensor, " A"]:
        """The mean of the drawn lambdas: evaluations and weightings judge replies by it."""

    def after_step(self) -> None:
        """Update after the optimizer step that used the lambda last drawn."""

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._context.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._context.rng.bit_generator.state = state["rng"]

    def points(self, aspects: Sequence[str]) -> Float[Tensor, "P A"]:
        """Lambdas at which the trained policy is evaluated: a grid if it is conditioned on lambda,
        else the mean alone."""
        if not self.condition:
            return self.mean_lambda(aspects).unsqueeze(0)
        grid = list(simplex.grid(self._grid, len(aspects)))
        return torch.tensor(grid, dtype=torch.float64) / self._grid


class FixedLambda(LambdaSampler):
    """The same lambda at every step, given by aspect.

    Aspects that ``weights`` does not name have weight 0; null gives all aspects equal weight.
    """

    def __init__(
        self, weights: dict[str, float] | None = None, condition: bool = False, grid: int = 4
    ) -> None:
        super().__init__(condition, grid)
        self._weights = None if weights is None else checked_weights(weights)

    def check(self, aspects: list[str], num_val: int) -> None:
        super().check(aspects, num_val)
        check_names(self._weights or {}, aspects)

    def draw(self) -> Float[Tensor, " A"]:
        return self.mean_lambda(self._context.aspects)

    def mean_lambda(self, aspects: Sequence[str]) -> Float[Tensor, " A"]:
        return in_order(self._weights or dict.fromkeys(aspects, 1.0), aspects)


class DirichletLambda(LambdaSampler):
    """lambda drawn from a Dirichlet distribution at every step.

    ``concentration`` is one number for all aspects or a number for each by name; 1 is uniform on
    the simplex, values below 1 prefer its corners.
    """

    def __init__(
        self,
        concentration: float | dict[str, float] = 1.0,
        condition: bool = True,
        grid: int = 4,
    ) -> None:
        super().__init__(condition, grid)
        values = concentration.values() if isinstance(concentration, dict) else [concentration]
        if not all(value > 0 and math.isfinite(value) for value in values):
            raise ValueError(f"concentration must be greater than 0, got {concentration}")
        self._concentration = concentration

    def check(self, aspects: list[str], num_val: int) -> None:
        super().check(aspects, num_val)
        if isinstance(self._concentration, dict):
            check_names(self._concentration, aspects)
            if lacking := [aspect for aspect in aspects if aspect not in self._concentration]:
                raise ValueError(f"concentration: give one for {lacking[0]} too")

    def draw(self) -> Float[Tensor, " A"]:
        drawn = self._context.rng.dirichlet(self._alpha(self._context.aspects).numpy())
        return torch.from_numpy(drawn)

    def mean_lambda(self, aspects: Sequence[str]) -> Float[Tensor, " A"]:
        alpha = self._alpha(aspects)
        return alpha / alpha.sum()

    def _alpha(self, aspects: Sequence[str]) -> Float[Tensor, " A"]:
        given = self._concentration
        each = given if isinstance(given, dict) else dict.fromkeys(aspects, given)
        return torch.tensor([each[aspect] for aspect in aspects], dtype=torch.float64)


class TableLambda(LambdaSampler):
    """lambda drawn from a table at every step.

    ``rows`` map aspects to weights; ``probabilities`` defaults to all rows equally often.
    """

    def __init__(
        self,
        rows: list[dict[str, float]],
        probabilities: list[float] | None = None,
        condition: bool = True,
        grid: int = 4,
    ) -> None:
        super().__init__(condition, grid)
        if not rows:
            raise ValueError("rows: give at least one, {aspect: weight}")
        self._rows = [checked_weights(row) for row in rows]
        given = [1.0] * len(rows) if probabilities is None else probabilities
        if (
            len(given) != len(rows)
            or any(not p >= 0 for p in given)
            or not 0 < sum(given) < math.inf
        ):
            raise ValueError(f"probabilities must be {len(rows)} numbers of 0 or more, got {given}")
        self._probabilities = np.array(given) / sum(given)

    def check(self, aspects: list[str], num_val: int) -> None:
        super().check(aspects, num_val)
        for row in self._rows:
            check_names(row, aspects)

    def draw(self) -> Float[Tensor, " A"]:
        row = int(self._context.rng.choice(len(self._rows), p=self._probabilities))
        return in_order(self._rows[row], self._context.aspects)

    def mean_lambda(self, aspects: Sequence[str]) -> Float[Tensor, " A"]:
        rows = torch.stack([in_order(row, aspects) for row in self._rows])
        return torch.from_numpy(self._probabilities) @ rows


class LearnedLambda(LambdaSampler):
    """Thompson sampling over a table of lambdas.

    The reward of a row is the decrease of the validation listwise loss, averaged over the aspects,
    across the step that used it. The loss falls fastest at the start of training, so rewards are
    modeled as an effect of the row plus a trend over steps that all rows share, with normal noise;
    the effects are drawn from their posterior, after every row was used ``FIRST_USES`` times.
    lambda-DPO (2506.19780) describes a learned scheduler without saying which. ``rows: null`` takes
    the corners of the simplex and its center.
    """

    def __init__(
        self,
        rows: list[dict[str, float]] | None = None,
        probe_size: int = 32,
        condition: bool = True,
        grid: int = 4,
    ) -> None:
        super().__init__(condition, grid)
        if probe_size < 1:
            raise ValueError(f"probe_size must be 1 or more, got {probe_size}")
        self._given = None if rows is None else [checked_weights(row) for row in rows]
        self._probe_size = probe_size

    def check(self, aspects: list[str], num_val: int) -> None:
        super().check(aspects, num_val)
        for row in self._given or ():
            check_names(row, aspects)
        if self._probe_size > num_val:
            raise ValueError(
                f"probe_size is {self._probe_size}, but there are {num_val} validation lists"
            )

    def start(self, context: LambdaContext) -> None:
        super().start(context)
        self._rows = self._table(context.aspects)
        self._row = 0
        self._past_rows: list[int] = []
        self._rewards: list[float] = []
        """Row and reward of every past step."""

    def draw(self) -> Float[Tensor, " A"]:
        rng, num_val = self._context.rng, self._context.num_val
        self._row = int(self._draw_effects().argmax())
        self._probe = rng.choice(num_val, self._probe_size, replace=False)
        self._before = self._context.probe_loss(self._probe)
        return self._rows[self._row]

    def _draw_effects(self) -> np.ndarray:
        """Draw each row's effect on the reward from its posterior.

        Until every row was used ``FIRST_USES`` times, the least used row gets the largest value.
        """
        uses = np.bincount(self._past_rows, minlength=len(self._rows))
        if uses.min() < FIRST_USES:
            return -uses.astype(float)
        mean, covariance = row_effects(self._past_rows, self._rewards, len(self._rows))
        noise = self._context.rng.standard_normal(len(self._rows))
        return np.asarray(mean + np.linalg.cholesky(covariance) @ noise)

    def after_step(self) -> None:
        reward = self._before - self._context.probe_loss(self._probe)
        self._past_rows.append(self._row)
        self._rewards.append(reward)

    def mean_lambda(self, aspects: Sequence[str]) -> Float[Tensor, " A"]:
        return self._table(aspects).mean(0)

    def _table(self, aspects: Sequence[str]) -> Float[Tensor, "J A"]:
        corners = torch.eye(len(aspects), dtype=torch.float64)
        if self._given is None:
            return torch.cat([corners, corners.mean(0, keepdim=True)])
        return torch.stack([in_order(row, aspects) for row in self._given])

    def metrics(self) -> dict[str, float]:
        return {"lambda_bandit/row": float(self._row), "lambda_bandit/reward": self._rewards[-1]}

    def state_dict(self) -> dict[str, Any]:
        past = {"rows": list(self._past_rows), "rewards": list(self._rewards)}
        return super().state_dict() | past

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "rewards" not in state:
            raise ValueError(
                "its learned lambda was not corrected for the trend of the rewards, as it is since "
                "version 0.2: delete the run's folder to start over"
            )
        super().load_state_dict(state)
        self._past_rows, self._rewards = list(state["rows"]), list(state["rewards"])


def row_effects(
    rows: Sequence[int], rewards: Sequence[float], number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean (J,) and covariance (J, J) of the rows' effects on the reward.

    The model is reward_t = effect of row_t + a log(1 + t) + b log(1 + t)^2 + normal noise, fitted
    by least squares with a flat prior; the trend is centered on the steps so far.
    """
    steps = np.log1p(np.arange(len(rows)))
    trend = np.stack([steps, steps**2], axis=1)
    design = np.concatenate([np.eye(number)[list(rows)], trend - trend.mean(0)], axis=1)
    inverse = np.linalg.inv(design.T @ design + 1e-6 * np.eye(number + 2))
    fitted = inverse @ design.T @ np.array(rewards)
    residuals = np.array(rewards) - design @ fitted
    variance = residuals @ residuals / max(len(rows) - number - 2, 1)
    floor = 1e-24 * np.eye(number)  # so that a perfect fit has a Cholesky factor
    return fitted[:number], variance * inverse[:number, :number] + floor


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return ``weights`` as a dict after checking that they can be normalized.

    Raises:
        ValueError: one is negative or not finite, or all are 0.
    """
    if any(not w >= 0 for w in weights.values()) or not 0 < sum(weights.values()) < math.inf:
        raise ValueError(f"weights must be finite, not negative and not all 0, got {dict(weights)}")
    return dict(weights)


def check_names(weights: Mapping[str, float], aspects: Sequence[str]) -> None:
    """Check that the data set rates all named aspects.

    Raises:
        ValueError: it does not rate one of them.
    """
    for aspect in weights:
        if aspect not in aspects:
            raise ValueError(f"no aspect is called {aspect!r}; choose from {', '.join(aspects)}")


def in_order(weights: Mapping[str, float], aspects: Sequence[str]) -> Float[Tensor, " A"]:
    """Normalized weights in the order of ``aspects``."""
    given = torch.tensor([weights.get(aspect, 0.0) for aspect in aspects], dtype=torch.float64)
    return given / given.sum()
