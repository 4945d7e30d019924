"""The values that data are made of: messages, items (a prompt and its replies), token rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``"""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its replies: chosen and rejected, or any number that are rated."""

    prompt: tuple[Message, ...]
    replies: tuple[str, ...]
    ratings: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    """Aspect to a number for each reply, NaN where missing; none of a pair, whose first is best."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One prompt with one reply. The reply's tokens are ``ids[start:]``, end of turn included."""

    ids: np.ndarray
    start: int
    prefix_broken: bool = False
    """The rendered prompt is no token prefix of prompt + reply: the reply starts at the longest
    common prefix instead."""
    system_folded: bool = False
    """The template has no system role: the message was put before the first user message."""

    @property
    def reply_tokens(self) -> int:
        return len(self.ids) - self.start


Replies = tuple[TokenRow, ...]
"""The token rows of one prompt's R replies."""
