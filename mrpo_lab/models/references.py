"""The reference models: their scores from the store, or computed once and put there."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mrpo_lab.data.texts import Item
from mrpo_lab.errors import UserError
from mrpo_lab.models.gate import Finding, check_outliers, check_scoring
from mrpo_lab.models.weights import Checkpoint
from mrpo_lab.objective.scores import Scores
from mrpo_lab.progress import progress
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.storage.files import write_whole
from mrpo_lab.storage.tables import Table

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the meaning of a stored number changes."""
SHARD_ROWS = 256
"""Pairs between two writes to the store: what an interruption can lose."""


@dataclass(frozen=True, kw_only=True)
class Reference(Checkpoint):
    """One entry of a reference set."""

    slug: str
    """Its name in configuration, metrics and figures."""

    @property
    def name(self) -> str:
        return self.slug

    def table(self) -> Table:
        """Where its scores are kept. Max length is no part of the key: replies are never cut, so
        it decides which pairs are scored, not their numbers."""
        key = {**self.fingerprint(), "text": self.tokenization.fingerprint, "format": FORMAT}
        return Table.open("scores", self.slug, key, {"sums": "f8", "counts": "i8"})


@dataclass(kw_only=True)
class ReferenceSet:
    """K references in order; the first is the anchor, the policy's own initial model."""

    entries: list[dict[str, Any]]
    """Keys of ``Reference`` each; slug and path at least."""
    anchor: str | None = None
    """Slug of the policy's own initial model; null is the first entry."""
    use: list[str] | None = None
    """Slugs to narrow the set to. Pairs are still filtered by all entries' tokenizers, so that
    every narrowing is trained and tested on the same pairs."""
    dtype: str = "bfloat16"
    quantization: str | None = None
    """dtype and quantization of the entries that name none."""
    gate: str = "stop"
    """What a failed check does: stop or warn."""
    token_budget: int = 8192
    """Tokens in one scoring batch. Changes memory and speed, never a result."""
    findings: list[Finding] = field(default_factory=list, init=False)
    """What the gate found in the references in use and went on with."""

    def __post_init__(self) -> None:
        slugs = [reference.slug for reference in self.all]
        if not slugs:
            raise ValueError("entries is empty: a reference set needs at least one model")
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"entries: slugs must differ, got {slugs}")
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
        """Every entry as a reference, in use or not."""
        references = []
        for number, entry in enumerate(self.entries):
            try:
                references.append(
                    Reference(**{"dtype": self.dtype, "quantization": self.quantization, **entry})
                )
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

    def scores(self, items: Sequence[Item], ids: np.ndarray, device: torch.device) -> Scores:
        """(N, K, R) on the CPU; what the store lacks is scored now, one model at a time.

        Raises:
            UserError: a check of the gate failed and ``gate`` is stop.
        """
        tables = {r.slug: self._table(r, items, ids, device) for r in self.members}
        characters = sum(max(1, len(reply)) for item in items for reply in item.replies)
        self._report(check_outliers(tables, characters))
        return Scores.stack(list(tables.values()))

    def _table(
        self, reference: Reference, items: Sequence[Item], ids: np.ndarray, device: torch.device
    ) -> Scores:
        table = reference.table()
        values, found = table.read(ids)
        if not found.all():
            with table.filling():
                values, found = table.read(ids)
                missing = np.flatnonzero(~found.all(-1)).tolist()
                if len(missing):
                    self._fill(reference, table, [items[i] for i in missing], ids[missing], device)
                    values, found = table.read(ids)
        assert found.all(), f"{reference.slug}: the store lost rows that were just written"
        findings = [
            Finding(reference.slug, problem)
            for problem in json.loads((table.folder / "gate.json").read_text())
        ]
        self._report(findings)
        return Scores(torch.from_numpy(values["sums"]), torch.from_numpy(values["counts"]))

    def _fill(
        self,
        reference: Reference,
        table: Table,
        items: Sequence[Item],
        ids: np.ndarray,
        device: torch.device,
    ) -> None:
        """Load the model, check it on a few pairs, score all, writing as it goes."""
        rows = [row for row in reference.tokenization.rows(items) if row is not None]
        assert len(rows) == len(items), "unrenderable pairs are filtered before scoring"
        model = reference.load(device)
        scorer = ReplyScorer(model)
        scorer.check_packing(scorer.typical(rows))
        vocabulary = len(reference.tokenization.format.tokenizer)
        # int8 rounds activations by the largest of the batch, whatever the dtype of the rest.
        precision = "float16" if reference.quantization == "int8" else reference.dtype
        findings = check_scoring(reference.slug, scorer, rows, vocabulary, precision)
        problems = [finding.problem for finding in findings]
        write_whole(table.folder / "gate.json", json.dumps(problems).encode())
        if self.gate == "stop":
            self._report(findings)  # before the hours of scoring, not after
        by_length = np.argsort([-scorer.cost(item) for item in rows], kind="stable")
        replies = sum(map(len, rows))
        with progress(replies, f"scoring {reference.slug}", "reply") as bar:
            for part in np.split(by_length, range(SHARD_ROWS, len(rows), SHARD_ROWS)):
                scores = scorer.score([rows[i] for i in part], self.token_budget, bar.update)
                columns = {"sums": scores.sums.numpy(), "counts": scores.counts.numpy()}
                table.append(ids[part][:, : scores.sums.shape[1]], columns)
        del model, scorer
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _report(self, findings: Sequence[Finding]) -> None:
        self.findings += findings
        for finding in findings if self.gate == "warn" else ():
            logger.warning("%s", finding)
        if findings and self.gate == "stop":
            raise UserError(
                f"{'; '.join(map(str, findings))} (reference_set.gate=warn goes on nevertheless)"
            )
