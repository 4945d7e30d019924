"""The types that preference data consist of: messages, items and token rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``"""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with its replies: a chosen and a rejected one, or a list of rated replies."""

    prompt: tuple[Message, ...]
    replies: tuple[str, ...]
    ratings: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    """Aspect to one rating per reply, NaN where missing. Empty for a pair, whose first reply is the
    chosen one."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The tokens of one prompt with one reply.

    The reply's tokens are ``ids[start:]``, its end-of-turn token included.
    """

    ids: np.ndarray
    """(T,) int32, prompt and reply."""
    start: int
    """Index of the reply's first token."""
    prefix_broken: bool = False
    """Whether the prompt's tokens are no prefix of those of prompt + reply. The reply then starts
    where the longest common prefix ends."""
    system_folded: bool = False
    """Whether the system message was put before the first user message, because the template
    refuses the system role."""

    @property
    def reply_tokens(self) -> int:
        return len(self.ids) - self.start


Replies = tuple[TokenRow, ...]
"""The token rows of one item, one per reply."""


def byte_lengths(items: Sequence[Item]) -> np.ndarray:
    """UTF-8 bytes of each reply (N, R) plus 1 for its end of turn; 0 for missing replies.

    They depend on the text alone, not on a model, a tokenizer or a template.
    """
    lengths = [[len(r.encode(errors="surrogatepass")) + 1 for r in item.replies] for item in items]
    width = max(map(len, lengths), default=0)
    return np.array([row + [0] * (width - len(row)) for row in lengths], dtype=np.int64)
