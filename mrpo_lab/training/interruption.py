"""How a signal asks a run to save itself: the loop answers after the step it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def nothing() -> None:
    """What follows when nothing has to."""


class Interruption:
    """A signal comes between any two instructions: the weights may have moved and the step not be
    counted. So its handler only asks."""

    def __init__(self) -> None:
        self.asked = False
        self._training = False
        self._then: Callable[[], None] = nothing

    def ask(self, then: Callable[[], None] = nothing) -> None:
        """Save after this step, then call ``then``; call it at once when nothing is training."""
        if not self._training:
            then()
            return
        self.asked, self._then = True, then

    @contextmanager
    def training(self) -> Iterator[None]:
        """The loop runs and will answer."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def answer(self) -> None:
        """The state is saved: do what was to follow."""
        then, self.asked, self._then = self._then, False, nothing
        then()
