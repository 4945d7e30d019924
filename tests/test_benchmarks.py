"""The benchmarks at a toy size: what they measure is the same work, and is counted rightly."""

import math
from importlib import resources

import numpy as np
import pytest
import torch
from test_packing import items_of
from test_scoring import random_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import difference
from benchmarks.contestants import ours_scoring, ours_training, plain_scoring
from benchmarks.work import Work, flops, matmul_peak
from mrpo_lab import attention
from mrpo_lab.scoring import ReplyScorer

pytest_plugins = ("surroundings",)
WORK = Work(
    data=str(resources.files("mrpo_lab") / "embedded" / "starter.jsonl"),
    model="embedded:tiny7/tiny-qwen2",
    dtype="float32",
    max_tokens=1024,
    batch=3,
    steps=2,
    threads=1,
)


@pytest.mark.usefixtures("surroundings")
class TestContestants:
    def test_scoring_is_the_same_work(self) -> None:
        ours, plain = ours_scoring(WORK, 500), plain_scoring(WORK, 500)
        assert np.shape(ours["logps"]) == (9, 2)
        assert difference(ours["logps"], plain["logps"]) < 1e-5
        assert len(ours["seconds"]) == len(plain["seconds"]) == 2

    def test_training_starts_where_dpo_starts_and_moves(self) -> None:
        numbers = ours_training(WORK, 500)
        first, *later = numbers["losses"]
        assert first == pytest.approx(math.log(2), abs=1e-5)
        assert all(abs(loss - first) > 1e-4 for loss in later)
        assert numbers["packs"]
        assert 0 < numbers["flops_per_second"] < 1e13


def test_flops_are_those_that_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 1)  # no key is computed that a query does not see
    model, items = random_model("llama"), items_of((20, 9, 12), (7, 3, 3))
    scorer = ReplyScorer(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scorer.logps(items)
    forward = flops(model, items, backward=False)
    assert counter.get_total_flops() == pytest.approx(forward, rel=1e-6)
    model.requires_grad_(False)  # the gradients of activations cost what the activations did
    assert flops(model, items, backward=True) == pytest.approx(2 * forward, rel=0.15)


def test_the_peak_is_a_speed() -> None:
    assert 1e9 < matmul_peak(torch.float32, torch.device("cpu")) < 1e13
