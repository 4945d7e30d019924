"""What the store holds of one reference: its scores, and what the gate measured of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mrpo_lab.models.gate import COLUMNS, REPLIES, SAMPLE, Measured
from mrpo_lab.storage import cache
from mrpo_lab.storage.tables import NONE, Table

ENOUGH = SAMPLE // 2
"""Number of measured items by which data can be judged without loading the model again."""

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the stored numbers: increase it when their meaning changes, and give the reason."""
REASON = "a checkpoint that lacked tensors was filled at random and scored all the same"
"""Why scores of earlier formats are not used."""


@dataclass(frozen=True)
class StoredScores:
    """Tables of one reference; each row is one reply."""

    scores: Table
    gate: Table
    """Rows of ``Measured``, for the replies that the gate was given."""

    @classmethod
    def open(cls, slug: str, key: Mapping[str, Any]) -> StoredScores:
        """Open both tables.

        Args:
            key: everything that the numbers depend on besides the texts.
        """
        key = {**key, "format": FORMAT}
        scores = Table.open("scores", slug, key, {"sums": "f8", "counts": "i8"})
        return cls(scores, Table.open("gate", slug, key, COLUMNS))

    def missing(self, ids: np.ndarray) -> list[int]:
        """Indices of the items that lack scores. ``ids`` is (N, R), as in all methods."""
        found = self.scores.read(ids)[1]
        return [int(i) for i in np.flatnonzero(~found.all(-1))]

    def unmeasured(self, ids: np.ndarray) -> list[int]:
        """Indices of items that the gate has to measure, so that these data are judged by enough
        rows of their own; empty if enough of them were measured before."""
        known = self._is_measured(ids)
        if known.sum() >= min(ENOUGH, len(known)):
            return []
        return [int(i) for i in np.flatnonzero(~known)[: SAMPLE - known.sum()]]

    def _is_measured(self, ids: np.ndarray) -> np.ndarray:
        found = self.gate.read(ids[:, :REPLIES])[1]
        return np.asarray(found.all(-1))

    def complete(self, ids: np.ndarray) -> bool:
        """Whether no model has to be loaded for these items."""
        return not self.missing(ids) and not self.unmeasured(ids)

    def measured(self, ids: np.ndarray) -> Measured:
        """What the gate measured of the first ``SAMPLE`` items that it was given among these."""
        sample = ids[self._is_measured(ids), :REPLIES][:SAMPLE]
        values, _ = self.gate.read(sample)
        return Measured(**{name: column[sample != NONE] for name, column in values.items()})

    def add_measured(self, ids: np.ndarray, items: Sequence[int], measured: Measured) -> None:
        """Store what was ``measured`` of some items."""
        sample = ids[list(items), :REPLIES]
        self.gate.append(sample[sample != NONE], measured._asdict())

    def say_if_replaced(self, slug: str, weights: str) -> None:
        """Log that scores of these weights exist in an earlier format, if so."""
        for file in (cache.root() / "scores").glob("*/key.json"):
            with suppress(OSError, ValueError):
                key = json.loads(file.read_text())
                if key.get("weights") == weights and key.get("format", FORMAT) < FORMAT:
                    logger.info("%s: scores stored earlier are computed again: %s", slug, REASON)
                    return
