"""The benchmarks at a toy size measure the same work for all programs, and count it correctly."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from harness import CONF
from test_packing import items_of
from test_scoring import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, overhead
from benchmarks.__main__ import difference
from benchmarks.measurements import MEASUREMENTS, ours_scoring, ours_training, plain_scoring
from benchmarks.overhead import WEIGHTINGS, fill, small_steps, start, trial
from benchmarks.results import Result, report
from benchmarks.synthetic_models import PROFILES
from benchmarks.workload import Workload, flops, matmul_peak, plain_flops
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.texts import Item
from mrpo_lab.models.references import ReferenceSet
from mrpo_lab.models.weights import ModelSource
from mrpo_lab.scoring import attention
from mrpo_lab.scoring.scorer import ReplyScorer

pytest_plugins = ("surroundings",)
WORK = Workload(
    data=str(resources.files("mrpo_lab") / "embedded" / "starter.jsonl"),
    model="embedded:tiny7/tiny-qwen2",
    dtype="float32",
    max_tokens=1024,
    batch=3,
    steps=2,
    threads=1,
)


@pytest.mark.usefixtures("surroundings")
class TestMeasurements:
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
    monkeypatch.setattr(attention, "WHOLE", 0)
    monkeypatch.setattr(attention, "BLOCK", 1)  # no key is computed that a query does not see
    model, items = random_model("llama"), items_of((20, 9, 12), (7, 3, 3))
    scorer = ReplyScorer(model)
    scorer.costs(items)  # the first use compares packed with padded rows
    plain_products = sdpa_kernel(SDPBackend.MATH)  # of the fused kernel the counter knows nothing
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain_products:
        scorer.logps(items)
    forward = flops(model, items, backward=False)
    assert counter.get_total_flops() == pytest.approx(forward, rel=1e-6)
    model.requires_grad_(False)  # the gradients of activations cost what the activations did
    assert flops(model, items, backward=True) == pytest.approx(2 * forward, rel=0.15)
    # Without sharing, attention and head: what is left grows with the number of rows.
    assert plain_flops(model, items, 2) == pytest.approx(
        plain_flops(model, items[:1], 2) + plain_flops(model, items[1:], 2)
    )
    assert plain_flops(model, items, 4) == 2 * plain_flops(model, items, 2)


def test_the_peak_is_a_speed() -> None:
    assert 1e9 < matmul_peak(torch.float32, torch.device("cpu")) < 1e13


class TestStart:
    @pytest.mark.parametrize("module", ["mrpo_lab", "train"])
    def test_importing_takes_no_torch_and_half_a_second(self, module: str) -> None:
        script = f"import sys, time; import {module}; print(time.process_time(), *sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=CONF.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, *modules = done.stdout.split()
        assert not {"torch", "transformers", "pandas"} & {*modules}
        assert float(seconds) < 0.5  # of the processor, Python's own start with it

    def test_seven_thousand_stored_scores_of_seven_references_in_a_second(
        self, tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))
        (tmp_path / "models").symlink_to(tiny7_dir.parent)
        names = sorted(folder.name for folder in tiny7_dir.iterdir() if folder.is_dir())
        entries = [{"slug": name, "path": f"embedded:tiny7/{name}"} for name in names]
        items = [
            Item(({"role": "user", "content": f"What is {i}?"},), (f"It is {i}.", f"Not {i}, no."))
            for i in range(7000)
        ]
        ids = reply_ids(items)
        fill(ReferenceSet(entries=entries), items, ids)
        references = ReferenceSet(entries=entries, gate="warn")
        with mock.patch.object(ModelSource, "load", side_effect=AssertionError("a model")):
            began = time.process_time()
            scores = references.scores(items, ids, torch.device("cpu")).scores
            seconds = time.process_time() - began
        assert scores.sums.shape == (7000, 7, 2)
        assert seconds < 1.0

    @pytest.mark.usefixtures("surroundings")
    def test_a_run_is_followed_to_its_first_step(self) -> None:
        own, scores = start(WORK, pool=70)
        assert 0 < scores.value < own.value < 60


@pytest.mark.usefixtures("surroundings")
class TestTrial:
    @pytest.mark.parametrize("weighting", ["arwc", "tsw"])
    def test_all_time_is_accounted_for(self, weighting: str) -> None:
        work = replace(WORK, max_tokens=150)
        outside, evaluations, accuracies, rest = (row.value for row in trial(work, 50, weighting))
        assert 0 < outside < 100
        assert outside == pytest.approx(evaluations + accuracies + rest, abs=0.1)
        assert min(evaluations, accuracies, rest) > 0


def test_many_references_are_timed_against_a_step() -> None:
    assert min(small_steps(WEIGHTINGS["arwc"], batch=8, steps=3)) > 0
    with (
        mock.patch.object(overhead, "measure", return_value={"seconds": [2.0]}),
        mock.patch.object(overhead, "small_steps", return_value=[0.01, 0.05]),
    ):
        rows = list(overhead.many_references(WORK))
    assert len(rows) == 2 * len(WEIGHTINGS)
    assert all(row.value == pytest.approx(2.0) for row in rows)
    assert not any(row.reached for row in rows)


@pytest.mark.usefixtures("surroundings")
class TestGPU:
    def test_every_row_at_a_toy_size(self, tmp_path: Path) -> None:
        def measure(who: str, size: int, work: Workload) -> dict[str, Any]:
            """In this process; TRL need not be installed."""
            if who == "trl_training":
                return {"pairs_per_second": 1.0}
            return MEASUREMENTS[who](work, size) | {"peak_gib": 1.0}

        out = tmp_path / "new" / "gpu.json"
        with mock.patch.object(gpu, "measure", measure):
            rows = gpu.main(["--toy", "--out", str(out)])
        assert len(rows) == 2 * (2 * 6 + 2)
        assert all(0 < row.value < math.inf for row in rows)
        written = json.loads(out.read_text())
        assert [row["what"] for row in written["rows"]] == [row.what for row in rows]
        assert {"commit", "gpus", "torch"} <= written.keys()
        (best,) = (
            v for k, v in written["said"].items() if k == "qlora, saferlhf-like: ours_best 8192"
        )
        assert len(best["tried"]) == 8
        assert {point["gradient_checkpointing"] for point in best["tried"]} == {True, False}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so(self) -> None:
        with pytest.raises(SystemExit, match="no GPU"):
            gpu.main([])


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_lengths_are_those_of_the_profile(profile: Any, tmp_path: Path) -> None:
    profile.write(tmp_path / "pairs.jsonl", 500, 10**6, 1.0)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for key, median in (("prompt", profile.prompt), ("rejected", profile.reply)):
        lengths = [len(pair[key]) for pair in pairs]
        assert np.median(lengths) == pytest.approx(median, rel=0.2)
    profile.write(tmp_path / "short.jsonl", 500, 300, 1.0)
    pairs = [json.loads(line) for line in (tmp_path / "short.jsonl").read_text().splitlines()]
    assert len(pairs) == 500
    assert max(len(pair["prompt"] + pair["chosen"]) for pair in pairs) <= 300


def test_a_row_says_whether_it_is_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Result("a", 2.0, "s", at_most=1),
        Result("b", 0.5, "%", at_least=0.5),
        Result("c", 3.0, "GiB"),
    ]
    assert report(iter(rows), tmp_path / "out.json", toy=True) == rows
    assert [row.reached for row in rows] == [False, True, None]
    lines = capsys.readouterr().out.splitlines()
    printed = [re.sub(" +", " ", line) for line in lines if line.strip()]
    assert printed[2:] == [
        "| a | 2 s | ≤ 1 | no |",
        "| b | 0.5 % | ≥ 0.5 | yes |",
        "| c | 3 GiB | | |",
    ]
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["reached"] is False
