"""Units of log-probabilities: the worked numbers, and what a run divides by."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from harness import TINY, compose, experiment, metrics

from mrpo_lab.data.texts import Item, byte_lengths
from mrpo_lab.experiment import Experiment
from mrpo_lab.objective.losses import PreferenceLoss, geometric, logistic, no_clip
from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.objective.units import ReplyLengths, Unit, in_unit
from mrpo_lab.objective.weighting import ARWC
from mrpo_lab.training.workers import Workers

pytest_plugins = ("surroundings",)
TOKENS = torch.tensor([[10, 14]])
BYTES = torch.tensor([[45, 62]])
LENGTHS = ReplyLengths(policy_tokens=torch.tensor([[9, 15]]), bytes=BYTES)
POLICY = Scores(torch.tensor([[-12.0, -21.0]]).double(), TOKENS)
REFS = Scores(
    torch.tensor([[[-13.0, -19.6], [-11.0, -25.2]]]).double(), TOKENS.expand(1, 2, 2).contiguous()
)
ALPHA = torch.tensor([[0.25, 0.75]]).double()


def loss_in(unit: Unit, policy: Scores = POLICY, refs: Scores = REFS, beta: float = 2.0) -> float:
    loss = PreferenceLoss(combine=geometric, link=logistic, clip=no_clip, beta=beta, unit=unit)
    policy, refs = (in_unit(each, unit, LENGTHS) for each in (policy, refs))
    return float(loss(policy, refs, ALPHA, chosen_first(1)).loss)


def test_worked_numbers() -> None:
    """Geometric, beta 2: by hand, z = -0.5 per token and -0.112545 per byte."""
    assert loss_in("token") == pytest.approx(0.974077, abs=1e-6)
    assert loss_in("byte") == pytest.approx(0.751002, abs=1e-6)
    u = -12 - (0.25 * -13 + 0.75 * -11), -21 - (0.25 * -19.6 + 0.75 * -25.2)
    for unit, lengths in (("policy_token", (9, 15)), ("reply", (1, 1))):
        z = torch.tensor(2.0 * (u[0] / lengths[0] - u[1] / lengths[1])).double()
        assert loss_in(unit) == pytest.approx(float(-torch.nn.functional.logsigmoid(z)))  # type: ignore[arg-type]


def test_bytes_do_not_see_the_tokenizer() -> None:
    other = Scores(REFS.sums, torch.tensor([[[3, 40], [20, 7]]]))
    assert loss_in("byte", refs=other) == loss_in("byte")
    assert loss_in("token", refs=other) != loss_in("token")


def test_old_keys_mean_what_they_did() -> None:
    parts = {"combine": geometric, "link": logistic, "clip": no_clip, "beta": 1.0}
    assert PreferenceLoss(**parts).resolved_unit == "token"  # type: ignore[arg-type]
    assert PreferenceLoss(**parts, length_normalized=False).resolved_unit == "reply"  # type: ignore[arg-type]
    assert ARWC(length_normalized=False).unit == "reply"
    with pytest.raises(ValueError, match=r"unit must be one of token, .*, got 'word'"):
        PreferenceLoss(**parts, unit="word")  # type: ignore[arg-type]


def test_weights_per_token_grow_with_bytes_per_token() -> None:
    """Equal margins per byte, and 4.0 and 4.8 bytes a token."""
    sums = torch.tensor([[[-24.0, -48.0], [-24.0, -48.0]]]).double()
    counts = torch.tensor([[[60, 60], [50, 50]]])
    lengths = ReplyLengths(policy_tokens=counts[:, 0], bytes=torch.tensor([[240, 240]]))
    cases: list[tuple[Unit, list[float]]] = [("token", [0.454545, 0.545455]), ("byte", [0.5, 0.5])]
    for unit, expected in cases:
        refs = in_unit(Scores(sums, counts), unit, lengths)
        found = ARWC(unit=unit).proportions(refs, chosen_first(1))[0]
        assert (found / found.sum()).tolist() == pytest.approx(expected, abs=1e-6)


def test_missing_replies_stay_missing() -> None:
    scores = Scores(torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[1, 2, 0]]))
    lengths = ReplyLengths(torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7, 8]]))
    for unit in get_args(Unit):
        assert in_unit(scores, unit, lengths).present.tolist() == [[True, True, False]]


def test_byte_lengths_are_of_the_text() -> None:
    ask = ({"role": "user", "content": "?"},)
    items = [Item(ask, ("caf\u00e9", "")), Item(ask, ("a", "b", "\ud83d"))]
    assert byte_lengths(items).tolist() == [[6, 1, 0], [2, 2, 4]]


@pytest.mark.usefixtures("surroundings")
def test_a_run_divides_by_them(tmp_path: Path) -> None:
    units = ("loss.unit=byte", "weighting.unit=policy_token")
    built = Experiment.build(compose(*TINY, *units), Workers.start())
    prepared = built.prepare()
    data = built.data(prepared, built.reference_scores(prepared).scores)
    texts = [[len(r.encode()) + 1 for r in item.replies] for item in prepared.items]
    tokens = [
        [row.reply_tokens for row in rows] for rows in data.tokens.rows(range(5), torch.ones(1))
    ]
    for k in range(3):
        assert data.loss_refs.counts[:, k].tolist() == texts
        assert data.weighting_refs.counts[:5, k].tolist() == tokens
    assert torch.equal(data.loss_refs.sums, data.refs.sums)
    by_byte, by_token = experiment(tmp_path / "b", *units), experiment(tmp_path / "t")
    first, other = metrics(by_byte)[1], metrics(by_token)[1]
    assert first["train/accuracy_before"] == other["train/accuracy_before"]
    assert first["train/loss"] != other["train/loss"]
    assert first["loss_by_reference/tiny-qwen2"] == pytest.approx(0.693147, abs=1e-5)
