"""Losses: against the naive reference implementation, by the identities of METHODS.md, by calculus.

A new combination, link or clip is one row in its table below; every test here runs on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError
from omegaconf import OmegaConf
from oracles import Matrix, Row
from torch import Tensor

from mrpo_lab.objective import losses
from mrpo_lab.objective.losses import Clip, Combination, Link, PreferenceLoss, effective_sample_size
from mrpo_lab.objective.scores import Scores, chosen_first


def heaviest(refs: Matrix, alpha: Row) -> Row:
    """The first reference of largest alpha: what `dpo` is against."""
    return refs[alpha.index(max(alpha))]


def heaviest_dpo(policy: Row, refs: Matrix, alpha: Row, beta: float, **link: Any) -> float:
    return oracles.dpo(policy, heaviest(refs, alpha), beta, **link)


# name in conf/loss: (combination, the oracle's loss, the oracle's reference behind the rewards)
COMBINATIONS: dict[str, tuple[Combination, Callable[..., float], Callable[..., Row]]] = {
    "dpo": (losses.dpo, heaviest_dpo, heaviest),
    "mdpo": (losses.mdpo, oracles.mdpo, oracles.geometric_reference),
    "mrpo": (losses.mrpo, oracles.mrpo, oracles.harmonic_reference),
    "geometric": (losses.geometric, oracles.geometric, oracles.geometric_reference),
}
# test id: (link, the oracle's keywords for it)
LINKS: dict[str, tuple[Link, dict[str, Any]]] = {
    "logistic": (losses.logistic, {"link": "logistic"}),
    "smooth": (partial(losses.logistic, label_smoothing=0.2), {"link": "logistic", "eps": 0.2}),
    "robust": (partial(losses.robust, label_flip=0.3), {"link": "robust", "eps": 0.3}),
    "ipo": (losses.ipo, {"link": "ipo"}),
    "hinge": (losses.hinge, {"link": "hinge"}),
    "listwise": (losses.listwise, {"link": "logistic"}),  # of two replies
}


def ctro(adaptive: bool) -> tuple[Clip, Callable[[Matrix], Matrix]]:
    by_oracle = partial(oracles.ctro, anchor=0, eps=0.1, adaptive=adaptive)
    return partial(losses.ctro, epsilon=0.1, adaptive=adaptive), by_oracle


# name in conf/loss/clip: (clip, the oracle's)
CLIPS: dict[str, tuple[Clip, Callable[[Matrix], Matrix]]] = {
    "none": (losses.no_clip, lambda refs: refs),
    "ctro": ctro(adaptive=True),
    "ctro_fixed": ctro(adaptive=False),
}
combinations = pytest.mark.parametrize("combine", COMBINATIONS)
links = pytest.mark.parametrize("link", LINKS)
clips = pytest.mark.parametrize("clip", CLIPS)
scales = pytest.mark.parametrize("ln", [True, False], ids=["per-token", "per-reply"])
any_link = st.sampled_from(sorted(LINKS))
properties = settings(max_examples=50, deadline=None)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
tensor = partial(torch.tensor, dtype=torch.float64)
CHOSEN = chosen_first(6)


@dataclass(frozen=True)
class Case:
    """Log-probabilities of B pairs under a policy (B, 2) and K references (B, K, 2)."""

    policy: Tensor
    refs: Tensor
    alpha: Tensor
    beta: float = 0.1

    def both(
        self, combine: str, link: str = "logistic", clip: str = "none"
    ) -> tuple[Tensor, Tensor]:
        """(losses (B,), rewards (B, 2))."""
        function, refs = COMBINATIONS[combine][0], CLIPS[clip][0](self.refs)

        def linked(rewards: Tensor, *, beta: float) -> Tensor:
            return LINKS[link][0](rewards, tensor([1.0, 0.0]).expand_as(rewards), beta=beta)

        return function(self.policy, refs, self.alpha, beta=self.beta, link=linked)

    def loss(self, combine: str, link: str = "logistic", clip: str = "none") -> Tensor:
        return self.both(combine, link, clip)[0]

    def reference(self, combine: str) -> Tensor:
        """log pi_ref of each reply, from r = beta (log pi - log pi_ref)."""
        return self.policy - self.both(combine)[1] / self.beta

    def of(self, reference: int) -> Case:
        """The same pairs with all weight on one reference."""
        one_hot = torch.zeros_like(self.alpha)
        one_hot[:, reference] = 1
        return replace(self, alpha=one_hot)

    def dpo(self, reference: int, link: str) -> Tensor:
        """By the oracle, against one reference."""
        name, pairs = LINKS[link][1], self.rows()
        return tensor([oracles.dpo(p, refs[reference], self.beta, **name) for p, refs, _ in pairs])

    def rows(self) -> Iterable[tuple[Row, Matrix, Row]]:
        return zip(self.policy.tolist(), self.refs.tolist(), self.alpha.tolist(), strict=True)


@st.composite
def cases(draw: st.DrawFn, min_refs: int = 1) -> Case:
    """Tokens about -1.5 or sums about -900, 1,700 apart at most; differing alphas, 0 included."""
    num_pairs, num_refs = draw(st.integers(1, 3)), draw(st.integers(min_refs, 4))
    low, high = draw(st.sampled_from([(-3.0, -0.01), (-1750.0, -50.0)]))
    logps = arrays(float, (num_pairs, num_refs + 1, 2), elements=st.floats(low, high))
    weights = st.lists(st.integers(0, 20), min_size=num_refs, max_size=num_refs, unique=True)
    alpha = tensor([draw(weights.filter(any)) for _ in range(num_pairs)])
    table = torch.from_numpy(draw(logps))
    beta = draw(st.sampled_from([0.1, 1.0, 5.0]))
    return Case(table[:, 0], table[:, 1:], alpha / alpha.sum(-1, keepdim=True), beta)


def scored(ln: bool) -> tuple[Scores, Scores, Case]:
    """Scores of six pairs by the policy and three references, and their log-probabilities
    per token (ln, length-normalized: -1.5 +- 0.2) or per reply (about -900), with a usual beta.
    """
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(500, 700, (6, 4, 2), generator=generator)
    noise = torch.randn(6, 4, 2, generator=generator, dtype=torch.float64)
    sums = counts * (-1.5 + 0.2 * noise)
    logps = sums / counts if ln else sums
    alpha = torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(-1)
    case = Case(logps[:, 0], logps[:, 1:], alpha, beta=2.0 if ln else 0.1)
    return Scores(sums[:, 0], counts[:, 0]), Scores(sums[:, 1:], counts[:, 1:]), case


def built(combine: str, link: str, clip: str, ln: bool) -> PreferenceLoss:
    loss = partial(PreferenceLoss, beta=scored(ln)[2].beta, length_normalized=ln)
    return loss(combine=COMBINATIONS[combine][0], link=LINKS[link][0], clip=CLIPS[clip][0])


@scales
class TestAgainstTheOracle:
    @combinations
    @links
    @clips
    def test_loss_and_pair_weight(self, combine: str, link: str, clip: str, ln: bool) -> None:
        """The oracle's w = |dL / d d_policy| / beta is a central difference of its own loss."""
        policy, refs, case = scored(ln)
        loss = built(combine, link, clip, ln)
        naive, keywords = COMBINATIONS[combine][1], {"beta": loss.beta, **LINKS[link][1]}
        expected, weights = [], []
        for logps, ref_logps, alpha in case.rows():
            of = partial(naive, refs=CLIPS[clip][1](ref_logps), alpha=alpha, **keywords)
            expected.append(of(logps))
            weights.append(oracles.pair_weight(of, logps, loss.beta))
        close(loss(policy, refs, case.alpha, CHOSEN).loss, tensor(expected))
        with torch.no_grad():  # where metrics are computed
            found = loss.pair_weights(policy, refs, case.alpha, CHOSEN)
        close(found, tensor(weights), rtol=1e-6, atol=1e-6)

    @combinations
    @clips
    def test_rewards(self, combine: str, clip: str, ln: bool) -> None:
        """r = beta (log pi - log pi_ref); MDPO's is the alpha-mean of its K rewards."""
        policy, refs, case = scored(ln)
        reference = COMBINATIONS[combine][2]
        against = tensor([reference(CLIPS[clip][1](refs), a) for _, refs, a in case.rows()])
        rewards = built(combine, "hinge", clip, ln)(policy, refs, case.alpha, CHOSEN).rewards
        close(rewards, case.beta * (case.policy - against))

    @links
    def test_loss_by_reference_is_unclipped_dpo(self, link: str, ln: bool) -> None:
        policy, refs, case = scored(ln)
        expected = [case.dpo(k, link) for k in range(3)]
        found = built("mrpo", link, "ctro", ln).by_reference(policy, refs, CHOSEN)
        close(found, torch.stack(expected, dim=1))

    def test_pair_weights_of_mdpo_in_closed_form(self, ln: bool) -> None:
        """w = sum_k alpha_k sigmoid(-z_k)."""
        policy, refs, case = scored(ln)
        expected = [oracles.pair_weight_mdpo(*row, case.beta) for row in case.rows()]
        loss = built("mdpo", "logistic", "none", ln)
        close(loss.pair_weights(policy, refs, case.alpha, CHOSEN), tensor(expected))


