"""Log-probabilities of replies: the one place where a model's forward pass is run.

Policy and references, training, evaluation and the store all come through ``ReplyScorer``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mrpo_lab.data.texts import Replies, TokenRow
from mrpo_lab.errors import first_line
from mrpo_lab.objective.scores import Scores, per_prompt
from mrpo_lab.scoring import attention
from mrpo_lab.scoring.head import Head, log_softmax_at, widened
from mrpo_lab.scoring.packing import (
    ONE,
    Multiples,
    balanced,
    longest_and_median,
    pack,
    packed_tokens,
)

Side = Literal["left", "right"]

logger = logging.getLogger(__name__)

SAME = 1e-3
"""Mean nats per token within which packed and separate rows agree in float32, and ..."""
SAME_16_BIT = 0.1
"""... in 16 bits, whose rounding differs with the shape of every product: by 0.02 in SmolLM2, where
single tokens differ by 0.3 and both ways are as far from float32."""

FEW_SHAPES = Multiples(item=8, pack=64)
"""Of packs in 16 bits. There oneDNN makes a kernel of its own for every shape of a product, and
keeps a thousand: 2 ms and 0.7 MB each."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token rows; position 0 of a reply is where ``is_reply`` first holds."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    is_reply: Bool[Tensor, "B T"]


def collate(rows: Sequence[TokenRow], device: torch.device, side: Side = "right") -> Batch:
    """Token rows as tensors. Padding is known by position, never by token id: in many models the
    padding token is the end-of-turn token, which counts."""
    width = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    reply = np.zeros_like(ids, dtype=bool)
    for i, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row.ids)
        ids[i, first : first + len(row.ids)] = row.ids
        mask[i, first : first + len(row.ids)] = 1
        reply[i, first + row.start : first + len(row.ids)] = True
    positions = (mask.cumsum(-1) - 1).clip(min=0)
    tensors = [torch.from_numpy(array).to(device) for array in (ids, mask, positions, reply)]
    return Batch(*tensors)


