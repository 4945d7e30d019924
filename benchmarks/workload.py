"""The work that every contestant is given, and what it costs at least."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mrpo_lab.data.rows import parse_item, read_rows
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.models.policy import PolicyConfig
from mrpo_lab.scoring.packing import pack
from mrpo_lab.training.workers import Workers

LORA: dict[str, Any] = {
    "r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}
BETA = 0.1


@dataclass(frozen=True)
class Work:
    """Pairs of a file, a model and how both are taken."""

    data: str
    model: str
    dtype: str
    max_tokens: int
    batch: int
    steps: int
    """Timed, after one that is not."""
    threads: int
    quantization: str | None = None
    gradient_checkpointing: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def policy(self, lora: bool = True) -> PolicyConfig:
        return PolicyConfig(
            path=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            lora=LORA if lora else None,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def quantized(self) -> dict[str, Any]:
        """What ``from_pretrained`` wants to load the model as ``policy`` does."""
        if self.quantization is None:
            return {}
        from transformers import BitsAndBytesConfig

        assert self.quantization == "nf4"
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, self.dtype),
        )
        return {"quantization_config": config, "device_map": {"": Workers.start().device}}

    def pairs(self) -> tuple[list[Item], list[tuple[TokenRow, ...]]]:
        """(texts, token rows) of as many pairs as are needed: the file's first that fit."""
        tokenization = self.policy().tokenization
        items: list[Item] = []
        rows: list[tuple[TokenRow, ...]] = []
        for where, row in read_rows(self.data):
            item = parse_item(row, where)
            (found,) = tokenization.rows([item])
            if (
                found is not None
                and max(len(r.ids) for r in found) <= self.max_tokens
                and all(reply.strip() for reply in item.replies)
                and len(set(item.replies)) == len(item.replies)
            ):
                items.append(item)
                rows.append(found)
            if len(rows) == self.batch * (self.steps + 1):
                return items, rows
        raise SystemExit(f"{self.data} has only {len(rows)} pairs that fit: lower steps")

    def name(self) -> str:
        return Path(self.data).name.split(".")[0]


def measure(who: str, size: int, work: Work) -> dict[str, Any]:
    """What a contestant prints last, in a fresh process.

    Raises:
        SystemExit: it failed, with what it said.
    """
    print(f"{work.name()} {work.dtype}: {who} {size} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measurements", who, str(size), work.to_json()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{who}: {done.stderr[-3000:]}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def linear_weights(model: Any) -> list[tuple[int, bool]]:
    """(number, whether trained) of the weights in each product but the head's."""
    return [
        # A packed 4-bit weight counts two numbers a byte.
        (p.numel() * (2 if p.dtype == torch.uint8 else 1), p.requires_grad)
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]


def plain_flops(model: Any, items: Sequence[tuple[TokenRow, ...]], each: int) -> float:
    """``each`` operations a weight and token of every row by itself: neither attention nor head
    nor padding counts. By custom 2 for a forward pass, 4 with LoRA's backward pass."""
    tokens = sum(len(row.ids) for rows in items for row in rows)
    return float(each * tokens * sum(number for number, _ in linear_weights(model)))


def flops(model: Any, items: Sequence[tuple[TokenRow, ...]], backward: bool) -> float:
    """Floating point operations that rows with shared prompts need, nothing computed twice: a
    forward pass, and if ``backward`` the gradients of activations and of what is trained."""
    config = model.config.get_text_config()
    # 2 a weight and token forward, 2 for the activation's gradient, 2 for the weight's own.
    per_token = sum(
        n * (2 + (4 if trained else 2) * backward) for n, trained in linear_weights(model)
    )
    layout = pack(items, torch.device("cpu")).layout
    seen = sum(s.length * s.prefix + s.length * (s.length + 1) // 2 for s in layout.segments)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    passes = 3 if backward else 1
    attention = 4 * seen * width * config.num_hidden_layers * passes
    replies = sum(row.reply_tokens for rows in items for row in rows)
    head = 2 * replies * config.vocab_size * config.hidden_size * (2 if backward else 1)
    return float(layout.tokens * per_token + attention + head)


def timed(step: Callable[[int], object], steps: int, device: torch.device) -> list[float]:
    """Seconds of each call of ``step`` with 1 ... steps, after one with 0 that is not counted."""
    seconds = []
    for number in range(steps + 1):
        wait(device)
        began = time.perf_counter()
        step(number)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib() -> float:
    """Most memory this process ever held: on the GPU if there is one, else all of it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak() -> None:
    """Let ``peak_gib`` count from now on, where that can be: on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of the fastest of a few large products: what the hardware can do here."""
    best = 0.0
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192, 16384)
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(12):
            wait(device)
            began = time.perf_counter()
            a @ b
            wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
