"""What a model can be given: how many positions it has, and which tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mrpo_lab.data.texts import TokenRow
from mrpo_lab.errors import UserError

POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""Names under which configurations of transformers keep the number of positions."""
COUNTED_FROM_PADDING = ("roberta", "camembert", "data2vec-text", "xmod")
"""In model types that contain one of these names, positions begin after the padding token's id."""


def max_positions(config: Any) -> int | None:
    """Largest number of tokens that a model with this ``config`` was made for, or None if its
    configuration names none, as that of a recurrent model.

    A rotary model computes longer texts as well, in a way that it was never trained for.
    """
    for name in POSITIONS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            counted = any(kind in str(config.model_type) for kind in COUNTED_FROM_PADDING)
            return value - (config.pad_token_id or 0) - 1 if counted else value
    return None


def check_rows(
    rows: Iterable[TokenRow], model: str, positions: int | None, vocabulary: int | None
) -> None:
    """Check that a model can be given all ``rows``.

    Args:
        model: what messages call it.
        positions: see ``max_positions``.
        vocabulary: number of tokens that the model has embeddings of.

    Raises:
        UserError: a row is too long, or a token has no embedding.
    """
    for row in rows:
        if positions is not None and len(row.ids) > positions:
            raise UserError(
                f"{model}: a prompt with its reply has {len(row.ids)} tokens, and the model has "
                f"{positions} positions: lower dataset.max_tokens"
            )
        largest = int(row.ids.max(initial=0))
        if vocabulary is not None and largest >= vocabulary:
            raise UserError(
                f"{model}: tokenizer.json has token {largest}, and the model has embeddings of "
                f"only {vocabulary} tokens: use the model's own tokenizer and template"
            )
