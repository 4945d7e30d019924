"""Models with random weights in the shape of real ones, and pairs of random letters: no hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2Tokenizer,
)

QWEN_HALF_B = Qwen2Config(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=True,
)
"""The shape of Qwen2.5-0.5B."""
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    tie_word_embeddings=False,
)
"""The shape of Llama 3.1 8B."""
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}" + START + "{{ m.role[0] + m.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + START + "a{% endif %}"
)
TEMPLATE_TOKENS = 6
"""Number of tokens that the template adds to a prompt and a reply."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def toy(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture, small enough for a test on a CPU."""
    small: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return type(config)(**small)


def write_model(config: PreTrainedConfig, folder: Path, device: torch.device) -> None:
    """Write random weights in bfloat16, and a tokenizer with one token per letter."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    # Without merges every byte stays a token.
    vocabulary = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Profile:
    """Log-normal lengths of prompts and replies, invented to resemble a data set, not drawn from
    it."""

    name: str
    prompt: float
    """Median number of tokens of a prompt."""
    reply: float
    """Median number of tokens of a reply."""
    prompt_spread: float
    """Standard deviation of the logarithm of a prompt's length."""
    reply_spread: float
    """Standard deviation of the logarithm of a reply's length."""
    batch: int
    """Number of pairs in an optimizer step of the protocol."""
    minutes: float
    """The target: most minutes that a trial may take on one GPU."""
    resembles: str
    """The data set on the hub."""

    def write(self, file: Path, pairs: int, longest: int, scale: float) -> None:
        """Write ``pairs`` pairs of at most ``longest`` tokens as JSON lines, with all lengths
        multiplied by ``scale``."""
        rng = np.random.default_rng(0)
        with file.open("w") as lines:
            for lengths in self.lengths(rng, pairs, longest - TEMPLATE_TOKENS, scale):
                texts = ["".join(rng.choice([*LETTERS], length)) for length in lengths]
                pair = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
                lines.write(json.dumps(pair) + "\n")

    def lengths(
        self, rng: np.random.Generator, pairs: int, longest: int = 1024, scale: float = 1.0
    ) -> Iterator[list[int]]:
        """Numbers of tokens of ``pairs`` pairs, each of the prompt and of both replies, whose sum
        with the longer reply is at most ``longest``; drawn from the profile times ``scale``."""
        medians = np.array([self.prompt, self.reply, self.reply])
        spreads = np.array([self.prompt_spread, self.reply_spread, self.reply_spread])
        while pairs:
            drawn = np.exp(rng.normal(np.log(medians * scale), spreads)).astype(int) + 1
            if drawn[0] + drawn[1:].max() <= longest:
                pairs -= 1
                yield drawn.tolist()


PROFILES = (
    Profile(
        *("saferlhf-like", 25, 75, 0.6, 0.6),
        batch=50,
        minutes=2,
        resembles="RLHFlow/PKU-SafeRLHF-30K-standard",
    ),
    Profile(
        *("ultrafeedback-like", 100, 250, 1.0, 0.7),
        batch=25,
        minutes=6,
        resembles="HuggingFaceH4/ultrafeedback_binarized",
    ),
)
