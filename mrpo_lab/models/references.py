"""The reference models, and their scores: read from the store, or computed once and put there."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from mrpo_lab.data.texts import Item, Replies
from mrpo_lab.errors import UserError
from mrpo_lab.models.gate import (
    REPLIES,
    SAMPLE,
    Finding,
    check_outliers,
    check_tokens,
    disagreements,
    judge,
    measure,
)
from mrpo_lab.models.stored_scores import StoredScores
from mrpo_lab.models.weights import ModelSource
from mrpo_lab.objective.scores import Scores
from mrpo_lab.progress import progress
from mrpo_lab.scoring.memory import PassSize, release
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.storage.tables import Table

logger = logging.getLogger(__name__)

NO_SLUGS = ("step", "undecided_pairs")
"""Names that files of a run give to something else: a column of ``alpha.parquet``, and a metric."""
SHARD_ROWS = 256
"""Number of items between two writes to the store, which an interruption can lose."""


@dataclass(frozen=True, kw_only=True)
class Reference(ModelSource):
    """One model of a reference set."""

    slug: str
    """Name of the reference in configuration, metrics and figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slug in NO_SLUGS:
            raise ValueError(f"slug: {self.slug} is the name of something else in a run's files")
        if self.slug != self.slug.strip() or not self.slug or not self.slug.isprintable():
            raise ValueError(f"slug must be text without blanks around it, got {self.slug!r}")

    @property
    def name(self) -> str:
        return self.slug

    def stored(self) -> StoredScores:
        """What the store holds of this reference.

        Its key is all that changes a number. A maximum length does not: replies are never cut, so
        it decides which pairs are scored and not what their scores are.
        """
        key = {**self.fingerprint(), "text": self.tokenization.fingerprint}
        return StoredScores.open(self.slug, key)

    def table(self) -> Table:
        """The table of this reference's scores in the store."""
        return self.stored().scores

    @property
    def precision(self) -> str:
        """The dtype by whose tolerance the gate judges this reference."""
        # int8 scales activations by the largest in the batch, whatever the dtype of the rest.
        wide = self.dtype in ("float32", "float64")
        if self.quantization == "int8" or (wide and self.quantized and not self.quantization):
            return "float16"
        return self.dtype


class ReferenceScores(NamedTuple):
    """The scores of the references in use, and which checks they failed."""

    scores: Scores
    """(N, K, R) on the CPU."""
    findings: list[Finding]
    """The failed checks, empty unless ``gate`` is warn."""