class TestIdentities:
    @combinations
    @properties
    @given(case=cases(), link=any_link)
    def test_one_reference_makes_all_equal(self, combine: str, case: Case, link: str) -> None:
        one = replace(case, refs=case.refs[:, :1], alpha=torch.ones_like(case.alpha[:, :1]))
        close(one.loss(combine, link), case.dpo(0, link))

    @combinations
    @properties
    @given(case=cases(), link=any_link, data=st.data())
    def test_all_weight_on_one_is_dpo_on_it(
        self, combine: str, case: Case, link: str, data: st.DataObject
    ) -> None:
        k = data.draw(st.integers(0, case.alpha.shape[1] - 1))
        close(case.of(k).loss(combine, link), case.dpo(k, link))

    @combinations
    @clips
    @properties
    @given(case=cases(min_refs=2), link=any_link)
    def test_identical_references_make_alpha_irrelevant(
        self, combine: str, clip: str, case: Case, link: str
    ) -> None:
        same = replace(case, refs=case.refs[:, :1].expand_as(case.refs))
        close(same.loss(combine, link, clip), case.dpo(0, link))

    @combinations
    @properties
    @given(case=cases(min_refs=2), link=any_link, data=st.data())
    def test_the_order_of_references_is_irrelevant(
        self, combine: str, case: Case, link: str, data: st.DataObject
    ) -> None:
        order = data.draw(st.permutations(range(case.alpha.shape[1])))
        permuted = replace(case, refs=case.refs[:, order], alpha=case.alpha[:, order])
        close(permuted.both(combine, link), case.both(combine, link))

    @combinations
    @properties
    @given(
        case=cases(min_refs=2),
        link=any_link,
        clip=st.sampled_from(["none", "ctro_fixed"]),
        score=st.sampled_from([math.nan, -math.inf, math.inf, -1.0]),
    )
    def test_a_weight_of_0_removes_a_reference(
        self, combine: str, case: Case, link: str, clip: str, score: float
    ) -> None:
        """Adaptive CTRO is left out: its radius is, by definition, a mean over all references."""
        case = replace(case, policy=case.policy.clone().requires_grad_())
        refs, alpha = case.refs.clone(), case.alpha + 0.1
        refs[:, -1], alpha[:, -1] = score, 0
        case = replace(case, refs=refs, alpha=alpha / alpha.sum(-1, keepdim=True))
        without = replace(case, refs=case.refs[:, :-1], alpha=case.alpha[:, :-1])
        found, expected = (each.both(combine, link, clip) for each in (case, without))
        close(found, expected)
        close(*(torch.autograd.grad(loss.sum(), case.policy) for loss, _ in (found, expected)))

    @properties
    @given(case=cases())
    def test_harmonic_is_below_geometric_is_below_arithmetic_mean(self, case: Case) -> None:
        arithmetic = torch.logsumexp(case.alpha.log().unsqueeze(-1) + case.refs, dim=1)
        assert (case.reference("mrpo") <= case.reference("geometric") + 1e-9).all()
        assert (case.reference("geometric") <= arithmetic + 1e-9).all()

    @properties
    @given(case=cases(), link=any_link)
    def test_geometric_loss_is_below_mdpo_pair_by_pair(self, case: Case, link: str) -> None:
        """Jensen: every link is convex, and the geometric z is the alpha-mean of MDPO's z_k."""
        mdpo = case.loss("mdpo", link)
        assert (case.loss("geometric", link) <= mdpo + 1e-9 * (1 + mdpo.abs())).all()

    @pytest.mark.parametrize("combine", ["mdpo", "mrpo", "geometric"])
    @properties
    @given(case=cases())
    def test_a_pair_is_a_list_of_two(self, combine: str, case: Case) -> None:
        """The listwise loss with R = 2 and target p* = (1, 0) is -log sigmoid(z)."""
        listwise = partial(oracles.listwise, target=[1.0, 0.0], combine=combine)
        expected = [listwise(*row, beta=case.beta) for row in case.rows()]
        close(case.loss(combine), tensor(expected))

    @combinations
    @pytest.mark.parametrize(
        ("link", "value"),
        [("logistic", math.log(2)), ("robust", math.log(2)), ("ipo", 25.0), ("hinge", 1.0)],
    )
    def test_at_the_reference(self, combine: str, link: str, value: float) -> None:
        """z = 0: ln 2, (1 / (2 beta))^2 and 1."""
        policy = tensor([[-1.0, -2.0], [-900.0, -800.0]])
        alpha = tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])
        case = Case(policy, policy.unsqueeze(1).expand(-1, 3, -1), alpha, beta=0.1)
        close(case.loss(combine, link), tensor([value, value]))

    def test_dpo_takes_the_first_of_equal_weights(self) -> None:
        """So that the anchor is the reference where alpha has no opinion."""
        case = scored(True)[2]
        for alpha, first in (([1 / 3, 1 / 3, 1 / 3], 0), ([0.2, 0.4, 0.4], 1)):
            tied = replace(case, alpha=tensor(alpha).expand(6, 3))
            close(tied.loss("dpo"), case.dpo(first, "logistic"))


