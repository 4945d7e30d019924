"""What is simulated is what the program does: its tokens, its operations, its memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.ours import trainer_of
from benchmarks.simulate import sources, sweeps
from benchmarks.simulate.__main__ import main
from benchmarks.simulate.costs import Model, Work
from benchmarks.simulate.layouts import LAYOUTS, MASKED, PACKED, PADDED, SHARED, Pass, items_of
from benchmarks.simulate.shapes import Shape, read_config
from benchmarks.simulate.sources import profile_items
from benchmarks.synthetic_models import PROFILES
from mrpo_lab import embedded
from mrpo_lab.data.texts import Replies
from mrpo_lab.models.adapters import with_lora
from mrpo_lab.models.policy import Policy
from mrpo_lab.objective.scores import Scores
from mrpo_lab.objective.weighting import ARWC, TSW, Weighting
from mrpo_lab.scoring import attention
from mrpo_lab.scoring.kernels import fuse
from mrpo_lab.scoring.packing import NO_PADDING, PadToMultipleOf, packed_tokens
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.training.config import TrainConfig

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 96}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**GROUPED, "model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {**GROUPED, "model_type": "llama", "tie_word_embeddings": False},
    "qwen3": {**GROUPED, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "phi3": {
        **GROUPED,
        "model_type": "phi3",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {**SIZES, "model_type": "gpt_neox", "num_attention_heads": 4},
}
LORA = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}
ADAPTERS = {
    "none": None,
    "all": LORA,
    "attention": {**LORA, "target_modules": ["q_proj", "v_proj"]},
}
STEPS = [
    ("qwen2", "all", False),
    ("qwen2", "none", True),
    ("llama", "all", True),
    ("llama", "none", False),
    ("qwen3", "attention", True),
    ("phi3", "all", True),
    ("gpt_neox", "none", False),
]
"""Model, what LoRA is added to, and whether gradient checkpointing is on."""
ITEMS = items_of([(20, 9, 12), (7, 3, 3), (11, 5, 2), (4, 8, 6)])
CPU = torch.device("cpu")


def real_model(name: str, train: bool = False, lora: Any = None) -> Any:
    model = AutoModelForCausalLM.from_config(read_config(CONFIGS[name]), dtype=torch.float32)
    model.requires_grad_(train and lora is None)
    if lora:
        model = with_lora(model, lora, 0)
    fuse(model.eval())
    return model


def policy_of(model: Any) -> Policy:
    policy = Policy.__new__(Policy)  # without a tokenizer
    policy.model, policy.scorer = model, ReplyScorer(model)
    return policy


def in_place(*args: Any, **_: Any) -> int:
    (_, a, b) = args[:3]
    return int(2 * a[0] * a[1] * b[1])


@functools.cache
def shape_of(name: str, train: bool = False, lora: str = "none") -> Shape:
    return Shape.of(CONFIGS[name], train, ADAPTERS[lora])


@contextmanager
def counting(block: int = 1) -> Iterator[FlopCounterMode]:
    """torch's counter, told of products that are added in place; attention is blocks of one query,
    so that as in a GPU's kernel no key is computed that a query does not see. Items of fewer tokens
    than ``block`` are a block of their own."""
    mode = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    # Its hooks on modules forbid gradients inside a forward pass.
    mode.mod_tracker = mock.MagicMock(parents={"Global"})
    with (
        mock.patch.object(attention, "WHOLE", block),
        mock.patch.object(attention, "BLOCK", 1),
        sdpa_kernel(SDPBackend.MATH),  # of the fused kernel the counter knows nothing
        mode,
    ):
        yield mode


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_of_scoring(name: str) -> None:
    scorer, counted = ReplyScorer(real_model(name)), Model(shape_of(name))
    scorer.costs(ITEMS)  # the first use compares packed with padded rows
    scorer.padded_logps([row for item in ITEMS for row in item])  # and a mask with none
    for scorer.packs, layout in ((True, SHARED), (False, MASKED)):
        with counting() as counter:
            scorer.score(ITEMS, 60)
        passes = layout.passes(ITEMS, 60)
        assert len(passes) > 1
        assert counter.get_total_flops() == counted.score(passes).flops


@pytest.mark.parametrize(("name", "lora", "checkpointing"), STEPS)
def test_operations_of_an_optimizer_step(name: str, lora: str, checkpointing: bool) -> None:
    model = real_model(name, True, ADAPTERS[lora])
    if checkpointing:
        base = model.get_base_model() if ADAPTERS[lora] else model
        base.activation_checkpointing_enable({"use_reentrant": False})
    policy = policy_of(model)
    refs = Scores.stack([policy.scorer.score(ITEMS, 500)])
    config = TrainConfig(batch_size=4, micro_batch_tokens=60, accuracy_after_step=False)
    with trainer_of(policy, ITEMS, refs, config, ARWC()) as trainer, counting() as counter:
        trainer.train_step(np.arange(4))
    expected = Model(shape_of(name, True, lora), checkpointing=checkpointing)
    assert counter.get_total_flops() == expected.step(SHARED.passes(ITEMS, 60)).flops


@pytest.mark.parametrize(("weighting", "chance"), [(ARWC(), 0.0), (TSW(probe_size=4), 0.01)])
def test_operations_of_a_whole_run(weighting: Weighting, chance: float) -> None:
    """40 items in 10 steps, 8 of val and 4 of test, two evaluations beside the first."""

    def whole(items: Sequence[Replies], padding: PadToMultipleOf) -> Pass:
        each = [packed_tokens(item) for item in items]
        return SHARED.lay_out(items, padding)._replace(pairs=sum(n * n for n in each))

    blocks = SHARED._replace(lay_out=whole)
    items = items_of([(9, 5, 7)] * 52)
    policy = policy_of(real_model("qwen2", True, LORA))
    refs = Scores.stack([policy.scorer.score(items, 500)] * 2)
    train: dict[str, Any] = {
        "batch_size": 4,
        "micro_batch_tokens": 60,
        "token_budget": 70,
        "epochs": 1,
        "evaluations": 2,
        "accuracy_after_step": True,
    }
    model = {"path": "", "lora": LORA, "quantization": None, "gradient_checkpointing": False}
    config = {
        "train": train,
        "model": model,
        "weighting": {"_target_": f"mrpo_lab.{type(weighting).__name__}", "probe_size": 4},
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }
    settings = TrainConfig(**train)
    with (
        mock.patch.object(sweeps, "shape_of", return_value=shape_of("qwen2", True, "all")),
        mock.patch.object(sweeps, "PADDING", NO_PADDING),  # the real model is in float32
    ):
        data = sweeps.Data(items[:40], sweeps.Sizes(40, 8, 4, 52))
        run = sweeps.Run(config, data, 1)
        work = Work.sum([run.training(blocks, data.sizes), run.evaluation(blocks, data.sizes)])
    training = trainer_of(policy, items, refs, settings, weighting, splits=(8, 4))
    with training as trainer, counting(block=256) as counter:
        trainer.fit()
    # How many pairs two subsets share is a matter of chance.
    assert counter.get_total_flops() == pytest.approx(work.flops, rel=chance or 1e-9)


TOKENS = {
    ("saferlhf-like", 8192): (22_875, 11_880, 10_403),
    ("saferlhf-like", 32_768): (38_405, 11_880, 10_403),
    ("ultrafeedback-like", 8192): (30_064, 20_806, 17_523),
    ("ultrafeedback-like", 32_768): (47_085, 20_806, 17_523),
}
"""Tokens of a step by an earlier simulation: padded, packed, packed with a shared prompt. It drew
other lengths; one padded pass is as wide as the longest row of a step, which chance decides."""


@pytest.mark.parametrize(("name", "budget"), TOKENS)
def test_tokens_of_a_step(name: str, budget: int) -> None:
    (profile,) = (p for p in PROFILES if p.name == name)
    items = profile_items(profile, 100 * profile.batch)
    steps = [items[i : i + profile.batch] for i in range(0, len(items), profile.batch)]
    for layout, expected in zip((PADDED, PACKED, SHARED), TOKENS[name, budget], strict=True):
        tokens = [sum(p.tokens for p in layout.passes(step, budget)) for step in steps]
        assert np.mean(tokens) == pytest.approx(expected, rel=0.05)


def test_pairs_are_those_that_attention_sees() -> None:
    lengths = [(5, 3, 2), (4, 1, 6)]
    alone = sum(
        n * (n + 1) // 2 for prompt, *replies in lengths for n in map(prompt.__add__, replies)
    )
    twice = sum(prompt * (prompt + 1) // 2 for prompt, *_ in lengths)
    found = {layout.name: layout.passes(items_of(lengths), 1000)[0].pairs for layout in LAYOUTS}
    assert list(found.values()) == [4 * 10 * 10, 4 * 55, alone, alone - twice]


@pytest.mark.parametrize("model", sources._published())
def test_published_numbers_of_parameters(model: str) -> None:
    assert sources.shape_of(model).parameters == sources._published()[model]["parameters"]


def test_activations_are_those_that_are_saved() -> None:
    """By the operations' own inputs: four vectors of the model's width, queries and what attention
    makes of them, keys and values, three of the feed-forward layer's width, seven of LoRA's rank,
    and the norms' two float32 numbers."""
    shape = Shape.of({**CONFIGS["llama"], "num_hidden_layers": 10}, True, LORA)
    more = Shape.of({**CONFIGS["llama"], "num_hidden_layers": 11}, True, LORA)
    a_layer = more.training.token.saved - shape.training.token.saved
    assert a_layer == 2 * (4 * 32 + 2 * 32 + 2 * 16 + 3 * 48 + 7 * 4) + 4 * 2


