r"""Preference losses against K references, as pure functions of tensors.

Axes:  B prompts in the batch, K references, R replies per prompt (a pair has R = 2, chosen first).
Units: log-probabilities in nats, per token or per reply, the same for policy and references.

Three choices are independent. A *combination* (dpo, mdpo, mrpo, geometric) says how K references
enter the implicit rewards r = beta (log pi - log pi_ref). A *link* (logistic, robust, ipo, hinge,
listwise) turns rewards into a loss; only listwise takes more than two replies. A *clip* (no_clip,
ctro) confines the references to a trust region. Reference 0 is the anchor, the policy's own initial
model.

A new loss is a function in this file and a YAML file in ``conf/loss``, ``conf/loss/link`` or
``conf/loss/clip``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.units import Unit, check_unit


@runtime_checkable
class Link(Protocol):
    """Turns the rewards of R replies, and how much each is to be preferred, into one loss."""

    def __call__(
        self, rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
    ) -> Float[Tensor, "*n"]: ...


@runtime_checkable
class LinkToTarget(Protocol):
    """A link with its target already given."""

    def __call__(self, rewards: Float[Tensor, "*n R"], *, beta: float) -> Float[Tensor, "*n"]: ...


@runtime_checkable
class Combination(Protocol):
    """Combines K weighted references with the policy into losses (B,) and rewards (B, R)."""

    def __call__(
        self,
        policy: Float[Tensor, "B R"],
        refs: Float[Tensor, "B K R"],
        alpha: Float[Tensor, "B K"],
        *,
        beta: float,
        link: LinkToTarget,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]: ...


Clip = Callable[[Float[Tensor, "B K R"]], Float[Tensor, "B K R"]]


def dpo(
    policy: Float[Tensor, "B R"],
    refs: Float[Tensor, "B K R"],
    alpha: Float[Tensor, "B K"],
    *,
    beta: float,
    link: LinkToTarget,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    """DPO against the one reference with the largest alpha (Rafailov et al. 2023, eq. 7).

    Ties go to the first reference, so a uniform alpha means DPO against the anchor.
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
    link: LinkToTarget,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    """Sum of the K single-reference losses, weighted by alpha (Le et al. 2025, Multi-DPO)."""
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
    link: LinkToTarget,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    r"""DPO against the weighted harmonic mean of the references (Le et al. 2025, MRPO).

    .. math:: \log\pi_{ref} = -\log\sum_k \alpha_k e^{-\log\pi_k}

    Computed as a logsumexp, where log 0 = -inf removes a reference exactly; nothing is clamped.
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
    link: LinkToTarget,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B R"]]:
    """DPO against the geometric mixture of the references (Aminian et al. 2025).

    With summed log-probabilities the mixture's normalizer cancels between the replies to a prompt.
    With log-probabilities per token it does not, and this loss is a definition of its own.
    """
    refs = _without_unweighted(refs, alpha)
    rewards = beta * (policy - (alpha.unsqueeze(-1) * refs).sum(1))
    return link(rewards, beta=beta), rewards


def _without_unweighted(
    refs: Float[Tensor, "B K R"], alpha: Float[Tensor, "B K"]
) -> Float[Tensor, "B K R"]:
    """Replace references whose weight is exactly 0, which may not be finite, by 0."""
    return refs.masked_fill((alpha == 0).unsqueeze(-1), 0.0)


def _check_flips(name: str, probability: float) -> None:
    if not 0 <= probability < 0.5:
        raise ValueError(f"{name} must be at least 0 and below 0.5, got {probability}")


def _z(rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"]) -> Float[Tensor, "*n"]:
    """The reward of the preferred reply minus that of the other."""
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
    """-log sigmoid(z) with z = r_chosen - r_rejected, and label smoothing (cDPO, Mitchell 2023)."""
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
    """The logistic loss, unbiased if labels are flipped with probability ``label_flip`` < 1/2.

    Source: Chowdhury et al. 2024, robust DPO.
    """
    _check_flips("label_flip", label_flip)
    z = _z(rewards, target)
    observed, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1 - label_flip) * observed - label_flip * flipped) / (1 - 2 * label_flip)


def ipo(
    rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
) -> Float[Tensor, "*n"]:
    """(z / beta - 1 / (2 beta))^2 (IPO, Azar et al. 2023, where beta is called tau)."""
    return (_z(rewards, target) / beta - 1 / (2 * beta)).square()


def hinge(
    rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
) -> Float[Tensor, "*n"]:
    """The hinge loss max(0, 1 - z) (SLiC, Zhao et al. 2023)."""
    return F.relu(1 - _z(rewards, target))


def listwise(
    rewards: Float[Tensor, "*n R"], target: Float[Tensor, "*#n R"], *, beta: float
) -> Float[Tensor, "*n"]:
    r"""Cross-entropy :math:`-\sum_i p^*_i \log\mathrm{softmax}_i(r)` (lambda-DPO, 2506.19780).

    A reply with a reward of -inf is left out. For a pair with target (1, 0) it equals ``logistic``.
    """
    terms = target * rewards.log_softmax(-1)
    return -terms.where(target > 0, 0.0).sum(-1)


def no_clip(refs: Float[Tensor, "B K R"]) -> Float[Tensor, "B K R"]:
    """Return the references unchanged."""
    return refs


def ctro(refs: Float[Tensor, "B K R"], *, epsilon: float, adaptive: bool) -> Float[Tensor, "B K R"]:
    """Clipped trust region around the anchor, reference 0 (Le et al. 2025, CTRO).

    If ``adaptive``, ``epsilon`` is divided among the replies in proportion to the magnitude of
    their mean log-probability over the references; otherwise every reply gets ``epsilon``.
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
    """Losses and rewards of each prompt; the trainer averages over the global batch."""

    loss: Float[Tensor, " B"]
    rewards: Float[Tensor, "B R"]
    """Implicit rewards beta (log pi - log pi_ref) after references are combined."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """A combination, a link and a clip, with their strength beta; ``conf/loss`` builds it.

    Raises:
        ValueError: a number is out of range.
    """

    combine: Combination
    link: Link
    clip: Clip
    beta: float
    """Strength of the pull towards the references, > 0."""
    length_normalized: bool = True
    """Nats per token (default) or per reply, for the policy and all references."""
    unit: str | None = None
    """Unit of the log-probabilities, one of ``units.Unit``; null is token, or reply if
    ``length_normalized`` is false."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be greater than 0, got {self.beta}")
        check_unit(self.unit or "token")
        self.check(2)  # the link and the clip check their own numbers when they are called

    @property
    def resolved_unit(self) -> Unit:
        """The unit of the log-probabilities; policy and references are to be given in it."""
        return cast(Unit, self.unit or ("token" if self.length_normalized else "reply"))

    def logps(self, scores: Scores) -> Float[Tensor, "*n R"]:
        """Log-probabilities as this loss takes them, from scores whose counts are in its unit."""
        return scores.logps(self.resolved_unit != "reply")

    def check(self, replies: int) -> None:
        """Check that the link and the clip accept prompts with this many replies.

        Raises:
            ValueError: the link is for pairs only, or a number of the link or clip is out of range.
        """
        none = torch.zeros(0, 1, replies)
        self.link(self.clip(none), none, beta=self.beta)

    def __call__(
        self,
        policy: Scores,
        refs: Scores,
        alpha: Float[Tensor, "B K"],
        target: Float[Tensor, "B R"],
    ) -> LossOutput:
        """Compute the loss of each prompt.

        Args:
            policy: scores (B, R) of the policy, with counts in the loss's unit.
            refs: scores (B, K, R) of the references, with counts in the loss's unit.
            alpha: weights of the references, on the simplex over K.
            target: how much each reply is to be preferred, summing to 1; (1, 0) for a pair.

        Returns:
            Loss (B,), in nats for the logistic link, and implicit rewards (B, R).
        """
        loss, rewards = self.combine(
            self.logps(policy),
            self.clip(self.logps(refs)),
            alpha,
            beta=self.beta,
            link=self._link_to(target, refs.present),
        )
        return LossOutput(loss, rewards)

    def by_reference(
        self, policy: Scores, refs: Scores, target: Float[Tensor, "B R"]
    ) -> Float[Tensor, "B K"]:
        """The single-reference loss against each reference, unclipped."""
        logps = self.logps(policy).unsqueeze(1)
        rewards = self.beta * (logps - self.logps(refs))
        return self._link_to(target, refs.present)(rewards, beta=self.beta)

    def pair_weights(
        self,
        policy: Scores,
        refs: Scores,
        alpha: Float[Tensor, "B K"],
        target: Float[Tensor, "B R"],
    ) -> Float[Tensor, " B"]:
        """Weight of each pair's gradient, w = |dL/d d_policy| / beta.

        It is all that the references decide about the gradient of a pair. For a list it is
        sum_i |dL/dl_i| / (2 beta): under the listwise link the total variation distance between
        softmax(rewards) and the target.
        """
        with torch.enable_grad():
            logps = self.logps(policy).detach().requires_grad_()
            clipped = self.clip(self.logps(refs))
            link = self._link_to(target, refs.present)
            loss, _ = self.combine(logps, clipped, alpha, beta=self.beta, link=link)
            (grad,) = torch.autograd.grad(loss.sum(), logps)
        return grad.abs().sum(-1) / (2 * self.beta)

    def _link_to(self, target: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> LinkToTarget:
        """Bind the link to a target, for rewards (B, R) or (B, K, R); missing replies get -inf."""
        absent = ~present

        def link(rewards: Float[Tensor, "*n R"], *, beta: float) -> Float[Tensor, "*n"]:
            p, out = (target, absent) if rewards.ndim == 2 else (target[:, None], absent[:, None])
            return self.link(rewards.masked_fill(out, -torch.inf), p, beta=beta)

        return link


def effective_sample_size(weights: Float[Tensor, " B"]) -> float:
    """Effective sample size (sum w)^2 / sum w^2, between 1 and B; 0 if all weights are 0."""
    square = float(weights.square().sum())
    return float(weights.sum()) ** 2 / square if square > 0 else 0.0
