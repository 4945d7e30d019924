"""Ranking metrics: how well scores rank the replies to a prompt by their ratings.

Every function takes ``scores`` and ``ratings`` (B, R), with NaN ratings for missing replies, and
returns one number per prompt: NaN where all ratings are equal. Tied scores count as the mean over
all orders of the tied replies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Ranking = Callable[[Float[Tensor, "B R"], Float[Tensor, "B R"]], Float[Tensor, " B"]]


def top1(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Whether the reply with the highest score has the highest rating."""
    present = ~ratings.isnan()
    first = _highest(scores, present)
    best = _highest(ratings.nan_to_num(), present)
    hit = (first & best).sum(-1) / first.sum(-1)
    return hit.double().where((best != present).any(-1), torch.nan)


def pairwise(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Share of the reply pairs with different ratings that the scores put in the same order."""
    apart = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    better = ratings.unsqueeze(-1) > ratings.unsqueeze(-2)  # false wherever one is NaN
    agreed = (apart > 0).double() + 0.5 * (apart == 0)
    return (agreed * better).sum((-1, -2)) / better.sum((-1, -2))


def spearman(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Spearman's rank correlation; 0 where all scores are equal."""
    present = ~ratings.isnan()
    x, y = (_ranks(values, present) for values in (scores, ratings.nan_to_num()))
    product = (x * y).sum(-1)
    norm = ((x * x).sum(-1) * (y * y).sum(-1)).sqrt()
    tied = (y == 0).all(-1)
    return (product / norm.where(norm > 0, 1)).where(~tied, torch.nan)


def ndcg(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Normalized discounted cumulative gain; a reply's gain is its rating above the worst one."""
    present = ~ratings.isnan()
    gains = (ratings - ratings.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)).nan_to_num()
    discounts = 1 / torch.arange(2, scores.shape[-1] + 2, dtype=torch.float64).log2()
    cumulative = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)]).to(scores.device)

    def gained(by: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
        above, equal = _above_and_equal(by, present)
        discount = (cumulative[above + equal] - cumulative[above]) / equal.clamp(min=1)
        return (gains * discount).sum(-1)

    return gained(scores) / gained(gains)


def _above_and_equal(
    values: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]
) -> tuple[Tensor, Tensor]:
    """Count the replies that are above each reply, and those equal to it, itself included."""
    others = present.unsqueeze(-2)
    above = (values.unsqueeze(-2) > values.unsqueeze(-1)) & others
    equal = (values.unsqueeze(-2) == values.unsqueeze(-1)) & others
    return above.sum(-1), equal.sum(-1)


def _ranks(values: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Ranks centered on the prompt's mean, ties sharing their mean rank; 0 for missing replies."""
    above, equal = _above_and_equal(values, present)
    middle = (present.sum(-1, keepdim=True) - 1) / 2
    return (middle - above - (equal - 1) / 2).double() * present


def _highest(values: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> Bool[Tensor, "B R"]:
    return (_above_and_equal(values, present)[0] == 0) & present


RANKINGS: dict[str, Ranking] = {
    "top1": top1,
    "pairwise": pairwise,
    "spearman": spearman,
    "ndcg": ndcg,
}
"""Metrics by name; higher is better and 1 is perfect."""


def rank(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> dict[str, float]:
    """Mean of each of ``RANKINGS`` over the prompts whose ratings differ."""
    return {name: float(ranking(scores, ratings).nanmean()) for name, ranking in RANKINGS.items()}