class ReplyScorer:
    """A causal language model and how its reply log-probabilities are computed.

    On a CPU items are packed: each prompt once, no padding. A model whose attention cannot do
    that, as ``check_packing`` finds, and all models on a GPU, are given padded rows.
    """

    def __init__(self, model: Any) -> None:
        """``model``: a transformers causal LM, or a peft model around one."""
        self.model = model
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self._causal = causal
        for layer in causal.modules():
            # On some CPUs bitsandbytes packs 4-bit weights when they are first evaluated. That
            # rounds, fails on some widths, and from then on no gradient passes through them.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        config = causal.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1
        )
        softcap = getattr(config, "final_logit_softcapping", None)
        head = Head(causal.get_output_embeddings(), int(config.vocab_size), float(scale), softcap)
        self._head: Head | None = head if self._is_right(head) else None
        if self._head is None:
            logger.warning(
                "%s computes its logits in a way of its own: whole logits are held in memory",
                type(causal).__name__,
            )
        # Attention by blocks is for processors: a GPU's fused kernels want padded rows.
        self.packs = self._head is not None and self.device.type == "cpu"
        if self.packs:
            attention.install(config)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._causal.parameters()).device
        return device

    def cost(self, item: Replies) -> int:
        """Tokens that an item takes, computed and held."""
        if self.packs:
            return packed_tokens(item)
        return len(item) * max(len(row.ids) for row in item)

    def logps(
        self, items: Sequence[Replies]
    ) -> tuple[Float[Tensor, " replies"], Int[Tensor, " replies"]]:
        """(sum of reply token log-probabilities in nats, number of reply tokens) of all replies of
        all items, one after the other; differentiable. One forward pass.

        The full (N, V) logits are never held: only reply positions meet the head, a few at a time.
        """
        if self.packs:
            try:
                return self._packed_logps(items)
            except NotImplementedError as error:
                self._stop_packing(str(error))
        return self.padded_logps([row for item in items for row in item])

    def _packed_logps(self, items: Sequence[Replies]) -> tuple[Tensor, Tensor]:
        multiples = FEW_SHAPES if self._causal.dtype.itemsize == 2 else ONE
        packed = pack(items, self.device, multiples)
        hidden = self._causal.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # Four axes: taken by transformers for a mask that is ready, so it makes none.
            attention_mask=torch.ones(1, 1, 1, 1, device=self.device),
            layout=packed.layout,
            use_cache=False,
        ).last_hidden_state[0]
        assert self._head is not None
        token_logps = self._head.token_logps(hidden[packed.predictors], packed.targets)
        sums = torch.zeros(len(packed.counts), dtype=torch.float64, device=self.device)
        sums = sums.index_add(0, packed.owners, token_logps.double())
        return sums[packed.replies], packed.counts[packed.replies]

    def padded_logps(
        self, rows: Sequence[TokenRow], side: Side = "right"
    ) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """The same of separate rows, padded to one length: what every model can do."""
        batch = collate(rows, self.device, side)
        row, column = batch.is_reply.nonzero(as_tuple=True)
        targets = batch.input_ids[row, column]
        if self._head is None:
            logits = self._padded(self._causal, batch, side).logits[row, column - 1]
            token_logps = log_softmax_at(widened(logits), targets)
        else:
            hidden = self._padded(self._causal.base_model, batch, side).last_hidden_state
            token_logps = self._head.token_logps(hidden[row, column - 1], targets)
        sums = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        return sums.index_add(0, row, token_logps.double()), batch.is_reply.sum(-1)

    def score(
        self,
        items: Sequence[Replies],
        token_budget: int,
        advance: Callable[[int], object] = lambda replies: None,
    ) -> Scores:
        """Scores (N, R) on the CPU without gradients, R the longest item's replies, in batches of
        at most ``token_budget`` tokens. ``advance`` hears how many replies each batch had."""
        width = max(map(len, items), default=0)
        sums = torch.zeros(len(items), width, dtype=torch.float64)
        counts = torch.zeros(len(items), width, dtype=torch.int64)
        with evaluating(self.model):
            for chosen in balanced([self.cost(item) for item in items], token_budget):
                found, number = self.logps([items[i] for i in chosen])
                replies = [len(items[i]) for i in chosen]
                sums[chosen] = per_prompt(found.cpu(), replies, width)
                counts[chosen] = per_prompt(number.cpu(), replies, width)
                advance(sum(replies))
        return Scores(sums, counts)

    def typical(self, items: Sequence[Replies]) -> list[Replies]:
        """The longest and the median, for ``check_packing``."""
        return [items[i] for i in longest_and_median([self.cost(item) for item in items])]

    def check_packing(self, items: Sequence[Replies]) -> None:
        """Score replies of ``items``, such as the longest and the median of many, both ways, and go
        on with padded rows if they differ: windows, recurrent states and attention of a model's own
        are found by their numbers, not by a list of names.

        One reply of each item tells, the longest, when it is packed last: it reaches farthest back,
        and comes after all that it must not see.
        """
        if not self.packs:
            return
        same = SAME if self._causal.dtype.itemsize > 2 else SAME_16_BIT
        items = [tuple(sorted(item, key=lambda row: len(row.ids))) for item in items]
        last = np.cumsum([len(item) for item in items]) - 1
        with evaluating(self.model):
            alone = [self.padded_logps(item[-1:]) for item in items]
            plain, counts = (torch.cat(parts) for parts in zip(*alone, strict=True))
            try:
                apart = difference(self._packed_logps(items)[0][last], plain, counts)
                if not apart <= same:
                    self._stop_packing(f"with it, scores change by {apart:.2g} nats per token")
            except (NotImplementedError, TypeError, ValueError, KeyError, RuntimeError) as error:
                self._stop_packing(first_line(error))

    def _stop_packing(self, reason: str) -> None:
        self.packs = False
        attention.uninstall(self._causal.config.get_text_config())
        logger.info(
            "%s: a prompt's replies cannot share one row, so each is computed alone: %s",
            type(self._causal).__name__,
            reason,
        )

    def _padded(self, module: nn.Module, batch: Batch, side: Side) -> Any:
        # Right-padded rows need no positions: they count from 0, which every model does itself.
        positions = {} if side == "right" else {"position_ids": batch.position_ids}
        return module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **positions,
        )

    def _is_right(self, head: Head) -> bool:
        """Whether hidden states through ``head`` are the model's own logits."""
        ids = torch.arange(1, 5, device=self.device).remainder(head.vocabulary).unsqueeze(0)
        with evaluating(self.model):
            own = widened(self._causal(input_ids=ids, use_cache=False).logits)
            ours = head(self._causal.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return ours.shape == own.shape and torch.allclose(ours, own, rtol=1e-2, atol=1e-2)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; afterwards the model is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def difference(
    one: Float[Tensor, " replies"],
    other: Float[Tensor, " replies"],
    counts: Int[Tensor, " replies"],
) -> float:
    """How far two ways of scoring the same replies are apart, in nats per token."""
    return float((one - other).abs().sum() / counts.sum())