REFUSED = {
    "--model nothing/known --only step": "nothing/known: its shape is not known",
    "--data none.jsonl --tokenizer x --only step": "none.jsonl: there is no such file",
    "--data x --only step": "--tokenizer",
    "--full --quantization nf4 --only step": "quantized weights cannot be trained",
    "--only step --batch 99999": "fewer than a step",
    "--only step --cards {tmp}/cards.yaml": "cards.yaml: cards.A.source",
    "--only step --cards {tmp}/none.yaml": "none.yaml: No such file",
    "--only step --cards {tmp}/zero.yaml": "cards.A.memory_gib: Input should be greater than 0",
    "--only step --model {tmp}/config.json": "MixtralForCausalLM is not counted",
    "--only step --model {tmp}/list.json": "expected an object",
    "--only sweep sweep=nothing": "sweep=nothing: no such option",
    "--only sweep sweep=paper dataset=helpsteer2": "no run",
    "--only sweep dataset=jsonl dataset.path=none.jsonl": "none.jsonl: there is no such file",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_mistakes_are_one_line(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = {"bf16_tflops": 1, "bandwidth_tb_s": 1, "memory_gib": 1}
    (tmp_path / "cards.yaml").write_text(json.dumps({"cards": {"A": card}, "assumed": {}}))
    zero = {"cards": {"A": {**card, "memory_gib": 0, "source": "none"}}, "assumed": {}}
    (tmp_path / "zero.yaml").write_text(json.dumps(zero))
    (tmp_path / "config.json").write_text(json.dumps({**GROUPED, "model_type": "mixtral"}))
    (tmp_path / "list.json").write_text("[]")
    assert main([word.format(tmp=tmp_path) for word in arguments.split()]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert REFUSED[arguments] in line
    assert not said.out


def test_a_sweep_is_counted_run_by_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "sweep", "sweep=thompson", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["simulated"]["sweep"]
    assert len(rows) == 4 * len(LAYOUTS)
    for row in rows:
        low, high = row["gpu_hours"]["1"]
        assert 0 < low < high
        assert row["gpu_hours"]["10"][0] == pytest.approx(10 * low, rel=0.1)
    cost = sweeps.SweepCost.of(["sweep=thompson"])
    assert (cost.count, len(cost.scorings)) == (16, 14)  # by seven references of two data sets


def test_a_data_file_takes_the_place_of_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    starter = str(resources.files("mrpo_lab") / "embedded" / "starter.jsonl")
    folder = embedded.folder("tiny7/tiny-qwen2")
    words = ["--only", "step", "--json", "--tokens", "8192", "--batch", "8", "--data", starter]
    words += ["--tokenizer", str(folder), "--model", str(folder / "config.json"), "--full"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["simulated"]["step"]
    assert [row["layout"] for row in rows] == [layout.name for layout in LAYOUTS]
    tokens = [row["tokens"] for row in rows]
    assert tokens[0] == tokens[1] > tokens[2] > tokens[3] > 0


def test_tables_say_that_they_are_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "step", "--profiles", "saferlhf-like", "--tokens", "8192"]) == 0
    said = capsys.readouterr().out
    assert said.count("(simulated)") == 2
    assert all(layout.name in said for layout in LAYOUTS)
