"""Metrics logged for every batch, computed from scores alone.

Log-probabilities are in nats, implicit rewards in beta times nats.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.objective.losses import PreferenceLoss, effective_sample_size
from mrpo_lab.objective.scores import Scores, contrast

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles of a batch's pair weights that are logged."""


@torch.no_grad()
def batch_metrics(
    loss: PreferenceLoss,
    policy: Scores,
    refs: Scores,
    alpha: Float[Tensor, "B K"],
    target: Float[Tensor, "B R"],
    slugs: Sequence[str],
    accuracy_before: float,
) -> dict[str, float]:
    """Means over the batch before its step.

    Args:
        accuracy_before: accuracy of the policy on the batch, in nats per token whatever the loss.
        policy: scores (B, R) of the policy, in the unit of the loss.
        refs: scores (B, K, R) of the references, in the unit of the loss.
    """
    output = loss(policy, refs, alpha, target)
    rewards, logps = output.rewards, loss.logps(policy)
    coefficients = contrast(target, refs.present)
    margins = (coefficients * rewards).sum(-1)
    chosen, rejected = sides(target, refs)
    weights = loss.pair_weights(policy, refs, alpha, target)
    by_reference = loss.by_reference(policy, refs, target).mean(0)
    return {
        "train/loss": float(output.loss.mean()),
        "train/accuracy_before": accuracy_before,
        "rewards/chosen": float((chosen * rewards).sum(-1).mean()),
        "rewards/rejected": float((rejected * rewards).sum(-1).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).double().mean()),
        "logps/chosen": float((chosen * logps).sum(-1).mean()),
        "logps/rejected": float((rejected * logps).sum(-1).mean()),
        "pair_weight/mean": float(weights.mean()),
        "pair_weight/cv": float(weights.std(correction=0) / weights.mean()),
        "pair_weight/ess": effective_sample_size(weights),
        **{f"pair_weight/p{q:02}": float(weights.quantile(q / 100)) for q in QUANTILES},
        **{f"loss_by_reference/{s}": float(v) for s, v in zip(slugs, by_reference, strict=True)},
        **{f"alpha/{s}": float(v) for s, v in zip(slugs, alpha.mean(0), strict=True)},
    }


def sides(
    target: Float[Tensor, "B R"], refs: Scores
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Weights of the chosen replies and of the rejected ones, each summing to 1.

    For a pair they are (1, 0) and (0, 1). Where nothing is preferred all replies are on both sides.
    """
    coefficients, present = contrast(target, refs.present), refs.present
    tied = (coefficients == 0).all(-1, keepdim=True)
    chosen, rejected = (
        torch.where(tied, present.to(coefficients), side.clamp(min=0))
        for side in (coefficients, -coefficients)
    )
    return chosen / chosen.sum(-1, keepdim=True), rejected / rejected.sum(-1, keepdim=True)
