"""The output embedding: from hidden states to log-probabilities of reply tokens, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def widened(logits: Tensor) -> Tensor:
    """``logits`` in float32, or in float64 if they are: differences between replies are as small as
    the rounding of a softmax in 16 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Head:
    """The output embedding, with the scale and the soft cap that some model families add."""

    projection: nn.Module
    vocabulary: int
    """Number of logits, V."""
    scale: float = 1.0
    """Factor of the logits."""
    softcap: float | None = None
    """If given, logits are ``softcap * tanh(logits / softcap)``, after scaling."""
    logits_at_once: int = 2**23
    """Chunk size of the projection, in logits; see ``Backend``."""
    softmax_at_once: int = 2**20
    """Chunk size of the softmax, in logits."""

    def __call__(self, hidden: Float[Tensor, "*n H"]) -> Float[Tensor, "*n V"]:
        return self.adjusted(self.projection(hidden))

    def adjusted(self, projected: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        """The model's logits from the projection's output."""
        logits = widened(projected)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def token_logps(
        self, hidden: Float[Tensor, "n H"], targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """log softmax(logits)[target] in nats; the whole (n, V) logits are never in memory."""
        if not torch.is_grad_enabled():
            return torch.cat([self._logps(*chunk) for chunk in self._chunks(hidden, targets)])
        if not any(weight.requires_grad for weight in self.projection.parameters()):
            return _frozen_head(hidden, targets, self)
        return torch.cat(
            [
                checkpoint(self._logps, *chunk, use_reentrant=False)
                for chunk in self._chunks(hidden, targets)
            ]
        )

    def _logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        parts = self._split(self.softmax_at_once, self.projection(hidden), targets)
        return torch.cat([log_softmax_at(self.adjusted(part), wanted) for part, wanted in parts])

    def _chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return self._split(self.logits_at_once, hidden, targets)

    def _split(
        self, at_once: int, rows: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``rows`` and ``targets`` in chunks that make ``at_once`` logits."""
        size = max(1, at_once // self.vocabulary)
        return zip(rows.split(size), targets.split(size), strict=True)


class LogSoftmaxAt(torch.autograd.Function):
    """log softmax(logits)[target], exact to a few roundings.

    torch.log_softmax sums the exponentials of a large vocabulary in an order that loses 1e-5 nats
    per token, always in the same direction.
    """

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
    """``Head.token_logps`` for weights that are not trained: logits are computed only once.

    A token's log-probability depends on its own hidden state only. So the gradient with respect to
    that state is taken in the forward pass, while the logits are in memory; the backward pass
    multiplies it by the incoming gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        logps: list[Tensor] = []
        slopes: list[Tensor] = []
        for chunk, wanted in head._chunks(hidden.detach(), targets):
            with torch.enable_grad():
                projected = head.projection(chunk.requires_grad_())
            # The gradient with respect to each logit is written over the logit.
            for part, at in head._split(head.softmax_at_once, projected.detach(), wanted):
                with torch.enable_grad():
                    found = log_softmax_at(head.adjusted(part.requires_grad_()), at)
                    (slope,) = torch.autograd.grad(found.sum(), part)
                part.detach().copy_(slope)
                logps.append(found.detach())
            slopes.extend(torch.autograd.grad(projected, chunk, projected.detach()))
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0].unsqueeze(-1)).to(slopes.dtype), None, None


_frozen_head: Callable[..., Tensor] = _FrozenHead.apply
