"""The slow way to score a reply: one row alone, its whole logits, float64, token by token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrpo_lab.data.texts import TokenRow

VOCABULARY = 97
EOS = 2  # and padding


def random_rows(lengths: Sequence[tuple[int, int]] = ((17, 6), (4, 1), (23, 9))) -> list[TokenRow]:
    """Rows of (length, start); token ids of the padding stand in prompts and replies, and end."""
    rng = np.random.default_rng(len(lengths))
    rows = []
    for length, start in lengths:
        ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
        ids[[0, length // 2, -1]] = EOS
        rows.append(TokenRow(ids, start))
    return rows


def whole_logits(model: Any, row: TokenRow) -> Tensor:
    """(T, V) of one row alone, neither padded nor masked."""
    logits: Tensor = model(input_ids=torch.tensor(row.ids[None].astype(np.int64))).logits[0]
    return logits.double()


def slow_score(model: Any, row: TokenRow) -> Tensor:
    """The oracle, differentiable."""
    logps = torch.log_softmax(whole_logits(model, row), dim=-1)
    terms = [logps[t - 1, int(row.ids[t])] for t in range(row.start, len(row.ids))]
    return torch.stack(terms).sum()


def gradient(model: Any, score: Tensor) -> Tensor:
    """Of all parameters, one after the other."""
    model.zero_grad()
    score.backward()
    found = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([tensor.flatten() for tensor in found])


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert scale > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * scale)


def weighted(sums: Tensor) -> Tensor:
    """A scalar that tells the rows apart."""
    return (sums * torch.arange(1, len(sums) + 1)).sum()
