"""Packed rows are scored as the oracle scores them: each reply alone, whole logits, by token."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import TINY, compose
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import CONFIGS, GROUPED, SPECIAL, build, random_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GptOssConfig,
    MambaConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    Starcoder2Config,
)
from whole_logits import VOCABULARY, gradient, slow_score, weighted

from mrpo_lab.data.texts import Replies, TokenRow
from mrpo_lab.experiment import Experiment
from mrpo_lab.merging.merged_policies import load_adapters
from mrpo_lab.models.policy import PolicyConfig
from mrpo_lab.scoring import attention
from mrpo_lab.scoring.attention import AttentionOptions
from mrpo_lab.scoring.backend import CPU as BACKEND
from mrpo_lab.scoring.packing import (
    PadToMultipleOf,
    balanced,
    pack,
    packed_tokens,
    shared_tokens,
)
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.training.workers import Workers

pytest_plugins = ("flash_kernel",)
CPU = torch.device("cpu")
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
OTHERS: dict[str, PreTrainedConfig] = {
    "olmo2": Olmo2Config(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED),
    "starcoder2": Starcoder2Config(**GROUPED, sliding_window=5),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "falcon": FalconConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mamba": MambaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, state_size=4),
    "gpt_oss": GptOssConfig(**GROUPED, head_dim=8, sliding_window=5, num_local_experts=4),
    "qwen3_next": Qwen3NextConfig(
        **GROUPED, **LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
}
UNPACKABLE = {"bloom", "falcon", "mamba", "gpt_oss", "qwen3_next"}
"""Architectures that cannot be packed: biased scores, attention sinks, recurrent states."""
UNPACKABLE_ON_GPU = UNPACKABLE | {"gemma2"}
"""Flash attention has no soft cap either."""


def items_of(*shapes: tuple[int, ...], seed: int = 0) -> list[Replies]:
    """An item of random tokens for each shape: the prompt's number of tokens, then each reply's."""
    rng = np.random.default_rng(seed)
    items = []
    for start, *replies in shapes:
        prompt = rng.integers(3, VOCABULARY, start)
        rows = [np.concatenate([prompt, rng.integers(3, VOCABULARY, n)]) for n in replies]
        items.append(tuple(TokenRow(ids.astype(np.int32), start) for ids in rows))
    return items


ITEMS = items_of((9, 4, 7), (30, 12, 1), (1, 3, 3), (6, 2, 9, 5, 1))


def slow(model: Any, items: list[Replies]) -> torch.Tensor:
    return torch.stack([slow_score(model, row) for item in items for row in item])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare norms with float32's precision, which some models use whatever their dtype."""
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
class TestEveryArchitecture:
    """Sliding windows of 5 tokens are shorter than the rows."""

    def model(self, name: str) -> Any:
        if name in CONFIGS:
            return random_model(name)
        return build(AutoModelForCausalLM.from_config(OTHERS[name]))

    def test_values_and_gradients(
        self, name: str, each_backend: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        unpackable = UNPACKABLE if each_backend == "cpu" else UNPACKABLE_ON_GPU
        model = self.model(name)
        scorer = ReplyScorer(model)
        with caplog.at_level(logging.INFO, logger="mrpo_lab.scoring.scorer"):
            sums, counts = scorer.logps(ITEMS)
        assert scorer.packs == (name not in unpackable)
        said = [r.message for r in caplog.records if "so each is computed alone" in r.message]
        assert len(said) == (name in unpackable)
        expected = slow(model, ITEMS)
        torch.testing.assert_close(sums, expected, rtol=0, atol=5e-5)
        assert counts.tolist() == [row.reply_tokens for item in ITEMS for row in item]
        assert_near(gradient(model, weighted(sums)), gradient(model, weighted(expected)))


@pytest.mark.parametrize(("whole", "block"), [(0, 1), (0, 4), (0, 128), (20, 4), (256, 128)])
@pytest.mark.parametrize("window", [None, 3, 11])
def test_blocks_and_windows_change_nothing(
    whole: int, block: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WHOLE", whole)
    monkeypatch.setattr(attention, "BLOCK", block)
    config = CONFIGS["mistral"]
    config.sliding_window = window
    model = build(AutoModelForCausalLM.from_config(config)).double()
    scorer = ReplyScorer(model)
    expected = slow(model, ITEMS)
    sums, _ = scorer.logps(ITEMS)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
    wanted = gradient(model, weighted(slow(model, ITEMS)))
    assert_near(gradient(model, weighted(scorer.logps(ITEMS)[0])), wanted)


@pytest.mark.parametrize(
    "multiples", [PadToMultipleOf(8, 64), PadToMultipleOf(4, 32), PadToMultipleOf(16, 16)]
)
@pytest.mark.parametrize("window", [None, 3])
def test_padding_changes_nothing(multiples: PadToMultipleOf, window: int | None) -> None:
    (_, again), *others = ITEMS
    items = [*others[:2], (again, again), others[2]]  # one ends with a reply computed before
    starts = {segment.prefix_start for segment in pack(items, CPU, multiples).layout.segments}
    assert {start % multiples.item for start in starts} == {0}
    assert pack(items, CPU, multiples).layout.tokens % multiples.row == 0
    config = CONFIGS["mistral"]
    config.sliding_window = window
    model = build(AutoModelForCausalLM.from_config(config)).double()
    sums, _ = ReplyScorer(model, backend=BACKEND._replace(pad_to_multiple_of=multiples)).logps(
        items
    )
    expected = slow(model, items)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
    assert_near(gradient(model, weighted(sums)), gradient(model, weighted(expected)))


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 1), (torch.bfloat16, 64)])
def test_packs_in_16_bits_have_few_shapes(dtype: torch.dtype, multiple: int) -> None:
    model = random_model("llama").to(dtype)
    lengths: list[int] = []
    model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    scorer = ReplyScorer(model)
    scorer.costs(ITEMS)  # the first use compares packed with padded rows
    lengths.clear()
    scorer.score(ITEMS, 10**6)
    tokens = sum(packed_tokens(item) for item in ITEMS)
    assert lengths == [-(-tokens // multiple) * multiple]


@pytest.mark.parametrize("whole", [0, 256])
def test_the_gradient_of_the_attention_itself(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences."""
    monkeypatch.setattr(attention, "WHOLE", whole)
    layout = pack(items_of((3, 2, 2), (1, 2, 1)), CPU).layout
    generator = torch.Generator().manual_seed(0)
    heads = [
        torch.randn(n, layout.tokens, 3, dtype=torch.float64, generator=generator)
        for n in (4, 2, 2)
    ]
    inputs = [tensor.requires_grad_() for tensor in heads]
    for values in ((0.7, 2, None), (0.7, 99, 1.5), (0.7, 2, 0.5)):
        options = AttentionOptions(*values)
        assert torch.autograd.gradcheck(
            lambda q, k, v, options=options: attention.block_attention(q, k, v, layout, options),
            inputs,
        )


@pytest.mark.usefixtures("each_backend")
def test_a_reply_sees_nothing_of_others() -> None:
    """Not a bit of its score changes with another reply's or another item's tokens."""
    scorer = ReplyScorer(random_model("llama"))
    with torch.no_grad():
        sums, _ = scorer.logps(ITEMS)
        for item in range(len(ITEMS)):
            changed = list(ITEMS)
            ids = ITEMS[item][0].ids.copy()
            ids[ITEMS[item][0].start :] = 5
            changed[item] = (TokenRow(ids, ITEMS[item][0].start), *ITEMS[item][1:])
            other, _ = scorer.logps(changed)
            first = sum(len(rows) for rows in ITEMS[:item])
            assert torch.nonzero(other != sums).flatten().tolist() == [first]


@pytest.mark.usefixtures("each_backend")
def test_prompts_that_tokenize_differently_before_their_replies() -> None:
    """Where a reply's first characters merge with the prompt's last, rows share less than a
    prompt, and replies begin at different places."""
    left = TokenRow(np.array([4, 5, 6, 7, 8, 9], dtype=np.int32), 3)
    right = TokenRow(np.array([4, 5, 9, 9, 8], dtype=np.int32), 2, prefix_broken=True)
    early = TokenRow(np.array([4, 5, 6, 7], dtype=np.int32), 1)
    odd: list[Replies] = [(left, right), (left, early), (left, left)]
    assert [shared_tokens(rows) for rows in odd] == [2, 1, 3]
    assert [packed_tokens(rows) for rows in odd] == [9, 9, 6]
    assert sum(map(packed_tokens, odd)) == pack(odd, CPU).layout.tokens
    model = random_model("qwen2")
    sums, counts = ReplyScorer(model).logps(odd)
    torch.testing.assert_close(sums, slow(model, odd), rtol=0, atol=2e-5)
    assert counts.tolist() == [3, 3, 3, 3, 3, 3]


@pytest.mark.usefixtures("each_backend")
def test_replies_that_are_the_same_get_the_same_score() -> None:
    """To the last bit, and so a margin of 0 with no gradient."""
    (first, second, other), (alone,) = items_of((40, 30, 9, 9), (5, 3), seed=3)
    twice: list[Replies] = [(first, second, first, other, second), (alone, alone)]
    model = random_model("llama")
    sums, counts = ReplyScorer(model).logps(twice)
    torch.testing.assert_close(sums, slow(model, twice), rtol=0, atol=5e-5)
    assert counts.tolist() == [30, 9, 30, 9, 9, 3, 3]
    assert sums[0] == sums[2] != sums[1] == sums[4]
    assert sums[5] == sums[6]
    assert float(gradient(model, sums[0] + sums[5] - sums[2] - sums[6]).norm()) == 0


def test_a_prompt_is_computed_once() -> None:
    model = random_model("llama")
    lengths: list[int] = []
    model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    scorer = ReplyScorer(model)
    items = items_of((50, 3, 4), (50, 5, 6))
    scorer.costs(items)  # the first use compares packed with padded rows
    lengths.clear()
    scorer.score(items, 10**6)
    assert lengths == [50 + 3 + 4 + 50 + 5 + 6]


@pytest.mark.usefixtures("each_backend")
def test_attention_with_dropout_is_left_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("gpt2")
    scorer = ReplyScorer(model)
    scorer.score(ITEMS, 10**6)
    assert scorer.packs
    model.train()
    with caplog.at_level(logging.INFO, logger="mrpo_lab.scoring.scorer"):
        noisy = [scorer.logps(ITEMS)[0] for _ in range(2)]
    assert not scorer.packs
    (line,) = caplog.messages
    assert line.startswith("GPT2LMHeadModel: ")
    assert "dropout" in line
    assert (noisy[0] - noisy[1]).abs().min() > 0
    model.eval()
    torch.testing.assert_close(scorer.logps(ITEMS)[0], slow(model, ITEMS), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("each_backend")
class TestFirstUse:
    """The scorer checks by itself whether the model can be packed."""

    def test_in_a_training_pass_it_changes_no_state(self) -> None:
        model = random_model("llama").train()
        scorer = ReplyScorer(model)
        draws: list[Tensor] = []
        model.model.layers[0].register_forward_hook(lambda *_: draws.append(torch.rand(1)))
        before = torch.get_rng_state()
        scorer.costs(ITEMS)
        assert draws  # the model was run
        assert torch.equal(torch.get_rng_state(), before)
        assert all(layer.training for layer in model.modules())
        assert scorer.logps(ITEMS)[0].requires_grad

    def test_costs_are_those_of_the_rows_that_will_be_computed(self) -> None:
        padded = [len(item) * max(len(row.ids) for row in item) for item in ITEMS]
        assert ReplyScorer(random_model("bloom")).costs(ITEMS) == padded
        packed = [packed_tokens(item) for item in ITEMS]
        assert ReplyScorer(random_model("llama")).costs(ITEMS) == packed != padded

    def test_no_items_decide_nothing(self) -> None:
        scorer = ReplyScorer(random_model("bloom"))
        assert scorer.score([], 100).sums.shape == (0, 0)
        assert scorer.packs
        scorer.costs(ITEMS)
        assert not scorer.packs

    @pytest.mark.parametrize(
        ("config", "target"),
        [(CONFIGS["bloom"], "query_key_value"), (OTHERS["qwen3_next"], "q_proj")],
        ids=["bloom", "qwen3_next"],
    )
    def test_merged_policies_are_scored_right(
        self, config: PreTrainedConfig, target: str, tmp_path: Path
    ) -> None:
        """Models that cannot be packed: one refuses, the other would give wrong numbers."""
        build(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "base")
        source = PolicyConfig(path=str(tmp_path / "base"), dtype="float32")
        adapters = {}
        for seed, aspect in enumerate(("helpful", "harmless")):
            lora = {"r": 2, "target_modules": [target], "init_lora_weights": False}
            policy = replace(source, lora=lora).build(CPU, seed)
            adapters[aspect] = tmp_path / aspect
            policy.model.save_pretrained(adapters[aspect])  # type: ignore[operator]
        experiment = replace(Experiment.build(compose(*TINY), Workers(0, 1, CPU)), model=source)
        policy = load_adapters(experiment, adapters)
        model: Any = policy.model
        model.add_weighted_adapter(list(adapters), [0.4, 0.6], "both", combination_type="linear")
        model.set_adapter("both")
        sums = policy.scorer.score(ITEMS, 10**6).sums
        with torch.no_grad():
            expected = slow(model, ITEMS)
        found = torch.cat([row[: len(item)] for row, item in zip(sums, ITEMS, strict=True)])
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.usefixtures("each_backend")
def test_generation_and_padded_rows_use_the_models_own_attention() -> None:
    model = random_model("qwen2")
    ids = torch.tensor([[4, 5, 6]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    scorer = ReplyScorer(model)
    scorer.logps(ITEMS)
    after = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert after.tolist() == before.tolist()
    rows = [row for item in ITEMS for row in item]
    scorer.logps(ITEMS)
    torch.testing.assert_close(scorer.padded_logps(rows)[0], slow(model, ITEMS), rtol=0, atol=2e-5)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 300))
def test_groups_hold_every_index_once_within_the_budget(costs: list[int], budget: int) -> None:
    groups = balanced(costs, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(costs)))
    in_order = [costs[index] for group in groups for index in group]
    assert in_order == sorted(costs, reverse=True)
    sizes = [sum(costs[i] for i in group) for group in groups]
    assert all(size <= budget or len(group) == 1 for size, group in zip(sizes, groups, strict=True))


def test_groups_are_few_and_even() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs = rng.integers(20, 100, 60).tolist()
        sizes = [sum(costs[i] for i in group) for group in balanced(costs, 700)]
        assert len(sizes) <= -(-sum(costs) // 700) + 1
        assert max(sizes) <= 700
