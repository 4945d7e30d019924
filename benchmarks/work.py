"""The work that every contestant is given, and what it costs at least."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mrpo_lab.chat import Item, TokenRow
from mrpo_lab.data.rows import parse_item, read_rows
from mrpo_lab.packing import pack
from mrpo_lab.policy import PolicyConfig

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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def policy(self, lora: bool = True) -> PolicyConfig:
        return PolicyConfig(
            path=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            lora=LORA if lora else None,
        )

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


def flops(model: Any, items: Sequence[tuple[TokenRow, ...]], backward: bool) -> float:
    """Floating point operations that rows with shared prompts need, nothing computed twice: a
    forward pass, and if ``backward`` the gradients of activations and of what is trained."""
    config = model.config.get_text_config()
    parameters = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    # A packed 4-bit weight counts two numbers a byte.
    sizes = [
        (p.numel() * (2 if p.dtype == torch.uint8 else 1), p.requires_grad)
        for n, p in parameters
        if "lm_head" not in n
    ]
    # 2 a weight and token forward, 2 for the activation's gradient, 2 for the weight's own.
    per_token = sum(n * (2 + (4 if trained else 2) * backward) for n, trained in sizes)
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