@scales
@combinations
@links
@clips
class TestGradients:
    def test_match_central_differences(self, combine: str, link: str, clip: str, ln: bool) -> None:
        case = scored(ln)[2]
        assert torch.autograd.gradcheck(
            lambda policy: replace(case, policy=policy).both(combine, link, clip),
            case.policy.requires_grad_(),
            eps=1e-4,
        )

    def test_are_a_scalar_times_plus_and_minus_one(
        self, combine: str, link: str, clip: str, ln: bool
    ) -> None:
        """References only re-weight pairs, and no pair depends on another one's policy scores."""
        case = scored(ln)[2]
        jacobian = torch.autograd.functional.jacobian(
            lambda policy: replace(case, policy=policy).loss(combine, link, clip), case.policy
        )
        chosen, rejected = jacobian.unbind(-1)  # (B, B): of each loss by each pair's two replies
        close(chosen, torch.diag(chosen.diagonal()))
        close(rejected, -chosen)
        assert chosen.diagonal().count_nonzero() > 1


@combinations
@links
def test_a_gradient_step_prefers_the_chosen_reply(combine: str, link: str) -> None:
    logps = tensor([[-1.0, -1.0]]).requires_grad_()
    case = Case(logps, torch.full((1, 2, 2), -1.0, dtype=torch.float64), tensor([[0.3, 0.7]]))
    case.loss(combine, link).sum().backward()
    assert logps.grad is not None
    assert logps.grad[0, 0] < 0 < logps.grad[0, 1]


