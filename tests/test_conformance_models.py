"""Every architecture: saved, loaded by the project, and scored as plain transformers scores it.

Weights are random and tiny. For each, a checkpoint that lacks a tensor and a text that is longer
than the model are refused.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packing import items_of
from test_scoring import build
from transformers import AutoConfig, AutoModelForCausalLM
from whole_logits import VOCABULARY, slow_score

from mrpo_lab.data.texts import TokenRow
from mrpo_lab.errors import UserError
from mrpo_lab.models.references import Reference
from mrpo_lab.scoring.scorer import ReplyScorer

CPU = torch.device("cpu")
POSITIONS = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("linear_num_value_heads", "state_size", "sliding_window"), 4),
    **dict.fromkeys(("linear_num_key_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "bos_token_id"), 1),
    "word_embed_proj_dim": 32,
    "is_decoder": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Values of the keys that configurations have; each model is given those that its own has."""
ARCHITECTURES = (
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "bert",
    "biogpt",
    "bitnet",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "diffllama",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "llama4_text",
    "mamba",
    "minimax",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "roberta",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
    "xglm",
)
WITHOUT = {"falcon": ("head_dim",)}
"""Keys that a configuration has and does not accept."""
MIXED: dict[str, dict[str, list[str]]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}
"""Kinds of the two layers, where the usual first two are of one kind."""
ITEMS = items_of((9, 4, 7), (20, 12, 1), (6, 2, 9, 5, 1))


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved model of this architecture."""
    known = AutoConfig.for_model(request.param)
    keys = {key for key in SIZES if hasattr(known, key)} - set(WITHOUT.get(request.param, ()))
    sizes = {key: SIZES[key] for key in keys}
    config = AutoConfig.for_model(request.param, **sizes, **MIXED.get(request.param, {}))
    model = build(AutoModelForCausalLM.from_config(config))
    assert sum(parameter.numel() for parameter in model.parameters()) < 2 * 10**5
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_architecture(folder: Path) -> None:
    reference = Reference(slug="one", path=str(folder), dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [row for item in ITEMS for row in item]
    with torch.no_grad():
        expected = torch.stack([slow_score(plain, row) for row in rows])
        scorer = ReplyScorer(reference.load(CPU))
        packed_where_it_can_be, counts = scorer.logps(ITEMS)
        padded, _ = scorer.padded_logps(rows)
    assert counts.tolist() == [row.reply_tokens for row in rows]
    torch.testing.assert_close(packed_where_it_can_be, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-4)
    refuses_longer_texts(scorer, plain)
    refuses_missing_tensors(folder)


def refuses_longer_texts(scorer: ReplyScorer, plain: Any) -> None:
    if scorer.positions is None:
        assert plain.config.model_type in ("bloom", "mamba", "recurrent_gemma")
        return
    fitting, longer = (
        TokenRow(np.full(scorer.positions + more, 5, dtype=np.int32), 3) for more in (0, 1)
    )
    with torch.no_grad():
        assert torch.isfinite(scorer.padded_logps([fitting])[0]).all()
        with pytest.raises(UserError, match=rf"and the model has {scorer.positions} positions"):
            scorer.padded_logps([longer])


def refuses_missing_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    bare = shutil.copytree(folder, folder.parent / "bare")
    reference = Reference(slug="one", path=str(bare), dtype="float32")
    for name in (min(tensors), max(tensors)):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(rest, bare / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"lacks \d+ of the model's tensors: "):
            reference.load(CPU)
