"""Token rows as one batch of tensors, padded to the longest row: what every model can compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mrpo_lab.data.texts import TokenRow

Side = Literal["left", "right"]
"""Where the padding goes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B padded token rows of T tokens."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    """1 for a token, 0 for padding."""
    position_ids: Int[Tensor, "B T"]
    """Counted from 0 at each row's first token."""
    is_reply: Bool[Tensor, "B T"]


def collate(rows: Sequence[TokenRow], device: torch.device, side: Side = "right") -> Batch:
    """Pad token rows to the length of the longest.

    Padding is known by its position, never by its token id: in many models the padding token is
    also the end-of-turn token, whose log-probability counts.
    """
    width = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    reply = np.zeros_like(ids, dtype=bool)
    for i, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row.ids)
        ids[i, first : first + len(row.ids)] = row.ids
        mask[i, first : first + len(row.ids)] = 1
        reply[i, first + row.start : first + len(row.ids)] = True
    positions = (mask.cumsum(-1) - 1).clip(min=0)
    tensors = [torch.from_numpy(array).to(device) for array in (ids, mask, positions, reply)]
    return Batch(*tensors)
