"""The policy, the model that is trained: all weights, LoRA, or LoRA on quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mrpo_lab.data.texts import Message
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.models.weights import ModelSource
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

    def build(self, device: torch.device, seed: int) -> Policy:
        """Load the weights on ``device``; ``seed`` initializes LoRA.

        Raises:
            UserError: the weights cannot be loaded, or peft refuses ``lora``.
        """
        model: Any = self.read(device)
        if self.lora is None:
            model.requires_grad_(True)
        else:
            model = _with_lora(model.requires_grad_(False), self.lora, seed)
        model = self.fused(model.eval())
        if self.gradient_checkpointing:
            base = model.get_base_model() if self.lora is not None else model
            base.activation_checkpointing_enable({"use_reentrant": False})
        return Policy(model, self.tokenization, self.kernels)


def _with_lora(model: nn.Module, lora: dict[str, Any], seed: int) -> nn.Module:
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            config = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
            adapted: nn.Module = peft.get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise UserError(f"model.lora: {first_line(error)}") from error
    return adapted


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
        self.tokenization.format.tokenizer.save_pretrained(folder)

    def generate(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Greedy replies, one prompt at a time."""
        tokenizer = self.tokenization.format.tokenizer
        model: Any = self.model
        replies = []
        with evaluating(model):
            for prompt in prompts:
                text = self.tokenization.format.prompt_text(prompt)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                ids = ids.to(self.scorer.device)
                output: Tensor = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
                )
                new_tokens = output[0, ids.shape[1] :]
                replies.append(str(tokenizer.decode(new_tokens, skip_special_tokens=True)))
        return replies
