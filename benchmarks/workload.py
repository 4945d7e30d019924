"""The work that all programs are measured on, and the operations that it needs at least."""

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

from mrpo_lab.data.reading import read_rows
from mrpo_lab.data.rows import parse_item
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
class Workload:
    """Pairs of a file, a model, and how the model is trained or scored on them."""

    data: str
    model: str
    dtype: str
    max_tokens: int
    """Pairs with a longer prompt and reply are left out."""
    batch: int
    """Number of pairs in a step."""
    steps: int
    """Number of timed steps; one that is not timed precedes them."""
    threads: int
    quantization: str | None = None
    gradient_checkpointing: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def policy(self, lora: bool = True) -> PolicyConfig:
        """The model as this project loads it."""
        return PolicyConfig(
            path=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            lora=LORA if lora else None,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def quantized(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that quantize the model as ``policy`` does."""
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
        """Texts and token rows of the first pairs of the file that fit, as many as are needed.

        Raises:
            SystemExit: the file has too few.
        """
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
        """Name of the data."""
        return Path(self.data).name.split(".")[0]


def measure(name: str, size: int, work: Workload) -> dict[str, Any]:
    """Run one of ``MEASUREMENTS`` in a process of its own; the numbers that it prints.

    Raises:
        SystemExit: the process failed; with its errors.
    """
    print(f"{work.name()} {work.dtype}: {name} {size} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measurements", name, str(size), work.to_json()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def linear_weights(model: Any) -> list[tuple[int, bool]]:
    """Number of weights of each matrix product except the head's, and whether they are trained."""
    return [
        # Two 4-bit weights are packed into a byte.
        (p.numel() * (2 if p.dtype == torch.uint8 else 1), p.requires_grad)
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]


def plain_flops(model: Any, items: Sequence[tuple[TokenRow, ...]], each: int) -> float:
    """``each`` operations per weight and token, of every row separately.

    Attention, head and padding do not count. The convention is 2 for a forward pass and 4 with a
    backward pass through frozen weights.
    """
    tokens = sum(len(row.ids) for rows in items for row in rows)
    return float(each * tokens * sum(number for number, _ in linear_weights(model)))


def flops(model: Any, items: Sequence[tuple[TokenRow, ...]], backward: bool) -> float:
    """Floating point operations that the items need if every prompt is computed once.

    A forward pass and, if ``backward``, the gradients of activations and of trained weights.
    """
    config = model.config.get_text_config()
    # Per weight and token: 2 forward, 2 for the activation's gradient, 2 for the weight's gradient.
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
    """Seconds of each of ``step(1)`` to ``step(steps)``; ``step(0)`` comes first, not counted."""
    seconds = []
    for number in range(steps + 1):
        wait(device)
        began = time.perf_counter()
        step(number)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib() -> float:
    """Peak memory of this process in GiB: on the GPU if there is one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak() -> None:
    """Let ``peak_gib`` start anew, on a GPU; main memory's peak cannot be reset."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """Operations per second of the fastest of several large matrix products.

    Args:
        seconds: time for products of one size. Some processors have no fast bfloat16 and take
            minutes for a large product, so no size follows one whose first product took longer.
    """
    best = 0.0
    sizes = (256, 512, 1024, 2048) if device.type == "cpu" else (4096, 8192, 16384)
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        first, took = time.perf_counter(), 0.0
        while time.perf_counter() - first < seconds:
            wait(device)
            began = time.perf_counter()
            a @ b
            wait(device)
            took = time.perf_counter() - began
            best = max(best, 2 * size**3 / took)
        if took > seconds:
            break
    return best
