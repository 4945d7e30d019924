"""Lists of rated replies: targets, losses, margins and rankings against the oracle; a pair is a
list of two, the order of a list and what a shorter one lacks change nothing."""

import math
from functools import partial
from typing import Any

import numpy as np
import oracles
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import CLIPS, COMBINATIONS

from mrpo_lab.objective import losses, ranking
from mrpo_lab.objective.labels import Labels
from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.scores import Scores, chosen_first, per_prompt
from mrpo_lab.objective.weighting import ARWC, SWCW, to_simplex
from mrpo_lab.training.metrics import batch_metrics

tensor = partial(torch.tensor, dtype=torch.float64)
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
combinations = pytest.mark.parametrize("combine", COMBINATIONS)
clips = pytest.mark.parametrize("clip", CLIPS)
LENGTHS = [5, 2, 4, 3, 5, 2]
NAN = math.nan


def built(combine: str, link: Any = losses.listwise, clip: str = "none") -> PreferenceLoss:
    return PreferenceLoss(
        combine=COMBINATIONS[combine][0], link=link, clip=CLIPS[clip][0], beta=2.0
    )


def lists(seed: int = 0) -> tuple[Scores, Scores, torch.Tensor, torch.Tensor, Labels]:
    """Policy scores (6, 5), reference scores (6, 3, 5), alpha, target, and labels by two aspects,
    the second of which lacks a rating of the third list."""
    rng = np.random.default_rng(seed)
    present = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(-1)
    counts = torch.from_numpy(rng.integers(3, 30, (6, 4, 5))) * present.unsqueeze(1)
    sums = counts * torch.from_numpy(rng.normal(-2, 0.5, (6, 4, 5)))
    ratings = torch.from_numpy(rng.integers(1, 6, (6, 2, 5))).double()
    ratings = ratings.masked_fill(~present.unsqueeze(1), NAN)
    ratings[2, 1, 0] = NAN
    labels = Labels.of_ratings(["a", "b"], ratings, present, temperature=0.7)
    target = labels.mix(tensor([0.3, 0.7]))
    alpha = torch.from_numpy(rng.dirichlet([1, 1, 1], 6))
    return (
        Scores(sums[:, 0], counts[:, 0]),
        Scores(sums[:, 1:], counts[:, 1:]),
        alpha,
        target,
        labels,
    )


def row(values: torch.Tensor, n: int) -> list[float]:
    """What a list really has."""
    found: list[float] = values[n, ..., : LENGTHS[n]].tolist()
    return found


def reordered(scores: Scores, order: list[torch.Tensor]) -> Scores:
    index = torch.stack(order)
    wide = index if scores.sums.ndim == 2 else index.unsqueeze(1).expand_as(scores.sums)
    return Scores(scores.sums.gather(-1, wide), scores.counts.gather(-1, wide))


def shuffled(seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy(np.append(rng.permutation(n), np.arange(n, 5)).astype(int))
        for n in LENGTHS
    ]


class TestTargets:
    def test_against_the_oracle(self) -> None:
        labels = lists()[4]
        for n in range(6):
            ratings = [row(labels.ratings[:, a], n) for a in range(2)]
            for weights in ([0.3, 0.7], [1.0, 0.0], [0.0, 1.0]):
                lam = [weights[0], 0.0] if n == 2 else weights
                found = labels.mix(tensor(weights))
                if sum(lam) == 0:  # nothing is asked for by an aspect that is not rated
                    assert found[n].tolist() == [0.0] * 5
                else:
                    lam = [w / sum(lam) for w in lam]
                    expected = oracles.listwise_target(ratings, lam, 0.7)
                    assert row(found, n) == pytest.approx(expected, abs=1e-15)
                    assert found[n].sum() == pytest.approx(1)

    def test_all_tied_is_uniform(self) -> None:
        labels = Labels.of_ratings(["a"], torch.full((1, 1, 4), 3.0).double(), ALL, 1.0)
        assert labels.mix(tensor([1.0])).tolist() == [[0.25] * 4]

    def test_a_pair_prefers_its_first_reply(self) -> None:
        assert Labels.of_pairs(2).mix(tensor([1.0])).tolist() == [[1.0, 0.0]] * 2


ALL = torch.ones(1, 4, dtype=torch.bool)