@dataclass(kw_only=True)
class ReferenceSet:
    """K reference models in order. The first is the anchor, from which the policy starts."""

    entries: list[dict[str, Any]]
    """For each model the keys of ``Reference``; slug and path are required."""
    anchor: str | None = None
    """Slug of the model that the policy starts from; null is the first entry."""
    use: list[str] | None = None
    """Slugs of the models in use; null is all. Pairs are always filtered by the tokenizers of all
    entries, so that every choice is trained and tested on the same pairs."""
    dtype: str = "bfloat16"
    """dtype of the entries that name none."""
    quantization: str | None = None
    """Quantization of the entries that name none."""
    kernels: str = "auto"
    """Kernels of the entries that name none; see ``ModelSource``."""
    gate: str = "stop"
    """What happens when a check fails: stop or warn."""
    token_budget: int = 8192
    """Largest number of tokens in one scoring pass, as ``train.micro_batch_tokens`` is in training
    and ``train.token_budget`` in evaluation. It changes memory and speed, never a result."""

    def __post_init__(self) -> None:
        slugs = [reference.slug for reference in self.all]
        if not slugs:
            raise ValueError("entries is empty: a reference set needs at least one model")
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"entries: slugs must differ, got {slugs}")
        if self.use is not None and len(set(self.use)) < len(self.use):
            raise ValueError(f"use: each reference counts once, got {self.use}")
        if self.anchor is not None and self.anchor not in slugs:
            raise ValueError(f"anchor: no entry is called {self.anchor!r}; choose from {slugs}")
        if self.use is not None:
            unknown = [slug for slug in self.use if slug not in slugs]
            if unknown or not self.use:
                problem = f"no reference is called {unknown[0]!r}" if unknown else "it is empty"
                raise ValueError(f"use: {problem}; choose from {', '.join(slugs)}")
        if self.gate not in ("stop", "warn"):
            raise ValueError(f"gate must be stop or warn, got {self.gate!r}")
        if self.token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {self.token_budget}")

    @cached_property
    def all(self) -> list[Reference]:
        """All entries, in use or not."""
        defaults = {
            "dtype": self.dtype,
            "quantization": self.quantization,
            "kernels": self.kernels,
        }
        references = []
        for number, entry in enumerate(self.entries):
            try:
                references.append(Reference(**{**defaults, **entry}))
            except (TypeError, ValueError) as error:
                problem = str(error).removeprefix("Reference.__init__() ")
                raise ValueError(f"entries[{number}]: {problem}") from error
        return references

    @cached_property
    def members(self) -> list[Reference]:
        """The references in use, the anchor first."""
        slugs = self.use if self.use is not None else [reference.slug for reference in self.all]
        anchor = self.anchor or self.all[0].slug
        if anchor in slugs:
            slugs = [anchor, *(slug for slug in slugs if slug != anchor)]
        elif len(slugs) > 1:
            logger.warning(
                "reference_set.use leaves the anchor %s out: %s takes its place",
                anchor,
                slugs[0],
            )
        by_slug = {reference.slug: reference for reference in self.all}
        return [by_slug[slug] for slug in slugs]

    @property
    def slugs(self) -> list[str]:
        return [reference.slug for reference in self.members]

    def scores(
        self, items: Sequence[Item], ids: np.ndarray, device: torch.device
    ) -> ReferenceScores:
        """The scores of ``items`` under the references in use. Scores that the store lacks are
        computed on ``device`` and stored, one model at a time.

        Args:
            ids: (N, R) ids of the replies, their keys in the store.

        Raises:
            UserError: a model is damaged or cannot be given an item; or a check of the gate failed
                and ``gate`` is stop.
        """
        findings: list[Finding] = []
        stored = {reference.slug: reference.stored() for reference in self.members}
        known = {}
        for reference in self.members:  # all of them before the first is scored
            slug = reference.slug
            findings += check_tokens(slug, reference.tokenization, items, ids)
            known[slug] = stored[slug].read(ids)
            if known[slug] is None:
                reference.check()
                self._take_over(reference, stored[slug], items, ids)
        self._report(findings)
        scores: dict[str, Scores] = {}
        for reference in self.members:
            slug = reference.slug
            values, failed = known[slug], list[Finding]()
            if values is None:
                values, failed = self._filled(reference, stored[slug], items, ids, device)
            judged = judge(slug, stored[slug].measured(ids), reference.precision)
            found = list(dict.fromkeys([*judged, *failed]))
            self._report(found)
            findings += found
            sums, counts = (torch.from_numpy(values[name]) for name in ("sums", "counts"))
            scores[slug] = Scores(sums, counts)
        characters = sum(max(1, len(reply)) for item in items for reply in item.replies)
        outliers = check_outliers(scores, characters)
        self._report(outliers)
        return ReferenceScores(Scores.stack(list(scores.values())), findings + outliers)

    def _take_over(
        self, reference: Reference, stored: StoredScores, items: Sequence[Item], ids: np.ndarray
    ) -> None:
        """Keep scores that an earlier version stored, where none of its faults can matter: the
        checkpoint is whole and not quantized by itself, and the prompt has no system message."""
        if stored.former is None:
            return
        own_quantization = reference.quantized and not reference.quantization
        sound = np.array(
            [not own_quantization and item.prompt[0]["role"] != "system" for item in items]
        )
        stored.take_over(
            reference.slug, ids, reference.tokenization.lengths(items, ids).reply, sound
        )

    def _filled(
        self,
        reference: Reference,
        stored: StoredScores,
        items: Sequence[Item],
        ids: np.ndarray,
        device: torch.device,
    ) -> tuple[dict[str, np.ndarray], list[Finding]]:
        """Complete the store; one reference's columns (N, R), and the checks that it failed."""
        findings: list[Finding] = []
        with stored.scores.filling():
            values = stored.read(ids)
            if values is None:  # no other process has filled it meanwhile
                findings = self._fill(reference, stored, items, ids, device)
                values = stored.read(ids)
        assert values is not None, f"{reference.slug}: the store lost rows that were just written"
        return values, findings

    def _fill(
        self,
        reference: Reference,
        stored: StoredScores,
        items: Sequence[Item],
        ids: np.ndarray,
        device: torch.device,
    ) -> list[Finding]:
        """Load the model, check it, and store what is missing. Returns the checks that failed."""
        missing, unmeasured = stored.missing(ids), stored.unmeasured(ids)
        sample = unmeasured or missing[:SAMPLE]
        needed = sorted({*missing, *sample})
        tokenized = reference.tokenization.rows([items[i] for i in needed])
        rows = {i: row for i, row in zip(needed, tokenized, strict=True) if row is not None}
        assert len(rows) == len(needed), "items that a template refuses are filtered before scoring"
        reference.check_rows(row for item in rows.values() for row in item)
        scorer = ReplyScorer(reference.load(device), reference.kernels)
        # Asked before the gate's few items: on first use the scorer checks itself on the longest.
        costs = scorer.costs([rows[i] for i in missing or sample])
        measured = measure(
            scorer,
            [rows[i][:REPLIES] for i in sample],
            len(reference.tokenization.format.tokenizer),
            partial(self._again, reference, device) if reference.is_small else None,
        )
        findings = disagreements(reference.slug, measured, reference.precision)
        if unmeasured:  # these data are judged by all of their first items
            measured_of_all = stored.measured(ids).joined(measured)
            findings = judge(reference.slug, measured_of_all, reference.precision)
        if self.gate == "stop":
            self._report(findings)  # before hours of scoring, not after them
        stored.add_measured(ids, sample, measured)
        self._score_missing(scorer, stored, rows, ids, missing, costs, reference.slug)
        del scorer
        release()
        return findings

    def _again(self, reference: Reference, device: torch.device) -> ReplyScorer:
        return ReplyScorer(reference.load(device), reference.kernels)

    def _score_missing(
        self,
        scorer: ReplyScorer,
        stored: StoredScores,
        rows: Mapping[int, Replies],
        ids: np.ndarray,
        missing: Sequence[int],
        costs: Sequence[int],
        slug: str,
    ) -> None:
        """Score the ``missing`` items, the costliest first, and write them shard by shard."""
        order = np.argsort([-cost for cost in costs[: len(missing)]], kind="stable")
        by_length = np.array(missing, dtype=int)[order]
        replies = sum(len(rows[i]) for i in missing)
        size = PassSize(self.token_budget, "reference_set.token_budget")
        with progress(replies, f"scoring {slug}", "reply") as bar:
            for part in np.split(by_length, range(SHARD_ROWS, len(missing), SHARD_ROWS)):
                scores = scorer.score([rows[i] for i in part], size, bar.update)
                wrong = (~torch.isfinite(scores.sums)).any(-1).nonzero().flatten().tolist()
                if wrong:
                    raise UserError(
                        f"reference {slug}: its log-probability of a reply of item "
                        f"{part[wrong[0]]} of the pool is not finite: set its dtype to bfloat16 or "
                        "float32"
                    )
                columns = {"sums": scores.sums.numpy(), "counts": scores.counts.numpy()}
                stored.scores.append(ids[part][:, : scores.sums.shape[1]], columns)

    def _report(self, findings: Sequence[Finding]) -> None:
        """Warn of the findings, or stop for them, as ``gate`` says."""
        for finding in findings if self.gate == "warn" else ():
            logger.warning("%s", finding)
        if findings and self.gate == "stop":
            raise UserError(
                f"{'; '.join(map(str, findings))} (reference_set.gate=warn goes on nevertheless)"
            )
