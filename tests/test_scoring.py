"""Scores of replies against a plain float64 log-softmax over the model's own whole logits."""

import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import reply_logprob
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from whole_logits import (
    EOS,
    VOCABULARY,
    assert_same_gradient,
    gradient,
    random_rows,
    slow_score,
    weighted,
    whole_logits,
)

from mrpo_lab.data.chat import load_format
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.embedded.synthetic import synthetic_rows
from mrpo_lab.scoring.backend import CPU
from mrpo_lab.scoring.padding import Side, collate
from mrpo_lab.scoring.scorer import ReplyScorer

SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
SHAPE: dict[str, Any] = SPECIAL | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
OLD = SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GROUPED, sliding_window=5),  # shorter than most rows
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "phi3": Phi3Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=5, final_logit_softcapping=0.5),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "granite": GraniteConfig(**GROUPED, logits_scaling=4.0),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.25),
    "cohere2": Cohere2Config(**GROUPED, logit_scale=4.0, sliding_window=5),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "gpt2": GPT2Config(**OLD, n_positions=128, attn_pdrop=0.3, resid_pdrop=0.3),
    "bloom": BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4),
    "opt": OPTConfig(**SHAPE, word_embed_proj_dim=16, ffn_dim=48),
}
SIDES: tuple[Side, ...] = ("right", "left")


def build(model: Any) -> Any:
    """``model`` with random weights, larger than an initialization, so that mistakes show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def random_model(name: str) -> Any:
    return build(AutoModelForCausalLM.from_config(CONFIGS[name]))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CONFIGS)
class TestAgainstWholeLogits:
    def test_values(self, name: str, side: Side, caplog: pytest.LogCaptureFixture) -> None:
        model, rows = random_model(name), random_rows()
        with torch.no_grad():
            sums, counts = ReplyScorer(model).padded_logps(rows, side)
            for row, found, count in zip(rows, sums, counts, strict=True):
                logits = whole_logits(model, row)[row.start - 1 : -1].tolist()
                expected = reply_logprob(logits, row.ids[row.start :].tolist())
                assert float(found) == pytest.approx(expected, abs=2e-5)
                assert int(count) == len(row.ids) - row.start
        assert sums.dtype == torch.float64
        ours = [record for record in caplog.records if record.name == "mrpo_lab.scoring.scorer"]
        assert not ours  # no family of these needs its whole logits

    def test_gradients_of_a_batch_are_those_of_its_rows(self, name: str, side: Side) -> None:
        model, rows = random_model(name), random_rows()
        expected = gradient(model, weighted(torch.stack([slow_score(model, r) for r in rows])))
        found = gradient(model, weighted(ReplyScorer(model).padded_logps(rows, side)[0]))
        assert_same_gradient(found, expected)


def test_the_configurations_do_what_they_are_here_for() -> None:
    """Without its window, its cap or its scale a model gives other numbers."""
    without: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": 64},
        "gemma2": {"final_logit_softcapping": None},
        "granite": {"logits_scaling": 1.0},
        "cohere": {"logit_scale": 1.0},
    }
    (row,) = random_rows([(23, 9)])
    for name, change in without.items():
        config = deepcopy(CONFIGS[name])
        config.update(change)
        plain = build(AutoModelForCausalLM.from_config(config))
        with torch.no_grad():
            difference = slow_score(plain, row) - slow_score(random_model(name), row)
        assert abs(float(difference)) > 0.01, name


@pytest.mark.parametrize("side", SIDES)
def test_seven_real_models(tiny7_dir: Path, side: Side) -> None:
    texts = list(synthetic_rows(3, seed=5))
    prompts = [({"role": "user", "content": text["prompt"]},) for text in texts]
    items = [
        Item(prompt, (text["chosen"], text["rejected"], ""))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    folders = sorted(tiny7_dir.iterdir())
    assert len(folders) == 7
    for folder in folders:
        chat = load_format(folder.name, folder)
        rows = [row for item in chat.rows(items) for row in item or ()]
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            sums, counts = ReplyScorer(model).padded_logps(rows, side)
            expected = torch.stack([slow_score(model, row) for row in rows])
        torch.testing.assert_close(sums, expected, rtol=0, atol=1e-4)
        assert counts.tolist() == [row.reply_tokens for row in rows]
        assert counts.min() >= 1  # the end of turn of the empty reply
        per_token = sums[:2] / counts[:2]
        assert -4 < float(per_token.mean()) < -0.1, folder.name  # they know this language


@pytest.mark.parametrize("side", SIDES)
def test_padding_is_known_by_position_and_not_by_token(side: Side) -> None:
    model = random_model("llama")
    quiet = TokenRow(np.array([1, 5, EOS, EOS, EOS], dtype=np.int32), 2)
    (longer,) = random_rows([(12, 3)])
    with torch.no_grad():
        sums, counts = ReplyScorer(model).padded_logps([quiet, longer], side)
        expected = slow_score(model, quiet)
    assert counts.tolist() == [3, 9]
    assert float(sums[0]) == pytest.approx(float(expected), abs=2e-5)


def test_collate_places_rows_on_either_side() -> None:
    rows = [TokenRow(np.array([7, 8, 9], dtype=np.int32), 1), TokenRow(np.array([4, 5]), 1)]
    right = collate(rows, torch.device("cpu"), "right")
    left = collate(rows, torch.device("cpu"), "left")
    assert right.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert left.input_ids[1, 1:].tolist() == right.input_ids[1, :2].tolist() == [4, 5]
    assert left.position_ids.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert right.is_reply.tolist() == [[False, True, True], [False, True, False]]
    assert left.is_reply.tolist() == [[False, True, True], [False, False, True]]


class TestMemory:
    def watch(self, model: Any) -> list[torch.Size]:
        """A list that collects the shapes of the head's outputs."""
        shapes: list[torch.Size] = []
        model.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output: shapes.append(output.shape)
        )
        return shapes

    def test_the_head_meets_reply_positions_only_a_chunk_at_a_time(self) -> None:
        model, rows = random_model("llama"), random_rows([(40, 30), (35, 33), (50, 39)])
        scorer = ReplyScorer(model, backend=CPU._replace(logits_at_once=5 * VOCABULARY + 3))
        scorer.costs([tuple(rows)])  # the first use compares packed with padded rows
        with torch.no_grad():
            scorer.padded_logps(rows)  # and with rows that are padded without a mask
        shapes = self.watch(model)
        weighted(scorer.padded_logps(rows)[0]).backward()
        # 10 + 2 + 11 positions, forward and again for the backward pass.
        assert sorted(shapes) == sorted([(5, VOCABULARY)] * 8 + [(3, VOCABULARY)] * 2)
        shapes.clear()
        scorer.score([tuple(rows)], token_budget=10**6)
        assert sorted(shapes) == sorted([(5, VOCABULARY)] * 4 + [(3, VOCABULARY)])

    @pytest.mark.parametrize("name", ["gemma2", "cohere"])
    def test_chunks_change_neither_values_nor_gradients(self, name: str) -> None:
        model, rows = random_model(name), random_rows()
        scorer = ReplyScorer(model)
        sums = scorer.padded_logps(rows)[0]
        whole = gradient(model, weighted(sums))
        for size, wide in ((1, 1), (4, 3), (1000, 5)):
            chunks = CPU._replace(
                logits_at_once=size * VOCABULARY, softmax_at_once=wide * VOCABULARY
            )
            scorer = ReplyScorer(model, backend=chunks)
            pieces = scorer.padded_logps(rows)[0]
            with torch.no_grad():
                found = scorer.padded_logps(rows)[0]
            torch.testing.assert_close(found, sums, rtol=0, atol=1e-5)
            torch.testing.assert_close(pieces, sums, rtol=0, atol=1e-5)
            assert_same_gradient(gradient(model, weighted(pieces)), whole)


