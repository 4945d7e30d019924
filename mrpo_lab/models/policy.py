"""The policy, the model that is trained: all weights, LoRA, or LoRA on quantized weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mrpo_lab.data.texts import Message
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.models.adapters import lora_config, with_lora
from mrpo_lab.models.weights import ModelSource
from mrpo_lab.scoring.memory import fitting
from mrpo_lab.scoring.scorer import ReplyScorer, evaluating


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(ModelSource):
    """The keys of ``conf/model``: which weights to start from, and how to train them."""

    lora: dict[str, Any] | None = None
    """Keys of peft's LoraConfig; null trains all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization and not self.lora:
            raise ValueError("quantized weights cannot be trained: set lora, or quantization=null")
        if self.adapter:
            raise ValueError(
                "adapter: training continues from full weights; merge the adapter first"
            )

    @property
    def name(self) -> str:
        return "policy"

    def check(self) -> None:
        super().check()
        self.check_trainable()

    def check_trainable(self) -> None:
        """Check that the settings fit the weights as they are stored.

        Raises:
            UserError: the weights are stored quantized and ``lora`` is null; or see
                ``lora_config``.
        """
        if self.lora is not None:
            lora_config(self.lora)
        elif self.quantized:
            raise UserError(
                f"model: the weights of {self.path} are stored quantized and cannot be trained: "
                "set model.lora, or use the full weights"
            )

    def build(self, device: torch.device, seed: int) -> Policy:
        """Load the weights on ``device``; ``seed`` initializes LoRA.

        Raises:
            UserError: the weights cannot be loaded, or peft refuses ``lora``.
        """
        self.check_trainable()
        model: Any = self.read(device)
        if self.lora is None:
            model.requires_grad_(True)
        else:
            model = with_lora(model.requires_grad_(False), self.lora, seed)
        model = self.fused(model.eval())
        if self.gradient_checkpointing:
            base = model.get_base_model() if self.lora is not None else model
            base.activation_checkpointing_enable({"use_reentrant": False})
        return Policy(model, self.tokenization, self.kernels)


class Policy:
    """A model to train, its tokenizer, and its scorer."""

    def __init__(self, model: nn.Module, tokenization: Tokenization, kernels: str = "auto") -> None:
        self.model = model
        self.tokenization = tokenization
        self.scorer = ReplyScorer(model, kernels)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates and a checkpoint holds, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Any) -> None:
        """Write the adapter, or the full model, and the tokenizer, as peft and transformers do."""
        model: Any = self.model
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer = copy(self.tokenization.format.tokenizer)
        if self.tokenization.template:  # what the policy was trained with, not the model's own
            tokenizer.chat_template = self.tokenization.format.template
        # Loading set it out of the way; see ``load_format``.
        tokenizer.model_max_length = tokenizer.init_kwargs.get("model_max_length", int(1e30))
        tokenizer.save_pretrained(folder)

    def generate(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Greedy replies, one prompt at a time, that end where the model's positions do.

        Raises:
            UserError: a reply does not fit into memory.
        """
        tokenizer = self.tokenization.format.tokenizer
        model: Any = self.model
        replies = []
        advice = "lower train.sample_tokens, or set train.samples=0"
        with fitting("answering a test prompt", advice), evaluating(model):
            for prompt in prompts:
                text = self.tokenization.format.prompt_text(prompt)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                ids = ids.to(self.scorer.device)
                room = (self.scorer.positions or sys.maxsize) - ids.shape[1]
                if room < 1:
                    replies.append("")
                    continue
                output: Tensor = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(max_new_tokens, room),
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
                )
                new_tokens = output[0, ids.shape[1] :]
                replies.append(str(tokenizer.decode(new_tokens, skip_special_tokens=True)))
        return replies
