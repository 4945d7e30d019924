"""Replies that are the same: as texts, as tokens under some template, or after truncation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mrpo_lab.data.spool import Items
from mrpo_lab.data.tokenization import Lengths, Tokenization


def seen_before(ids: np.ndarray) -> np.ndarray:
    """Whether each row equals an earlier one, (N,)."""
    seen = np.ones(len(ids), dtype=bool)
    seen[np.unique(as_scalars(ids), return_index=True)[1]] = False
    return seen


def as_scalars(ids: np.ndarray) -> np.ndarray:
    """Each row of ids as one string, (N,)."""
    return np.ascontiguousarray(ids).view(f"S{ids.itemsize * ids.shape[1]}").reshape(-1)


def token_counts(items: Items, tokenizers: Sequence[Tokenization]) -> list[Lengths]:
    """The token counts of the items under each tokenizer."""
    return [tokenizer.lengths(items, items.ids) for tokenizer in tokenizers]


def same_when_rendered(ids: np.ndarray, measured: Sequence[Lengths]) -> np.ndarray:
    """Whether a reply differs from an earlier one as text, but not under some template, (N, R)."""
    again = np.zeros(ids.shape, dtype=bool)
    for m in measured:
        for later in range(1, ids.shape[-1]):
            earlier = slice(0, later)
            again[:, later] |= (
                (m.digest[:, earlier] == m.digest[:, [later]])
                & (m.reply[:, earlier] > 0)
                & (m.reply[:, [later]] > 0)
                & (ids[:, earlier] != ids[:, [later]])
            ).any(-1)
    return again


def identical_after_truncation(
    items: Items,
    tokenizers: Sequence[Tokenization],
    measured: Sequence[Lengths],
    max_tokens: int,
) -> int:
    """Number of pairs whose replies truncation would have made identical under some tokenizer."""
    # Where the prompt alone is too long, truncation leaves nothing of the replies.
    same = np.any([(m.prompt >= max_tokens).all(-1) for m in measured], axis=0)
    for tokenizer, m in zip(tokenizers, measured, strict=True):
        both_cut = (m.prompt + m.reply >= max_tokens).all(-1)
        unsure = np.flatnonzero(both_cut & ~same)
        same[unsure] = tokenizer.identical_after_truncation(
            items[unsure], items.ids[unsure], max_tokens
        )
    return int(same.sum())