class Peculiar(LlamaForCausalLM):
    """A model whose configuration does not say what it does to its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits - output.logits.abs()
        return output


@pytest.mark.parametrize("side", SIDES)
def test_an_unknown_head_is_noticed_and_scored_all_the_same(
    side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = build(Peculiar(LlamaConfig(**GROUPED))), random_rows()
    with caplog.at_level(logging.INFO, logger="mrpo_lab"):
        scorer = ReplyScorer(model)
        sums = scorer.padded_logps(rows, side)[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Peculiar computes its logits in a way of its own" in caplog.text
    expected = torch.stack([slow_score(model, row) for row in rows])
    torch.testing.assert_close(sums, expected, rtol=0, atol=2e-5)
    wanted = gradient(model, weighted(expected))
    assert_same_gradient(gradient(model, weighted(sums)), wanted)


class TestScore:
    def test_the_token_budget_changes_nothing(self) -> None:
        model = random_model("gpt2")
        lengths = [(5, 2), (30, 7), (9, 8), (22, 1), (5, 4), (17, 16), (30, 20), (3, 1)]
        rows = random_rows(lengths)
        pairs = [(rows[i], rows[i + 1]) for i in range(0, len(rows), 2)]
        with torch.no_grad():
            expected = torch.stack([slow_score(model, row) for row in rows]).view(-1, 2)
        for budget in (1, 70, 10**6):
            heard: list[int] = []
            scores = ReplyScorer(model).score(pairs, budget, heard.append)
            torch.testing.assert_close(scores.sums, expected, rtol=0, atol=2e-5)
            assert scores.counts.tolist() == [[3, 23], [1, 21], [1, 1], [10, 2]]
            assert sum(heard) == len(rows)
            assert (len(heard) == len(pairs)) == (budget == 1)
            assert (len(heard) == 1) == (budget == 10**6)

    def test_no_dropout_no_gradient_and_the_mode_is_put_back(self) -> None:
        model, rows = random_model("gpt2"), random_rows()
        with torch.no_grad():
            expected = [float(slow_score(model, row)) for row in rows]
        scorer = ReplyScorer(model.train())
        scores = scorer.score([tuple(rows)], 10**6)
        assert scores.sums[0].tolist() == pytest.approx(expected, abs=2e-5)
        assert not scores.sums.requires_grad
        assert model.training
        noisy = scorer.padded_logps(rows)[0]
        assert noisy.tolist() != pytest.approx(expected, abs=1e-2)  # in training it does act


def test_a_row_without_a_reply_counts_nothing() -> None:
    (row,) = random_rows([(8, 3)])
    sums, counts = ReplyScorer(random_model("llama")).padded_logps([row, replace(row, start=8)])
    assert (counts.tolist(), sums.tolist()[1]) == ([5, 0], 0.0)
