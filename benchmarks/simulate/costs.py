"""Operations, time and memory of passes of a model on a card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ConfigDict, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from benchmarks.simulate.layouts import Pass
from benchmarks.simulate.shapes import Cost, Counts, Shape, head_cost
from mrpo_lab.errors import UserError
from mrpo_lab.scoring.backend import GPU

STRICT = ConfigDict(extra="forbid")
CARDS = Path(__file__).with_name("cards.yaml")
GIB = 2**30
BYTES = 2
"""Bytes of a number in bfloat16."""
QUANTIZED = {None: BYTES, "nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes of a linear layer's weight; NF4 has a float32 scale for every 64 of them."""
LORA_BYTES, FULL_BYTES = 4, BYTES
"""Bytes of a trained number: peft keeps LoRA in float32, and all weights train in their dtype."""
WIDE_COPIES = 3
"""Logits in float32 that the softmax holds at once, in chunks."""

Range = tuple[PositiveFloat, PositiveFloat]
"""A favorable and an unfavorable value."""


@checked(frozen=True, config=STRICT)
class Card:
    """A graphics card's numbers, from its data sheet."""

    bf16_tflops: PositiveFloat
    bandwidth_tb_s: PositiveFloat
    memory_gib: PositiveFloat
    source: str


@checked(frozen=True, config=STRICT)
class Assumed:
    """What is assumed of every card; see ``cards.yaml``."""

    matmul_efficiency: Range
    bandwidth_efficiency: Range
    launch_us: Range
    reserved_gib: Range


@checked(frozen=True, config=STRICT)
class Cards:
    """The content of ``cards.yaml``."""

    cards: dict[str, Card]
    assumed: Assumed

    @classmethod
    def read(cls, file: Path = CARDS) -> Cards:
        """
        Raises:
            UserError: the file is not YAML, or has other keys or values than it should.
        """
        try:
            return TypeAdapter(cls).validate_python(yaml.safe_load(file.read_text()))
        except yaml.YAMLError as error:
            raise UserError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(f"{file}: {where}: {problem['msg']}") from error


class Work(NamedTuple):
    """What one or several passes do."""

    tokens: float = 0.0
    flops: float = 0.0
    moved: float = 0.0
    """Bytes that operations other than matrix products read and write, and the weights."""
    launches: float = 0.0

    def __mul__(self, times: Any) -> Work:
        return Work(*(times * value for value in self))

    @staticmethod
    def sum(parts: Iterable[Work]) -> Work:
        return Work(*map(sum, zip(*[Work(), *parts], strict=True)))


class Memory(NamedTuple):
    """Bytes held at once."""

    weights: float
    trained: float
    """LoRA, gradients and the optimizer's states."""
    activations: float
    logits: float


def seconds(work: Work, card: Card, assumed: Assumed) -> Range:
    """How long the work takes, if matrix products reach a share of the card's peak, all else a
    share of its bandwidth, and the next operation is launched while one runs."""
    times = [
        max(
            work.flops / (card.bf16_tflops * 1e12 * products)
            + work.moved / (card.bandwidth_tb_s * 1e12 * bandwidth),
            work.launches * launch * 1e-6,
        )
        for products, bandwidth, launch in zip(
            assumed.matmul_efficiency, assumed.bandwidth_efficiency, assumed.launch_us, strict=True
        )
    ]
    return times[0], times[1]


@dataclass(frozen=True)
class Model:
    """A model and how it is run."""

    shape: Shape
    quantization: str | None = None
    checkpointing: bool = False
    adam_bytes: float = 8.0
    """Bytes of the optimizer's two states for each trained number: 2 for the 8-bit AdamW."""

    def score(self, passes: Sequence[Pass]) -> Work:
        """Forward passes without gradients."""
        head = head_cost(training=False, trained=False)
        return Work.sum(self._pass(p, self.shape.scoring, 1, 1, head) for p in passes)

    def step(self, passes: Sequence[Pass]) -> Work:
        """An optimizer step: forward and backward passes and the optimizer."""
        shape = self.shape
        cost, reads = (shape.checkpointed, 3) if self.checkpointing else (shape.training, 2)
        # Twice for frozen logits and their gradient; trained ones are computed again, and for two
        # gradients.
        products = 4 if shape.head_trained else 2
        head = head_cost(training=True, trained=shape.head_trained)
        update = Work(moved=7 * shape.trained * self._trained_bytes, launches=10)
        trained = (self._pass(p, cost, reads, products, head) for p in passes)
        return Work.sum([update, *trained])

    def memory(self, passes: Sequence[Pass], training: bool) -> Memory:
        """Most memory held at once, without what the libraries reserve."""
        shape, tokens = self.shape, max(p.tokens for p in passes)
        replies = max(p.replies for p in passes)
        weights = shape.linear * QUANTIZED[self.quantization]
        weights += (shape.parameters - shape.linear) * BYTES
        logits = min(replies * shape.vocabulary, GPU.logits_at_once) * BYTES
        wide = min(replies * shape.vocabulary, GPU.softmax_at_once) * 4 * WIDE_COPIES
        trained = saved = 0.0
        if training:
            saved = shape.training.token.saved
            if self.checkpointing:  # the inputs of all layers, and the activations of one at a time
                saved = shape.checkpointed.token.saved + saved / shape.layers
            saved += 2 * shape.hidden * BYTES * replies / tokens
            own = self._trained_bytes if shape.lora else 0  # else they are the model's weights
            trained = shape.trained * (own + self._trained_bytes + self._state_bytes)
        activations = tokens * (saved + shape.scoring.token.peak)
        return Memory(weights, trained, activations, logits + wide)

    @property
    def _trained_bytes(self) -> int:
        return LORA_BYTES if self.shape.lora else FULL_BYTES

    @property
    def _state_bytes(self) -> float:
        """The optimizer's states have the dtype of what is trained, if they are not in 8 bits."""
        return min(self.adam_bytes, 2 * self._trained_bytes)

    def _pass(self, p: Pass, cost: Cost, reads: int, products: int, head: Counts) -> Work:
        """
        Args:
            reads: how often each weight is read.
            products: how often logits, or gradients of their size, are computed.
        """
        shape = self.shape
        logits = p.replies * shape.vocabulary
        chunks = -(-logits // GPU.logits_at_once)
        weight = QUANTIZED[self.quantization]
        if self.quantization:  # written in 16 bits, and read again
            weight += 2 * BYTES
        output = shape.vocabulary * shape.hidden * BYTES * products * chunks
        return Work(
            p.tokens,
            p.tokens * cost.token.flops
            + p.pairs * cost.pair.flops
            + 2 * products * logits * shape.hidden,
            p.tokens * cost.token.moved
            + cost.once.moved
            + reads * shape.linear * weight
            + logits * head.moved
            + output,
            cost.launches + head.launches * chunks * GPU.logits_at_once // GPU.softmax_at_once,
        )
