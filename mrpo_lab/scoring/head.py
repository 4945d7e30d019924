"""From hidden states to the log-probabilities of reply tokens, with few logits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**28}
"""Positions x vocabulary. With fewer, the head's weights are read more often."""
WIDE_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Of them, those that are taken through the softmax at once, in float32: 4 MiB, which a processor's
cache holds, and 256 MiB."""


def widened(logits: Tensor) -> Tensor:
    """In float32, or float64 where the model is: a softmax in 16 bits loses what margins are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Head:
    """The output embedding, with the two adjustments that model families make."""

    projection: nn.Module
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Float[Tensor, "*n H"]) -> Float[Tensor, "*n V"]:
        return self.adjusted(self.projection(hidden))

    def adjusted(self, projected: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        logits = widened(projected)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def token_logps(
        self, hidden: Float[Tensor, "n H"], targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """log softmax(logits)[target] in nats; the (n, V) logits are never held whole."""
        if not torch.is_grad_enabled():
            return torch.cat([self._logps(*piece) for piece in self._pieces(hidden, targets)])
        if not any(weight.requires_grad for weight in self.projection.parameters()):
            return _frozen_head(hidden, targets, self)
        return torch.cat(
            [
                checkpoint(self._logps, *piece, use_reentrant=False)
                for piece in self._pieces(hidden, targets)
            ]
        )

    def _logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        parts = self._split(WIDE_AT_ONCE, self.projection(hidden), targets)
        return torch.cat([log_softmax_at(self.adjusted(part), wanted) for part, wanted in parts])

    def _pieces(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return self._split(LOGITS_AT_ONCE, hidden, targets)

    def _split(
        self, at_once: Mapping[str, int], rows: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, at_once[rows.device.type] // self.vocabulary)
        return zip(rows.split(size), targets.split(size), strict=True)


class LogSoftmaxAt(torch.autograd.Function):
    """log softmax(logits)[target], exact to a few roundings: torch's own sums exponentials in an
    order that loses 1e-5 nats a token over a large vocabulary, always to the same side."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        largest = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, targets.unsqueeze(-1))
        exps = (logits - largest).exp_()
        total = exps.sum(-1, keepdim=True)
        ctx.save_for_backward(exps, total, targets)
        return (chosen - largest - total.log()).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exps, total, targets = ctx.saved_tensors
        above = grads[0].unsqueeze(-1)
        slopes = exps.mul_(-above / total)
        return slopes.scatter_add_(-1, targets.unsqueeze(-1), above), None


log_softmax_at: Callable[..., Tensor] = LogSoftmaxAt.apply


class _FrozenHead(torch.autograd.Function):
    """A token's log-probability depends on its own hidden state only, so that state's gradient is
    known, but for one factor, as soon as the logits are: they need not be computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        logps: list[Tensor] = []
        slopes: list[Tensor] = []
        for piece, wanted in head._pieces(hidden.detach(), targets):
            with torch.enable_grad():
                projected = head.projection(piece.requires_grad_())
            # Each logit's slope is written where the logit was.
            for part, at in head._split(WIDE_AT_ONCE, projected.detach(), wanted):
                with torch.enable_grad():
                    found = log_softmax_at(head.adjusted(part.requires_grad_()), at)
                    (slope,) = torch.autograd.grad(found.sum(), part)
                part.detach().copy_(slope)
                logps.append(found.detach())
            slopes.extend(torch.autograd.grad(projected, piece, projected.detach()))
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0].unsqueeze(-1)).to(slopes.dtype), None, None


_frozen_head: Callable[..., Tensor] = _FrozenHead.apply
