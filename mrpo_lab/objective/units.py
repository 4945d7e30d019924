"""Units of log-probabilities: what the summed log-probability of a reply is divided by.

``token``         each model's own number of reply tokens
``policy_token``  the policy's number of reply tokens, for all models
``byte``          UTF-8 bytes of the reply's text plus 1 for the end of turn, for all models
``reply``         1: nats per reply

With references of different tokenizers, nats per token of different models are different units: a
margin grows with the bytes per token of its model. Nats per byte are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from mrpo_lab.objective.scores import Scores

Unit = Literal["token", "policy_token", "byte", "reply"]


@dataclass(frozen=True)
class ReplyLengths:
    """Lengths of the replies to N prompts that are the same for all models; 0 for missing ones."""

    policy_tokens: Int[Tensor, "N R"]
    bytes: Int[Tensor, "N R"]
    """UTF-8 bytes of the text plus 1."""


def check_unit(unit: str) -> None:
    """Check that ``unit`` is one of ``Unit``.

    Raises:
        ValueError: it is not.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")


def in_unit(scores: Scores, unit: Unit, lengths: ReplyLengths | None) -> Scores:
    """The same sums with counts in ``unit``, so that ``Scores.logps`` returns nats per unit.

    Args:
        scores: (N, R) of one model or (N, K, R) of K references, with counts in its own tokens.
        lengths: needed for the units byte and policy_token only.
    """
    if unit == "token":
        return scores
    if unit == "reply":
        return Scores(scores.sums, (scores.counts > 0).to(scores.counts))
    assert lengths is not None, f"unit {unit} needs the lengths of the replies"
    given = lengths.bytes if unit == "byte" else lengths.policy_tokens
    given = given if scores.counts.ndim == 2 else given.unsqueeze(1)
    counts = torch.where(scores.counts > 0, given, 0)
    return Scores(scores.sums, counts)