class TestLoss:
    @combinations
    def test_against_the_oracle(self, combine: str) -> None:
        policy, refs, alpha, target, _ = lists()
        found = built(combine)(policy, refs, alpha, target).loss
        for n in range(6):
            logps: oracles.Matrix = refs.logps()[n, :, : LENGTHS[n]].tolist()
            weights: oracles.Row = alpha[n].tolist()
            if combine == "dpo":  # alone, all combinations are the same
                logps, weights = [logps[weights.index(max(weights))]], [1.0]
            expected = oracles.listwise(
                row(policy.logps(), n),
                logps,
                weights,
                2.0,
                row(target, n),
                combine="mrpo" if combine == "dpo" else combine,
            )
            assert float(found[n]) == pytest.approx(expected, rel=1e-12)

    @combinations
    @clips
    def test_of_two_is_the_pair(self, combine: str, clip: str) -> None:
        """Loss, gradient, weight, by reference: listwise on (1, 0) is logistic."""
        policy, refs, alpha, _, _ = lists()
        policy, refs = (Scores(s.sums[..., :2], s.counts[..., :2]) for s in (policy, refs))
        pair, of_two = built(combine, losses.logistic, clip), built(combine, clip=clip)
        chosen = tensor([[1.0, 0.0]]).expand(6, 2)
        assert torch.equal(chosen, chosen_first(6))
        close(of_two.by_reference(policy, refs, chosen), pair.by_reference(policy, refs, chosen))
        weights = (loss.pair_weights(policy, refs, alpha, chosen) for loss in (of_two, pair))
        close(*weights)
        close(of_two(policy, refs, alpha, chosen).loss, pair(policy, refs, alpha, chosen).loss)
        close(refs.margins(chosen), refs.logps()[..., 0] - refs.logps()[..., 1])

    @combinations
    @pytest.mark.parametrize("link", [losses.logistic, losses.ipo, losses.hinge, losses.robust])
    def test_pair_links_follow_the_labels(self, combine: str, link: Any) -> None:
        policy, refs, alpha, _, _ = lists()
        policy, refs = (Scores(s.sums[..., :2], s.counts[..., :2]) for s in (policy, refs))
        flipped = [Scores(s.sums.flip(-1), s.counts.flip(-1)) for s in (policy, refs)]
        second = tensor([[0.2, 0.8]]).expand(6, 2)
        loss = built(combine, link)
        other = loss(flipped[0], flipped[1], alpha, second).loss
        close(other, loss(policy, refs, alpha, chosen_first(6)).loss)

    @combinations
    @clips
    def test_order_and_padding_change_nothing(self, combine: str, clip: str) -> None:
        policy, refs, alpha, target, _ = lists()
        loss = built(combine, clip=clip)
        expected = loss(policy, refs, alpha, target)
        order = shuffled(1)
        moved = target.gather(-1, torch.stack(order))
        again = reordered(policy, order), reordered(refs, order), alpha, moved
        found = loss(*again)
        close(found.loss, expected.loss)
        close(found.rewards, expected.rewards.gather(-1, torch.stack(order)))
        close(loss.pair_weights(*again), loss.pair_weights(policy, refs, alpha, target))
        for n, length in enumerate(LENGTHS):  # each list alone, as wide as it is
            alone = [
                Scores(s.sums[[n], ..., :length], s.counts[[n], ..., :length])
                for s in (policy, refs)
            ]
            found = loss(alone[0], alone[1], alpha[[n]], target[[n], :length])
            close(found.loss, expected.loss[[n]])

    def test_weight_is_a_distance_of_distributions(self) -> None:
        policy, refs, alpha, target, _ = lists()
        weights = built("mrpo").pair_weights(policy, refs, alpha, target)
        rewards = built("mrpo")(policy, refs, alpha, target).rewards
        for n in range(6):
            softmax = [math.exp(v) for v in oracles.log_softmax(row(rewards, n))]
            p = row(target, n)
            apart = sum(abs(a - b) for a, b in zip(softmax, p, strict=True)) / 2
            assert float(weights[n]) == pytest.approx(apart, rel=1e-9)

    @combinations
    def test_nothing_asked_for_is_no_gradient(self, combine: str) -> None:
        policy, refs, alpha, _, _ = lists()
        nothing = torch.zeros_like(policy.sums)
        sums = policy.sums.clone().requires_grad_()
        loss = built(combine)(Scores(sums, policy.counts), refs, alpha, nothing).loss
        loss.sum().backward()
        assert loss.tolist() == [0.0] * 6
        assert sums.grad is not None
        assert not sums.grad.any()
        assert not refs.margins(nothing).any()

    def test_pair_links_refuse_lists_when_they_are_checked(self) -> None:
        built("mdpo").check(5)
        with pytest.raises(ValueError, match="lists of 5 replies: choose loss/link=listwise"):
            built("mdpo", losses.logistic).check(5)


