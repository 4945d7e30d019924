"""What is computed on a GPU is right: ``make test-gpu`` where there is one.

Without a GPU the same tests run on a CPU, with a stand-in for the attention kernel, so that they
are known to work on the day a GPU is at hand; what only a GPU can show is skipped.
"""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_kernel import attend_each
from harness import assert_same, experiment, killed, metrics
from test_packing import ITEMS, items_of, slow
from test_scoring import random_model
from whole_logits import gradient, weighted

from mrpo_lab.scoring import scorer as scoring
from mrpo_lab.scoring import varlen
from mrpo_lab.scoring.agreement import difference
from mrpo_lab.scoring.backend import DETERMINISTIC_GPU, GPU
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.training import trainer
from mrpo_lab.training.determinism import WORKSPACE, deterministic_algorithms

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(
    params=[pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]), "stand-in"], autouse=True
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, or the CPU with the GPU's backend and a stand-in for its kernel."""
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr(varlen, "flash_attention", attend_each)

    def backend(device: torch.device, dtype: torch.dtype) -> Any:
        return DETERMINISTIC_GPU if torch.are_deterministic_algorithms_enabled() else GPU

    monkeypatch.setattr(scoring, "backend_for", backend)
    monkeypatch.setattr("mrpo_lab.scoring.kernels.backend_for", backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return torch.device("cpu")


@pytest.fixture
def dtype(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """The dtype of whole runs: bfloat16 on a GPU; on a CPU, where that is slow, float32."""
    if device.type == "cuda":
        return "bfloat16"
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    return "float32"


def run(outputs: Path, dtype: str, *overrides: str) -> Path:
    types = (f"model.dtype={dtype}", f"reference_set.dtype={dtype}")
    return experiment(outputs, *types, *overrides)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral"])
def test_packs_are_as_near_to_float32_as_plain_rows_are(name: str, device: torch.device) -> None:
    """In bfloat16, beside each reply alone in float32 on the CPU: scores and gradients. Mistral's
    window is shorter than the rows."""
    model = random_model(name)
    expected = slow(model, ITEMS)
    wanted = gradient(model, weighted(expected))
    narrow = deepcopy(model).to(device, torch.bfloat16)

    def errors(scorer: ReplyScorer) -> tuple[float, float]:
        sums, counts = scorer.logps(ITEMS)
        apart = difference(sums.detach().cpu(), expected.detach(), counts.cpu())
        slopes = gradient(narrow, weighted(sums.cpu())).float().cpu()
        return apart, float((slopes - wanted).norm() / wanted.norm())

    scorer = ReplyScorer(narrow)
    packed, plain = errors(scorer), errors(ReplyScorer(narrow, kernels="off"))
    assert scorer.packs
    assert packed[0] < 1.5 * plain[0] + 0.002
    assert packed[1] < 1.5 * plain[1] + 0.002
    assert max(plain) < 0.2  # which is rounding, and not another model


def test_rows_padded_without_a_mask_agree(device: torch.device) -> None:
    model = random_model("qwen2")
    rows = [row for item in ITEMS for row in item]
    expected = slow(model, ITEMS).detach()
    scorer = ReplyScorer(deepcopy(model).to(device, torch.bfloat16))
    with torch.no_grad():
        sums, counts = scorer.padded_logps(rows)
    assert difference(sums.cpu(), expected, counts.cpu()) < 0.02


def test_float32_is_padded_and_exact(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model("llama")
    expected = slow(model, ITEMS).detach()
    scorer = ReplyScorer(deepcopy(model).to(device))
    with caplog.at_level("INFO"), torch.no_grad():
        sums, _ = scorer.logps(ITEMS)
    assert not scorer.packs
    assert "flash attention takes 16 bits" in caplog.text
    torch.testing.assert_close(sums.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantization", ["null", "nf4"])
def test_training_packed_is_training_padded(tmp_path: Path, dtype: str, quantization: str) -> None:
    """Up to the rounding of bfloat16."""
    lora = ("model.lora={r: 4, target_modules: all-linear}", f"model.quantization={quantization}")
    packed, plain = (
        metrics(run(tmp_path / kernels, dtype, *lora, f"kernels={kernels}"))
        for kernels in ("auto", "off")
    )
    for key in ("train/loss", "train/grad_norm", "pair_weight/mean"):
        assert packed[1][key] == pytest.approx(plain[1][key], rel=0.05), key


@pytest.mark.parametrize("weighting", ["arwc", "tsw"])
def test_resumed_deterministic_run_is_the_same_bit_for_bit(
    tmp_path: Path, dtype: str, weighting: str
) -> None:
    chosen = (dtype, f"weighting={weighting}", "deterministic=true")
    whole = run(tmp_path / "whole", *chosen)
    with killed(trainer, "save_state", 1, "after"):
        run(tmp_path / "killed", *chosen)
    assert_same(run(tmp_path / "killed", *chosen), whole)


def test_determinism_ends_with_the_run(device: torch.device) -> None:
    before = os.environ.get(WORKSPACE)
    for _ in range(2):
        with deterministic_algorithms(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not ReplyScorer(random_model("llama").to(device, torch.bfloat16)).packs
        assert not torch.are_deterministic_algorithms_enabled()
        assert os.environ.get(WORKSPACE) == before
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_says_what_it_computes_with(
    tmp_path: Path, device: torch.device, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(tmp_path, dtype, "train.micro_batch_tokens=2048")
    assert f"{device.type}: packed rows, flash varlen, {dtype}, 2,048 tokens a pass" in caplog.text


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_memory_does_not_grow_with_the_vocabulary_times_the_tokens(device: torch.device) -> None:
    """The logits of all reply tokens would take 8 GiB here in float32."""
    config = deepcopy(random_model("llama").config)
    config.vocab_size = 128_000
    model = type(random_model("llama"))(config).to(device, torch.bfloat16)
    scorer = ReplyScorer(model)
    items = items_of(*[(500, 500, 500)] * 16)
    scorer.costs(items)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scorer.logps(items)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**30