@properties
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-3))
def test_effective_sample_size(weights: Row) -> None:
    assert effective_sample_size(tensor(weights)) == pytest.approx(oracles.ess(weights))
    assert effective_sample_size(torch.zeros(4)) == 0.0


class TestTrustRegion:
    """CTRO by hand, epsilon 0.1. The anchor, reference 0, gives -1 (chosen) and -2 (rejected)."""

    @pytest.mark.parametrize(
        ("adaptive", "reference", "expected"),
        [
            # fixed: within [-1.1, -0.9] and [-2.2, -1.8]
            (False, [-3.0, -10.0], [-1.1, -2.2]),
            (False, [-0.5, -0.5], [-0.9, -1.8]),
            (False, [-1.05, -1.95], [-1.05, -1.95]),
            # adaptive: b = (-2, -6) shares epsilon out as 0.025 and 0.075
            (True, [-3.0, -10.0], [-1.025, -2.15]),
            # b = (-1.5, -1): 0.06 and 0.04, the first a lower and the second an upper bound
            (True, [-2.0, -0.0], [-1.06, -1.92]),
        ],
    )
    def test_bounds(self, adaptive: bool, reference: Row, expected: Row) -> None:
        clipped = losses.ctro(tensor([[[-1, -2], reference]]), epsilon=0.1, adaptive=adaptive)
        close(clipped, tensor([[[-1, -2], expected]]))

    def test_certain_replies_stay_certain(self) -> None:
        """All log-probabilities 0, where the adaptive share is 0/0."""
        certain = torch.zeros(1, 3, 2, dtype=torch.float64)
        assert torch.equal(losses.ctro(certain, epsilon=0.1, adaptive=True), certain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta must be greater than 0, got 0"),
        ({"beta": -0.1}, "beta must be greater than 0, got -0.1"),
        ({"beta": math.nan}, "beta must be greater than 0, got nan"),
        ({"link": partial(losses.logistic, label_smoothing=-0.1)}, "label_smoothing .* got -0.1"),
        ({"link": partial(losses.robust, label_flip=0.5)}, "label_flip .* below 0.5, got 0.5"),
        ({"clip": partial(losses.ctro, epsilon=0.0, adaptive=True)}, "epsilon .* than 0, got 0"),
    ],
)
def test_wrong_numbers_are_refused_when_built(wrong: dict[str, Any], message: str) -> None:
    right = partial(PreferenceLoss, combine=losses.mdpo, link=losses.ipo, clip=losses.no_clip)
    with pytest.raises(ValueError, match=message):
        right(**({"beta": 1.0} | wrong))


@combinations
@pytest.mark.parametrize("name", ["refs", "alpha"])
def test_transposed_axes_are_refused_by_name(combine: str, name: str) -> None:
    case = scored(True)[2]
    transposed = replace(case, **{name: getattr(case, name).transpose(0, 1)})
    with pytest.raises(TypeCheckError, match=rf"losses\.{combine}\.\n.* parameter '{name}'"):
        transposed.loss(combine)


@pytest.mark.parametrize(
    ("folder", "node", "table"),
    [("loss", "combine", COMBINATIONS), ("loss/link", None, LINKS), ("loss/clip", None, CLIPS)],
)
def test_every_shipped_choice_has_a_row(folder: str, node: str | None, table: Any) -> None:
    files = (Path(__file__).parents[1] / "conf" / folder).glob("*.yaml")
    shipped: list[Any] = [OmegaConf.load(file) for file in sorted(files)]
    targets = {(choice[node] if node else choice)["_target_"] for choice in shipped}
    functions = [getattr(row[0], "func", row[0]) for row in table.values()]
    assert targets == {f"mrpo_lab.{function.__name__}" for function in functions}