class TestMargins:
    def test_against_the_oracle(self) -> None:
        policy, refs, _, target, _ = lists()
        for n in range(6):
            p = row(target, n)
            assert float(policy.margins(target)[n]) == pytest.approx(
                oracles.list_margin(row(policy.logps(), n), p), rel=1e-12
            )
            for k in range(3):
                assert float(refs.margins(target)[n, k]) == pytest.approx(
                    oracles.list_margin(row(refs.logps()[:, k], n), p), rel=1e-12
                )

    @pytest.mark.parametrize("weighting", [ARWC(), SWCW()])
    def test_weightings_do_not_see_the_order(self, weighting: Any) -> None:
        _, refs, _, target, _ = lists()
        weighting.after_step(refs, target)
        alpha, _ = to_simplex(weighting.proportions(refs, target), 6)
        order = shuffled(2)
        again = reordered(refs, order), target.gather(-1, torch.stack(order))
        weighting.after_step(*again)
        close(to_simplex(weighting.proportions(*again), 6)[0], alpha)

    def test_metrics_do_not_see_the_order(self) -> None:
        policy, refs, alpha, target, _ = lists()
        slugs, order = ["x", "y", "z"], shuffled(3)
        found = batch_metrics(built("mdpo"), policy, refs, alpha, target, slugs, 0.5)
        again = reordered(policy, order), reordered(refs, order)
        moved = target.gather(-1, torch.stack(order))
        other = batch_metrics(built("mdpo"), *again, alpha, moved, slugs, 0.5)
        assert other == pytest.approx(found, rel=1e-9)
        assert found["rewards/chosen"] > -100


@st.composite
def rated(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Scores and ratings of one list, with ties in both."""
    replies = draw(st.integers(2, 6))
    few = st.lists(st.integers(-2, 3).map(float), min_size=replies, max_size=replies)
    return draw(few), draw(few)


class TestRankings:
    """Each list stands beside one that is longer, so that it is padded."""

    def of(self, name: str, scores: list[float], ratings: list[float]) -> float:
        width = 8
        padded = [
            tensor([[*values, *[fill] * (width - len(values))], [*range(width)]])
            for values, fill in ((scores, 9.0), (ratings, NAN))
        ]
        return float(ranking.RANKINGS[name](*padded)[0])

    @settings(max_examples=150, deadline=None)
    @given(rated())
    def test_against_brute_force(self, case: tuple[list[float], list[float]]) -> None:
        scores, ratings = case
        pairs = [
            0.5 if scores[i] == scores[j] else float(scores[i] > scores[j])
            for i in range(len(scores))
            for j in range(len(scores))
            if ratings[i] > ratings[j]
        ]
        if not pairs:
            for name in ranking.RANKINGS:
                assert math.isnan(self.of(name, scores, ratings))
            return
        gains = [rating - min(ratings) for rating in ratings]
        ideal = oracles.dcg(sorted(range(len(gains)), key=lambda i: -gains[i]), gains)
        dcg = oracles.expected(lambda order: oracles.dcg(order, gains), scores)
        first = oracles.expected(lambda order: float(ratings[order[0]] == max(ratings)), scores)
        rho = (
            float(scipy.stats.spearmanr(scores, ratings).statistic) if len(set(scores)) > 1 else 0.0
        )
        assert self.of("pairwise", scores, ratings) == pytest.approx(sum(pairs) / len(pairs))
        assert self.of("ndcg", scores, ratings) == pytest.approx(dcg / ideal)
        assert self.of("top1", scores, ratings) == pytest.approx(first)
        assert self.of("spearman", scores, ratings) == pytest.approx(rho, abs=1e-12)


def test_replies_find_their_prompts() -> None:
    flat = tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).requires_grad_()
    table = per_prompt(flat, [1, 3, 2], 3)
    assert table.tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]
    (table * tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [1, 1, 2, 3, 1, 2]
