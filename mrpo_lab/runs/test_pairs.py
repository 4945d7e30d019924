"""``test_pairs.parquet``: what runs are compared by, pair by pair, and how references acted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from mrpo_lab.objective.losses import PreferenceLoss
from mrpo_lab.objective.scores import Scores
from mrpo_lab.storage.files import write_parquet


def pair_names(ids: np.ndarray) -> list[str]:
    """A name for each row of reply ids (N, R): the same texts have the same one in all runs."""
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in ids]


def reference_weights(loss: PreferenceLoss, policy: Scores, refs: Scores) -> Tensor:
    """(B, K): the weight of each pair's gradient, were one reference alone to decide it."""
    rows, num_refs = refs.sums.shape[:2]
    one_hot = F.one_hot(torch.arange(num_refs), num_refs).to(refs.sums)
    return torch.stack(
        [loss.pair_weights(policy, refs, alpha.expand(rows, -1)) for alpha in one_hot], dim=1
    )


def write_test_pairs(
    path: Path,
    ids: np.ndarray,
    slugs: Sequence[str],
    refs: Scores,
    before: Scores,
    after: Scores,
    loss: PreferenceLoss,
) -> None:
    """A row a test pair. Margins are in nats per token; ``tokens`` is chosen minus rejected reply;
    ``weight`` that of ``reference_weights`` under the trained policy.

    ``ids``: (N, R); ``refs``: (N, K, R); ``before``, ``after``: the policy's scores (N, R), all
    with the same labels. Of a list, ``tokens`` is weighted as its margin is.
    """
    columns: dict[str, object] = {
        "pair": pair_names(ids),
        "margin_before": before.margins().numpy(),
        "margin": after.margins().numpy(),
    }
    margins, weights = refs.margins(), reference_weights(loss, after, refs)
    tokens = (refs.contrast.unsqueeze(1) * refs.counts).sum(-1)
    for k, slug in enumerate(slugs):
        columns[f"margin/{slug}"] = margins[:, k].numpy()
        columns[f"weight/{slug}"] = weights[:, k].numpy()
        columns[f"tokens/{slug}"] = tokens[:, k].numpy()
    write_parquet(path, pa.table(columns))
