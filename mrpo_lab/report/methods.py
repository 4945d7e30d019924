"""A method of the study: what is compared, how it is named, and in which order methods appear."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mrpo_lab.runs.run_choice import RunChoice

LOSSES = ("dpo", "mdpo", "mrpo", "geometric")
"""Losses in the order of figures and tables; others follow by name."""
WEIGHTINGS = (
    *("single", "uniform", "fixed", "arwc", "vdw", "vaw"),
    *("swcw", "swcw_oh", "tsw", "vsw", "rmc", "grid"),
)
"""Weightings in the order of figures and tables; others follow by name."""


@dataclass(frozen=True)
class Method:
    """A loss and a weighting, or DPO with a single reference."""

    loss: str
    weighting: str
    reference: str = ""
    """The single reference; empty for a weighting of several."""
    parameters: tuple[tuple[str, str], ...] = ()
    """Name and value of the parameters in which runs of this loss and weighting differ."""
    lambda_sampler: str = ""
    """How lambda is chosen, in words."""

    @classmethod
    def single(cls, reference: str) -> Method:
        """DPO with one reference."""
        return cls("dpo", "single", reference)

    @classmethod
    def of_run(cls, choice: RunChoice, named: set[str]) -> Method:
        """The method of a run.

        Args:
            named: the parameters that tell methods apart.
        """
        if choice.reference:
            return replace(cls.single(choice.reference), lambda_sampler=choice.lambda_sampler)
        parameters = tuple((k, v) for k, v in choice.parameters.items() if k in named)
        return cls(
            choice.loss,
            choice.weighting,
            parameters=parameters,
            lambda_sampler=choice.lambda_sampler,
        )

    @property
    def is_single(self) -> bool:
        """Whether one reference has all the weight."""
        return bool(self.reference)

    @property
    def uniform_baseline(self) -> Method:
        """Uniform weights under the same loss."""
        return Method(self.loss, "uniform")

    @property
    def weighting_label(self) -> str:
        """The weighting with its parameters, as tables and figures show it."""
        return self.weighting + "".join(f" {name}={value}" for name, value in self.parameters)

    @property
    def label(self) -> str:
        """The method as tables and figures show it."""
        parts = [f"dpo: {self.reference}"] if self.is_single else [self.loss, self.weighting_label]
        if self.lambda_sampler:
            parts.append(f"λ {self.lambda_sampler}")
        return " · ".join(parts)


def paper_order(loss: str, weighting: str) -> tuple[int, str, int, str]:
    """Sort key that puts methods in the paper's order."""
    combination = loss.partition("-")[0]
    return (
        LOSSES.index(combination) if combination in LOSSES else len(LOSSES),
        loss,
        WEIGHTINGS.index(weighting) if weighting in WEIGHTINGS else len(WEIGHTINGS),
        weighting,
    )
