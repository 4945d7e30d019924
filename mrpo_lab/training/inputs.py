"""What the training loop is given: the policy's tokens and the reference scores, by pool index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrpo_lab.data.conditioning import conditioned
from mrpo_lab.data.conformance import check_rows
from mrpo_lab.data.texts import Item, Message, Replies
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.objective.labels import PREFERENCE, Labels
from mrpo_lab.objective.scores import Scores


class PolicyTokens:
    """Token rows of the pool's items under the policy's tokenizer, made when first needed.

    If ``conditioned``, lambda is written into the system message, so rows depend on it.
    """

    def __init__(
        self,
        tokenization: Tokenization,
        items: Sequence[Item],
        aspects: Sequence[str],
        conditioned: bool = False,
    ) -> None:
        self.conditioned = conditioned
        self._tokenization, self._items, self._aspects = tokenization, items, aspects
        self._known: dict[int, Replies] = {}

    def rows(self, indices: Sequence[int], lambda_: Float[Tensor, " A"]) -> list[Replies]:
        """Token rows of the items at ``indices``, conditioned on ``lambda_`` if they are at all.

        Raises:
            UserError: the policy's template refuses a system message.
        """
        if self.conditioned:
            items = [self._items[i] for i in indices]
            return self._tokenize([replace(i, prompt=self._tell(i, lambda_)) for i in items])
        new = [i for i in dict.fromkeys(indices) if i not in self._known]
        self._known.update(zip(new, self._tokenize([self._items[i] for i in new]), strict=True))
        return [self._known[i] for i in indices]

    def check(self) -> None:
        """Check the first item: its tokens, and that they depend on lambda if conditioned.

        Raises:
            UserError: a text is not where it belongs, or two lambdas give the same prompt.
        """
        aspects = len(self._aspects)
        corners = torch.eye(aspects) if self.conditioned else torch.ones(1, aspects)
        seen: set[bytes] = set()
        for lambda_ in corners:
            item = replace(self._items[0], prompt=self.prompt(0, lambda_))
            (rows,) = self._tokenize([item])
            problems = check_rows(self._tokenization.format, [item], [rows])
            if problems:
                raise UserError(f"model: {problems[0]}: does its template fit?")
            seen.add(rows[0].ids[: rows[0].start].tobytes())
        if len(seen) < len(corners):
            raise UserError(
                "lambda.condition: prompts for different lambda have the same tokens under the "
                "policy's template: set lambda.condition=false or give another model.template"
            )

    def prompt(self, index: int, lambda_: Float[Tensor, " A"]) -> tuple[Message, ...]:
        """The prompt that the policy is given for an item, with lambda in it if conditioned."""
        item = self._items[index]
        return self._tell(item, lambda_) if self.conditioned else item.prompt

    def _tell(self, item: Item, lambda_: Float[Tensor, " A"]) -> tuple[Message, ...]:
        return conditioned(item.prompt, self._aspects, lambda_.tolist())

    def _tokenize(self, items: Sequence[Item]) -> list[Replies]:
        rows = [row for row in self._tokenization.rows(items) if row is not None]
        if len(rows) < len(items):  # without a system message, every prompt passed the filters
            raise UserError("lambda.condition: the policy's template refuses a system message")
        return rows


@dataclass(frozen=True)
class Data:
    """Everything the loop knows about the pool of pairs or lists."""

    items: Sequence[Item]
    tokens: PolicyTokens
    refs: Scores
    """Reference scores (N, K, R) on the CPU, with float64 sums and counts in tokens."""
    loss_refs: Scores
    """The same with counts in the unit of the loss."""
    weighting_refs: Scores
    """The same with counts in the unit of the weighting."""
    loss_lengths: Int[Tensor, "N R"] | None
    """Lengths of the replies in the unit of the loss, where it is not the policy's own tokens."""
    labels: Labels
    slugs: list[str]
    """Names of the K references; the first is the anchor."""
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    """Pool indices of each split."""
    ids: np.ndarray
    """Content hashes (N, R) of the replies."""
    fingerprint: str
    """Hash of the texts, labels and splits: a run resumes only on the same data."""

    @property
    def lists(self) -> bool:
        """Whether items are lists rated by aspects rather than chosen and rejected replies."""
        return self.labels.aspects != [PREFERENCE]

    def target(self, indices: Sequence[int], lambda_: Float[Tensor, " A"]) -> Float[Tensor, "B R"]:
        """How much each reply is to be preferred under ``lambda_``; (1, 0) for a pair."""
        return self.labels[indices].mix(lambda_)

    def in_loss_unit(self, policy: Scores, indices: Sequence[int]) -> Scores:
        """The policy's scores (B, R) of items, with counts in the unit of the loss."""
        if self.loss_lengths is None:
            return policy
        return Scores(policy.sums, self.loss_lengths[list(indices)])

    def names(self, indices: Sequence[int]) -> list[str]:
        """What messages call some items."""
        prompts = ((i, self.items[i].prompt[-1]["content"]) for i in indices)
        return [f"pair {i} of the pool ({prompt[:60]!r})" for i, prompt in prompts]


@dataclass(frozen=True)
class Batch:
    """The items of one optimizer step, or some of them."""

    indices: list[int]
    """Pool indices of the items."""
    rows: list[Replies]
    """The policy's token rows."""
    refs: Scores
    """Reference scores (B, K, R) in the unit of the loss."""
    alpha: Float[Tensor, "B K"]
    target: Float[Tensor, "B R"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: list[int]) -> Batch:
        """The items at these positions of the batch."""
        indices, rows = [self.indices[i] for i in part], [self.rows[i] for i in part]
        return Batch(indices, rows, self.refs[part], self.alpha[part], self.target[part])
