r"""Preference losses against K references. Pure functions of tensors.

Axes:  B prompts of the batch, K references, R replies to a prompt. A pair is R = 2, reply 0 chosen.
Units: log-probabilities in nats, per token or per reply, alike for policy and references.

Three choices are independent. A *combination* (dpo, mdpo, mrpo, geometric) says how K references
enter the implicit rewards r = beta (log pi - log pi_ref). A *link* (logistic, robust, ipo, hinge)
turns rewards into a loss; *listwise* does it for any number of replies. A *clip* (no_clip, ctro)
confines references to a trust region. The index 0 on axis K is the anchor: the policy's own initial
model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.objective.scores import Scores


@runtime_checkable
class Link(Protocol):
    """Rewards of the R replies and how much each is preferred in, one loss per prompt out."""

    def __call__(
        self, rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
    ) -> Float[Tensor, "*n"]: ...


@runtime_checkable
class Linked(Protocol):
    """A link that has been told what is preferred."""

    def __call__(self, rewards: Float[Tensor, "*n R"], *, beta: float) -> Float[Tensor, "*n"]: ...


@runtime_checkable
class Combination(Protocol):
    """(loss (B,), rewards (B, R)) of policy scores against weighted references."""

    def __call__(
        self,
        policy: Float[Tensor, "B R"],
        refs: Float[Tensor, "B K R"],
        alpha: Float[Tensor, "B K"],
        *,
        beta: float,
        link: Linked,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]: ...


Clip = Callable[[Float[Tensor, "B K R"]], Float[Tensor, "B K R"]]


def dpo(
    policy: Float[Tensor, "B R"],
    refs: Float[Tensor, "B K R"],
    alpha: Float[Tensor, "B K"],
    *,
    beta: float,
    link: Linked,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    """DPO against one reference (Rafailov et al. 2023, eq. 7): the one of largest alpha.

    Of several with the largest alpha the first is taken, which makes the anchor the reference
    wherever alpha has no opinion.
    """
    first_largest = alpha.sort(dim=-1, descending=True, stable=True).indices[:, 0]
    rewards = beta * (policy - refs[torch.arange(len(refs), device=refs.device), first_largest])
    return link(rewards, beta=beta), rewards


def mdpo(
    policy: Float[Tensor, "B R"],
    refs: Float[Tensor, "B K R"],
    alpha: Float[Tensor, "B K"],
    *,
    beta: float,
    link: Linked,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    """Weighted sum of the K single-reference losses (Le et al. 2025, Multi-DPO)."""
    refs = _without_unweighted(refs, alpha)
    rewards = beta * (policy.unsqueeze(1) - refs)  # (B, K, R)
    loss = (alpha * link(rewards, beta=beta)).sum(-1)
    return loss, (alpha.unsqueeze(-1) * rewards).sum(1)


def mrpo(
    policy: Float[Tensor, "B R"],
    refs: Float[Tensor, "B K R"],
    alpha: Float[Tensor, "B K"],
    *,
    beta: float,
    link: Linked,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    r"""DPO against the weighted harmonic mean of the references (Le et al. 2025, MRPO).

    .. math:: \log\pi_{ref} = -\log\sum_k \alpha_k e^{-\log\pi_k}

    As a logsumexp: log 0 = -inf removes a reference exactly, so nothing is clamped.
    """
    refs = _without_unweighted(refs, alpha)
    harmonic = -torch.logsumexp(alpha.log().unsqueeze(-1) - refs, dim=1)  # (B, R)
    rewards = beta * (policy - harmonic)
    return link(rewards, beta=beta), rewards


def geometric(
    policy: Float[Tensor, "B R"],
    refs: Float[Tensor, "B K R"],
    alpha: Float[Tensor, "B K"],
    *,
    beta: float,
    link: Linked,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    """DPO against the geometric mixture of the references (Aminian et al. 2025).

    The mixture's normaliser depends on the prompt alone and cancels between two replies.
    """
    refs = _without_unweighted(refs, alpha)
    rewards = beta * (policy - (alpha.unsqueeze(-1) * refs).sum(1))
    return link(rewards, beta=beta), rewards


def _without_unweighted(
    refs: Float[Tensor, "B K R"], alpha: Float[Tensor, "B K"]
) -> Float[Tensor, "B K R"]:
    """A weight of exactly 0 removes its reference even where that reference is not finite."""
    return refs.masked_fill((alpha == 0).unsqueeze(-1), 0.0)


def _check_flips(name: str, probability: float) -> None:
    if not 0 <= probability < 0.5:
        raise ValueError(f"{name} must be at least 0 and below 0.5, got {probability}")


def _z(rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"]) -> Float[Tensor, "*n"]:
    """Reward of the preferred reply minus that of the other."""
    if rewards.shape[-1] != 2:
        raise ValueError(
            f"this link is for pairs, not for lists of {rewards.shape[-1]} replies: choose "
            "loss/link=listwise, or read the lists as pairs, dataset.pairs=best_worst"
        )
    return (rewards[..., 0] - rewards[..., 1]) * torch.sign(target[..., 0] - target[..., 1])


def logistic(
    rewards: Float[Tensor, "*n R"],
    target: Float[Tensor, "*#n R"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*n"]:
    """-log sigmoid(z), z = r_chosen - r_rejected; smoothed by epsilon (cDPO, Mitchell 2023)."""
    _check_flips("label_smoothing", label_smoothing)
    z = _z(rewards, target)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust(
    rewards: Float[Tensor, "*n R"],
    target: Float[Tensor, "*#n R"],
    *,
    beta: float,
    label_flip: float = 0.1,
) -> Float[Tensor, "*n"]:
    """Unbiased under labels flipped with probability epsilon < 1/2 (Chowdhury et al. 2024)."""
    _check_flips("label_flip", label_flip)
    z = _z(rewards, target)
    observed, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1 - label_flip) * observed - label_flip * flipped) / (1 - 2 * label_flip)


def ipo(
    rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
) -> Float[Tensor, "*n"]:
    """(z / beta - 1 / (2 beta))^2 (Azar et al. 2023): beta is the temperature tau there."""
    return (_z(rewards, target) / beta - 1 / (2 * beta)).square()


def hinge(
    rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
) -> Float[Tensor, "*n"]:
    """max(0, 1 - z) (SLiC, Zhao et al. 2023)."""
    return F.relu(1 - _z(rewards, target))


def listwise(
    rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
) -> Float[Tensor, "*n"]:
    r"""Cross-entropy :math:`-\sum_i p^*_i \log\mathrm{softmax}_i(r)` (lambda-DPO, 2506.19780).

    A reward of -inf takes its reply out. For a pair with target (1, 0) it is ``logistic``.
    """
    terms = target * rewards.log_softmax(-1)
    return -terms.where(target > 0, 0.0).sum(-1)


def no_clip(refs: Float[Tensor, "B K R"]) -> Float[Tensor, "B K R"]:
    """References as they are."""
    return refs


def ctro(refs: Float[Tensor, "B K R"], *, epsilon: float, adaptive: bool) -> Float[Tensor, "B K R"]:
    """Clipped trust region around the anchor, reference 0 (Le et al. 2025, CTRO).

    ``adaptive`` shares ``epsilon`` out over the replies in proportion to the magnitude of their
    mean log-probability over references; otherwise every reply gets ``epsilon``.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, got {epsilon}")
    anchor = refs[:, :1]
    radius = torch.full_like(anchor, epsilon)
    if adaptive:
        magnitude = refs.mean(1, keepdim=True).abs()
        total = magnitude.sum(-1, keepdim=True)
        radius = epsilon * magnitude / total.where(total > 0, 1)
    # Log-probabilities are negative, so (1 + radius) * anchor is the lower bound.
    return refs.clamp(min=(1 + radius) * anchor, max=(1 - radius) * anchor)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Per-pair results. The trainer averages, so that micro-batches sum to the same mean."""

    loss: Float[Tensor, " B"]
    rewards: Float[Tensor, "B R"]
    """Implicit rewards beta (log pi - log pi_ref) after references are combined."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """A combination, a link and a clip with their strength: what ``conf/loss`` builds."""

    combine: Combination
    link: Link
    clip: Clip
    beta: float
    """Strength of the pull towards the references, > 0."""
    length_normalized: bool = True
    """Nats per token (default) or per reply, for the policy and all references."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be greater than 0, got {self.beta}")
        # Neither a pair nor a model is needed to refuse the clip's and the link's own numbers.
        self.check(2)

    def check(self, replies: int) -> None:
        """Refuse, with a ValueError, lists of a length that the link cannot take."""
        none = torch.zeros(0, 1, replies)
        self.link(self.clip(none), none, beta=self.beta)

    def linked(self, labels: Scores) -> Linked:
        """The link of prompts with these labels, for rewards (B, R) or (B, K, R)."""
        target, absent = labels.labels, ~labels.present

        def link(rewards: Float[Tensor, "*n R"], *, beta: float) -> Float[Tensor, "*n"]:
            p, out = (target, absent) if rewards.ndim == 2 else (target[:, None], absent[:, None])
            return self.link(rewards.masked_fill(out, -torch.inf), p, beta=beta)

        return link

    def __call__(self, policy: Scores, refs: Scores, alpha: Float[Tensor, "B K"]) -> LossOutput:
        """Loss (nats for the logistic link) of policy scores (B, R) against refs (B, K, R), whose
        labels count."""
        loss, rewards = self.combine(
            policy.logps(self.length_normalized),
            self.clip(refs.logps(self.length_normalized)),
            alpha,
            beta=self.beta,
            link=self.linked(refs),
        )
        return LossOutput(loss, rewards)

    def by_reference(self, policy: Scores, refs: Scores) -> Float[Tensor, "B K"]:
        """The single-reference loss against each reference, unclipped."""
        logps = policy.logps(self.length_normalized).unsqueeze(1)
        rewards = self.beta * (logps - refs.logps(self.length_normalized))
        return self.linked(refs)(rewards, beta=self.beta)

    def pair_weights(
        self, policy: Scores, refs: Scores, alpha: Float[Tensor, "B K"]
    ) -> Float[Tensor, " B"]:
        """w = |dL/d d_policy| / beta: all that the references decide about a pair's gradient.

        Of a list, sum_i |dL/dl_i| / (2 beta): under the listwise link the total variation distance
        between softmax(r) and the target.
        """
        with torch.enable_grad():
            logps = policy.logps(self.length_normalized).detach().requires_grad_()
            clipped = self.clip(refs.logps(self.length_normalized))
            link = self.linked(refs)
            loss, _ = self.combine(logps, clipped, alpha, beta=self.beta, link=link)
            (grad,) = torch.autograd.grad(loss.sum(), logps)
        return grad.abs().sum(-1) / (2 * self.beta)


def effective_sample_size(weights: Float[Tensor, " B"]) -> float:
    """(sum w)^2 / sum w^2, between 1 and B; 0 if no pair has any weight."""
    square = float(weights.square().sum())
    return float(weights.sum()) ** 2 / square if square > 0 else 0.0
