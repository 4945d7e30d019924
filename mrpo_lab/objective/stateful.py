"""What every strategy that makes one choice per optimizer step has in common."""

from __future__ import annotations

from typing import Any


class Stateful:
    """Metrics to log and a state to checkpoint; by default there are none.

    Weightings of the references (alpha) and samplers of the aspects' weights (lambda) are both of
    this kind.
    """

    def metrics(self) -> dict[str, float]:
        """Numbers to log after a step, beside alpha or lambda itself."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next choice depends on apart from the configuration."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; called after ``start``."""
