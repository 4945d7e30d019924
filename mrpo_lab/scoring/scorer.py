"""Log-probabilities of replies: the one place where the forward pass of a model is run.

Policy and references, training, evaluation and stored scores all come through ``ReplyScorer``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mrpo_lab.data.texts import Replies, TokenRow
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.objective.scores import Scores, per_prompt
from mrpo_lab.scoring import attention
from mrpo_lab.scoring.agreement import (
    TOLERANCE,
    TOLERANCE_16_BIT,
    difference,
    gradient_difference,
    logits_agree,
)
from mrpo_lab.scoring.backend import Backend, backend_for
from mrpo_lab.scoring.head import Head, log_softmax_at, widened
from mrpo_lab.scoring.limits import check_rows, max_positions
from mrpo_lab.scoring.memory import PassSize, fitting, is_out_of_memory
from mrpo_lab.scoring.packing import longest_and_median, pack, packed_tokens
from mrpo_lab.scoring.padding import Side, collate

logger = logging.getLogger(__name__)


class ReplyScorer:
    """A causal language model, and how the log-probabilities of its replies are computed.

    Items are packed: each prompt is computed once, and nothing is padded. On first use the scorer
    compares packed with padded rows, and goes on with padded rows if they differ: sliding windows,
    recurrent states and attention of a model's own are found by their numbers, not by a list of
    names. Rows that are padded on the right are given no mask, so that fused kernels take them, if
    that changes no number.
    """

    def __init__(self, model: Any, kernels: str = "auto", backend: Backend | None = None) -> None:
        """
        Args:
            model: a causal language model of transformers, or a peft model around one.
            kernels: ``off`` never packs, always masks padding, and takes whole logits from the
                model itself.
            backend: what to compute with (default: what suits the model's device).

        Raises:
            UserError: the model is not causal, or an adapter acts outside the model's layers.
        """
        self.model = model
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self._causal = causal
        for layer in causal.modules():
            # On some CPUs bitsandbytes packs 4-bit weights when they are first evaluated. That
            # rounds, fails on some widths, and from then on no gradient passes through them.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        config = causal.config.get_text_config()
        self.positions = max_positions(config)
        """Largest number of tokens of a row, or None; see ``max_positions``."""
        self._backend = backend or backend_for(self.device, causal.dtype)
        self._tolerance = TOLERANCE_16_BIT if self._is_16_bit else TOLERANCE
        own = self._probe()
        embeddings = getattr(causal.get_input_embeddings(), "num_embeddings", own.shape[-1])
        self._vocabulary = min(embeddings, own.shape[-1])
        self._head = self._find_head(own) if kernels == "auto" else None
        self.packs = self._head is not None and self._backend.attend is not None
        """Whether items are packed; until the first use, whether that will be tried."""
        self._packing_checked = False
        self._masks_padding: bool | None = None if kernels == "auto" else True
        """Whether rows that are padded on the right need a mask; None until that is tried."""
        if self.packs:
            attention.install(causal.config.get_text_config())

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._causal.parameters()).device
        return device

    @property
    def description(self) -> str:
        """What it computes with, in a few words; after the first use, what it settled on."""
        rows = self._backend.name if self.packs else "padded rows"
        dtype = str(self._causal.dtype).removeprefix("torch.")
        return f"{self.device.type}: {rows}, {dtype}"

    def costs(self, items: Sequence[Replies]) -> list[int]:
        """Number of tokens in the forward pass of each item, padding included: what the settings
        ``token_budget`` and ``micro_batch_tokens`` limit."""
        self._check_packing(items)
        return [self._cost(item) for item in items]

    def _cost(self, item: Replies) -> int:
        return packed_tokens(item) if self.packs else len(item) * max(len(row.ids) for row in item)

    def logps(
        self, items: Sequence[Replies]
    ) -> tuple[Float[Tensor, " replies"], Int[Tensor, " replies"]]:
        """Log-probabilities of all replies of all items, one after the other, in one forward pass.

        Differentiable. Reply positions meet the output embedding a chunk at a time, so the whole
        (tokens, vocabulary) logits are never in memory.

        Returns:
            For each reply the sum over its tokens, in nats, in float64; and its number of tokens.

        Raises:
            UserError: a row has more tokens than the model has positions, or unknown tokens.
        """
        self._check_packing(items)
        if self.packs:
            try:
                return self._packed_logps(items)
            except NotImplementedError as error:  # such as dropout, which is off in evaluation mode
                self._stop_packing(str(error))
        return self.padded_logps([row for item in items for row in item])

    def padded_logps(
        self, rows: Sequence[TokenRow], side: Side = "right"
    ) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """``logps`` of separate rows, padded to one length, which every model can compute."""
        self._check_rows(rows)
        if side == "right" and self._masks_padding is None and len({len(r.ids) for r in rows}) > 1:
            self._check_mask(rows)
        return self._padded_logps(
            rows, side, mask=side == "left" or self._masks_padding is not False
        )

    def _padded_logps(
        self, rows: Sequence[TokenRow], side: Side, mask: bool
    ) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        batch = collate(rows, self.device, side)
        row, column = batch.is_reply.nonzero(as_tuple=True)
        targets = batch.input_ids[row, column]
        module = self._causal if self._head is None else self._causal.base_model
        # Positions of right-padded rows count from 0, as every model's own do.
        positions = {} if side == "right" else {"position_ids": batch.position_ids}
        output = module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask if mask else None,
            use_cache=False,
            **positions,
        )
        if self._head is None:
            logits = output.logits[row, column - 1]
            token_logps = log_softmax_at(widened(logits), targets)
        else:
            hidden = output.last_hidden_state[row, column - 1]
            token_logps = self._head.token_logps(hidden, targets)
        sums = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        return sums.index_add(0, row, token_logps.double()), batch.is_reply.sum(-1)

    def score(
        self,
        items: Sequence[Replies],
        token_budget: int | PassSize,
        advance: Callable[[int], object] = lambda replies: None,
    ) -> Scores:
        """Scores of all items on the CPU, in evaluation mode and without gradients.

        Args:
            token_budget: largest number of tokens in one forward pass; see ``costs``. A number is
                halved once if such a pass does not fit into memory, a ``PassSize`` for good.
            advance: called after each forward pass with its number of replies.

        Returns:
            Scores (N, R), R the number of replies of the longest item.

        Raises:
            UserError: half of ``token_budget`` does not fit into memory either, or one item alone.
        """
        size = token_budget
        if not isinstance(size, PassSize):
            size = PassSize(size, "token_budget")
        width = max(map(len, items), default=0)
        sums = torch.zeros(len(items), width, dtype=torch.float64)
        counts = torch.zeros(len(items), width, dtype=torch.int64)

        def compute(chosen: list[int]) -> None:
            batch_sums, batch_counts = self.logps([items[i] for i in chosen])
            replies = [len(items[i]) for i in chosen]
            sums[chosen] = per_prompt(batch_sums.cpu(), replies, width)
            counts[chosen] = per_prompt(batch_counts.cpu(), replies, width)
            advance(sum(replies))

        with evaluating(self.model):
            size.run(self.costs(items), compute)
        return Scores(sums, counts)

    def _check_rows(self, rows: Iterable[TokenRow]) -> None:
        check_rows(rows, type(self._causal).__name__, self.positions, self._vocabulary)

    def _packed_logps(self, items: Sequence[Replies]) -> tuple[Tensor, Tensor]:
        self._check_rows(row for item in items for row in item)
        packed = pack(items, self.device, self._backend.pad_to_multiple_of)
        hidden = self._causal.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # transformers takes a mask with four axes as it is, and so makes none of its own.
            attention_mask=torch.ones(1, 1, 1, 1, device=self.device),
            layout=packed.layout,
            attend=self._backend.attend,
            use_cache=False,
        ).last_hidden_state[0]
        assert self._head is not None
        token_logps = self._head.token_logps(hidden[packed.predictors], packed.targets)
        sums = torch.zeros(len(packed.counts), dtype=torch.float64, device=self.device)
        sums = sums.index_add(0, packed.owners, token_logps.double())
        return sums[packed.replies], packed.counts[packed.replies]

    def _check_mask(self, rows: Sequence[TokenRow]) -> None:
        """Compare the shortest and the longest row, padded, with and without a mask."""
        two = [min(rows, key=lambda row: len(row.ids)), max(rows, key=lambda row: len(row.ids))]
        with torch.random.fork_rng(self._rng_devices), evaluating(self.model):
            masked, counts = self._padded_logps(two, "right", mask=True)
            apart = difference(self._padded_logps(two, "right", mask=False)[0], masked, counts)
        self._masks_padding = not apart <= self._tolerance.scores  # nan too
        if self._masks_padding:
            logger.info(
                "%s: padding needs a mask, which keeps faster attention from being used: without "
                "it, scores change by %.2g nats per token",
                type(self._causal).__name__,
                apart,
            )

    def _check_packing(self, items: Sequence[Replies]) -> None:
        """On first use, compare packed with padded rows on the longest item and the median one:
        their scores, and the gradient if the model is trained.

        One reply of each item is compared, the longest, packed last: it reaches farthest back, and
        comes after all that it must not see. Neither the random state nor the mode of the model
        changes. Processes of one run see different first items and might decide differently; since
        each decides by numbers that agree, that could only change the rounding.
        """
        if self._packing_checked or not self.packs or not items:
            return
        self._packing_checked = True
        chosen = longest_and_median([packed_tokens(item) for item in items])
        typical = [tuple(sorted(items[i], key=lambda row: len(row.ids))) for i in chosen]
        last = np.cumsum([len(item) for item in typical]) - 1
        trained = [p for p in self.model.parameters() if p.requires_grad]
        tokens = max(len(item[-1].ids) for item in typical)
        with (
            fitting(f"a prompt with its reply of {tokens:,} tokens", "lower dataset.max_tokens"),
            torch.random.fork_rng(self._rng_devices),
            evaluating(self.model),
            torch.set_grad_enabled(bool(trained)),
        ):
            alone = [self._padded_logps(item[-1:], "right", mask=True) for item in typical]
            padded, counts = (torch.cat(parts) for parts in zip(*alone, strict=True))
            try:
                packed = self._packed_logps(typical)[0][last]
                apart = difference(packed.detach(), padded.detach(), counts)
                if not apart <= self._tolerance.scores:  # nan too
                    self._stop_packing(f"with it, scores change by {apart:.2g} nats per token")
                elif trained:
                    apart = gradient_difference(packed, padded, trained)
                    if not apart <= self._tolerance.gradient:
                        self._stop_packing(f"with it, the gradient changes by {100 * apart:.2g} %")
            except (NotImplementedError, TypeError, ValueError, KeyError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                self._stop_packing(first_line(error))

    @property
    def _rng_devices(self) -> list[torch.device]:
        """Devices whose random state a check has to restore, besides the CPU's."""
        return [self.device] if self.device.type == "cuda" else []

    def _stop_packing(self, reason: str) -> None:
        self.packs = False
        attention.uninstall(self._causal.config.get_text_config())
        logger.info(
            "%s: a prompt's replies cannot share one row, so each is computed alone: %s",
            type(self._causal).__name__,
            reason,
        )

    def _probe(self) -> Float[Tensor, "1 T V"]:
        """The model's own logits of a few tokens, as ``_probe_ids`` has them.

        Raises:
            UserError: the logits depend on later tokens, or peft's forward pass does more than the
                model with its layers.
        """
        name = type(self._causal).__name__
        ids = self._probe_ids()
        other = ids.clone()
        other[0, -1] = ids[0, 0]
        with evaluating(self.model):
            own, later = (
                widened(self._causal(input_ids=tokens, use_cache=False).logits)
                for tokens in (ids, other)
            )
            through_peft = own
            if self.model is not self._causal:
                through_peft = widened(self.model(input_ids=ids, use_cache=False).logits)
        if own.shape != through_peft.shape or not logits_agree(own, through_peft, self._is_16_bit):
            raise UserError(
                f"{name}: the adapter acts in peft's own forward pass and not in the model's "
                "layers, which is not supported: merge it, or use an adapter such as LoRA"
            )
        if not logits_agree(own[:, :-1], later[:, :-1], self._is_16_bit):
            raise UserError(
                f"{name} is not causal: its logits at a token depend on the tokens after it, so "
                "that it sees what it is to predict: give a decoder, or set is_decoder in its "
                "config.json"
            )
        return own

    def _probe_ids(self) -> Int[Tensor, "1 T"]:
        vocabulary = self._causal.config.get_text_config().vocab_size
        return torch.arange(1, 5, device=self.device).remainder(vocabulary).unsqueeze(0)

    @property
    def _is_16_bit(self) -> bool:
        return bool(self._causal.dtype.itemsize == 2)

    def _find_head(self, own: Float[Tensor, "1 T V"]) -> Head | None:
        """The model's output embedding, or None if the model does more to its logits than ``Head``
        can: then whole logits are taken from the model. ``own`` is what ``_probe`` found."""
        head = self._configured_head()
        if head is not None and self._fits(head, own):
            return head
        logger.warning(
            "%s computes its logits in a way of its own: whole logits are held in memory",
            type(self._causal).__name__,
        )
        return None

    def _fits(self, head: Head, own: Float[Tensor, "1 T V"]) -> bool:
        """Whether ``head`` computes the model's own logits from its body's hidden states."""
        with evaluating(self.model):
            body = self._causal.base_model(input_ids=self._probe_ids(), use_cache=False)
            hidden = getattr(body, "last_hidden_state", None)
            if hidden is None:
                return False
            ours = head(hidden)
        return ours.shape == own.shape and torch.allclose(ours, own, rtol=1e-2, atol=1e-2)

    def _configured_head(self) -> Head | None:
        """The output embedding as the configuration describes it, or None where the model's body
        cannot be called without it."""
        projection = self._causal.get_output_embeddings()
        # In some models, such as Llama4ForCausalLM, the base model is the model itself.
        if projection is None or self._causal.base_model is self._causal:
            return None
        config = self._causal.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1
        )
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(
            projection,
            int(config.vocab_size),
            float(scale),
            softcap,
            logits_at_once=self._backend.logits_at_once,
            softmax_at_once=self._backend.softmax_at_once,
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode it was in before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
