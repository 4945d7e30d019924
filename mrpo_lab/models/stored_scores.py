"""What the store holds of one reference: its scores, and what the gate measured of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mrpo_lab.models.gate import COLUMNS, REPLIES, SAMPLE, Measured
from mrpo_lab.storage.tables import NONE, Table

ENOUGH = SAMPLE // 2
"""Number of measured items by which data can be judged without loading the model again."""

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the stored numbers: increase it when their meaning changes."""
REASON = "they have a system message or other tokens now, or the checkpoint was misread"
"""Why scores of format 1 are computed again. Checkpoints that lacked tensors were filled at random,
quantized ones read as raw integers, and system messages lost or made part of the reply."""
SCORES = {"sums": "f8", "counts": "i8"}


@dataclass(frozen=True)
class StoredScores:
    """Tables of one reference; each row is one reply."""

    scores: Table
    gate: Table
    """Rows of ``Measured``, for the replies that the gate was given."""
    former: Table | None = None
    """Scores of format 1, if there are any."""

    @classmethod
    def open(cls, slug: str, key: Mapping[str, Any]) -> StoredScores:
        """Open both tables.

        Args:
            key: everything that the numbers depend on besides the texts.
        """
        former = Table.find("scores", {**key, "format": 1}, SCORES)
        key = {**key, "format": FORMAT}
        scores = Table.open("scores", slug, key, SCORES)
        return cls(scores, Table.open("gate", slug, key, COLUMNS), former)

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

    def read(self, ids: np.ndarray) -> dict[str, np.ndarray] | None:
        """The columns of the scores, each (N, R), or None if a model has to be loaded for them."""
        values, found = self.scores.read(ids)
        return values if found.all() and not self.unmeasured(ids) else None

    def measured(self, ids: np.ndarray) -> Measured:
        """What the gate measured of the first ``SAMPLE`` items that it was given among these."""
        sample = ids[self._is_measured(ids), :REPLIES][:SAMPLE]
        values, _ = self.gate.read(sample)
        return Measured(**{name: column[sample != NONE] for name, column in values.items()})

    def add_measured(self, ids: np.ndarray, items: Sequence[int], measured: Measured) -> None:
        """Store what was ``measured`` of some items."""
        sample = ids[list(items), :REPLIES]
        self.gate.append(sample[sample != NONE], measured._asdict())

    def take_over(self, slug: str, ids: np.ndarray, counts: np.ndarray, sound: np.ndarray) -> None:
        """Copy scores of format 1 that are right beyond doubt, and log what is computed again.

        Args:
            counts: (N, R) numbers of reply tokens today; scores of other numbers are not taken.
            sound: (N,) whether an item's scores could be right in format 1.
        """
        missing = np.array([] if self.former is None else self.missing(ids), dtype=int)
        if self.former is None or not len(missing):
            return
        values, found = self.former.read(ids[missing])
        same = (values["counts"] == counts[missing]) | (ids[missing] == NONE)
        right = found.all(-1) & same.all(-1) & sound[missing]
        if right.any():
            taken = {name: column[right] for name, column in values.items()}
            self.scores.append(ids[missing[right]], taken)
        if again := int((found.all(-1) & ~right).sum()):
            logger.info("%s: scores of %d items are computed again: %s", slug, again, REASON)
