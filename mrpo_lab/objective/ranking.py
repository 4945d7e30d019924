"""How well scores rank the replies to a prompt, by their ratings. Pure functions of tensors.

Each takes ``scores`` and ``ratings`` (B, R), ratings NaN where there is no reply or no rating, and
gives a number per prompt: NaN where the ratings say nothing. Ties are shared: equal scores count
as the mean over all orders of theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Ranking = Callable[[Float[Tensor, "B R"], Float[Tensor, "B R"]], Float[Tensor, " B"]]


def top1(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Whether the reply of highest score is one of highest rating; NaN if all are."""
    present = ~ratings.isnan()
    first = _highest(scores, present)
    best = _highest(ratings.nan_to_num(), present)
    hit = (first & best).sum(-1) / first.sum(-1)
    return hit.double().where((best != present).any(-1), torch.nan)


def pairwise(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Share of the pairs of replies with different ratings that scores put in the same order."""
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
    """Normalised discounted cumulative gain; a reply's gain is how far it is above the worst."""
    present = ~ratings.isnan()
    gains = (ratings - ratings.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)).nan_to_num()
    discounts = 1 / torch.arange(2, scores.shape[-1] + 2, dtype=torch.float64).log2()
    before = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)]).to(scores.device)

    def gained(by: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
        above, equal = _standing(by, present)
        discount = (before[above + equal] - before[above]) / equal.clamp(min=1)
        return (gains * discount).sum(-1)

    return gained(scores) / gained(gains)


def _standing(values: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> tuple[Tensor, Tensor]:
    """(how many replies are above each, how many are equal to it, itself included)."""
    others = present.unsqueeze(-2)
    above = (values.unsqueeze(-2) > values.unsqueeze(-1)) & others
    equal = (values.unsqueeze(-2) == values.unsqueeze(-1)) & others
    return above.sum(-1), equal.sum(-1)


def _ranks(values: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Mean ranks of ties, centred on the prompt's mean; 0 where there is no reply."""
    above, equal = _standing(values, present)
    middle = (present.sum(-1, keepdim=True) - 1) / 2
    return (middle - above - (equal - 1) / 2).double() * present


def _highest(values: Float[Tensor, "B R"], present: Bool[Tensor, "B R"]) -> Bool[Tensor, "B R"]:
    return (_standing(values, present)[0] == 0) & present


RANKINGS: dict[str, Ranking] = {
    "top1": top1,
    "pairwise": pairwise,
    "spearman": spearman,
    "ndcg": ndcg,
}
"""Better is higher; 1 is perfect."""


def rank(scores: Float[Tensor, "B R"], ratings: Float[Tensor, "B R"]) -> dict[str, float]:
    """Each of ``RANKINGS``, the mean over the prompts whose ratings say something."""
    return {name: float(ranking(scores, ratings).nanmean()) for name, ranking in RANKINGS.items()}
