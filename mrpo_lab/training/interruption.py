"""How a signal asks a run to save a checkpoint: the loop answers after its current step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def nothing() -> None:
    """Do nothing: the default for what follows the checkpoint."""


class Interruption:
    """A request from a signal handler to save a checkpoint.

    A signal arrives between any two instructions, perhaps when the weights have moved but the step
    is not counted yet. So the handler only asks, and the training loop answers after the step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._training = False
        self._then: Callable[[], None] = nothing

    def ask(self, then: Callable[[], None] = nothing) -> None:
        """Ask for a checkpoint after the current step and a call of ``then``.

        Outside the training loop there is nothing to save, and ``then`` is called at once.
        """
        if not self._training:
            then()
            return
        self.asked, self._then = True, then

    @contextmanager
    def training(self) -> Iterator[None]:
        """Mark the time in which the training loop runs and will answer."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def answer(self) -> None:
        """Call what was to follow the checkpoint, which has been written."""
        then, self.asked, self._then = self._then, False, nothing
        then()
