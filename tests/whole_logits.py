"""An independent way to score a reply: one row alone, whole logits, in float64, token by token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrpo_lab.data.texts import TokenRow

VOCABULARY = 97
EOS = 2  # and padding


def random_rows(lengths: Sequence[tuple[int, int]] = ((17, 6), (4, 1), (23, 9))) -> list[TokenRow]:
    """Rows of (length, start). The padding token is in prompts, in replies, and at the end."""
    rng = np.random.default_rng(len(lengths))
    rows = []
    for length, start in lengths:
        ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
        ids[[0, length // 2, -1]] = EOS
        rows.append(TokenRow(ids, start))
    return rows


def whole_logits(model: Any, row: TokenRow) -> Tensor:
    """Logits (T, V) of one row alone, neither padded nor masked."""
    logits: Tensor = model(input_ids=torch.tensor(row.ids[None].astype(np.int64))).logits[0]
    return logits.double()


def slow_score(model: Any, row: TokenRow) -> Tensor:
    """Log-probability of the row's reply in nats, differentiable."""
    logps = torch.log_softmax(whole_logits(model, row), dim=-1)
    terms = [logps[t - 1, int(row.ids[t])] for t in range(row.start, len(row.ids))]
    return torch.stack(terms).sum()


def gradient(model: Any, score: Tensor) -> Tensor:
    """Gradient of ``score`` with respect to all parameters, as one vector."""
    model.zero_grad()
    score.backward()
    found = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([tensor.flatten() for tensor in found])


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert scale > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * scale)


def weighted(sums: Tensor) -> Tensor:
    """A scalar that depends on every row in a different way."""
    return (sums * torch.arange(1, len(sums) + 1)).sum()
