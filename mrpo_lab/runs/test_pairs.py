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
from mrpo_lab.objective.scores import Scores, contrast
from mrpo_lab.storage.files import write_parquet


def pair_names(ids: np.ndarray) -> list[str]:
    """A name for each row of reply ids (N, R): the same texts have the same one in all runs."""
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in ids]


def reference_weights(loss: PreferenceLoss, policy: Scores, refs: Scores, target: Tensor) -> Tensor:
    """Weight (B, K) of each pair's gradient if one reference alone decided it."""
    rows, num_refs = refs.sums.shape[:2]
    one_hot = F.one_hot(torch.arange(num_refs), num_refs).to(refs.sums)
    return torch.stack(
        [loss.pair_weights(policy, refs, alpha.expand(rows, -1), target) for alpha in one_hot],
        dim=1,
    )


def write_test_pairs(
    path: Path,
    ids: np.ndarray,
    slugs: Sequence[str],
    refs: Scores,
    before: Scores,
    after: Scores,
    target: Tensor,
    loss: PreferenceLoss,
) -> None:
    """A row a test pair. Margins are in nats per token; ``tokens`` is chosen minus rejected reply;
    ``weight`` that of ``reference_weights`` under the trained policy.

    ``ids``: (N, R); ``refs``: (N, K, R); ``before``, ``after``: the policy's scores (N, R), all
    with the same labels. Of a list, ``tokens`` is weighted as its margin is.
    """
    columns: dict[str, object] = {
        "pair": pair_names(ids),
        "margin_before": before.margins(target).numpy(),
        "margin": after.margins(target).numpy(),
    }
    margins, weights = refs.margins(target), reference_weights(loss, after, refs, target)
    tokens = (contrast(target, refs.present).unsqueeze(1) * refs.counts).sum(-1)
    for k, slug in enumerate(slugs):
        columns[f"margin/{slug}"] = margins[:, k].numpy()
        columns[f"weight/{slug}"] = weights[:, k].numpy()
        columns[f"tokens/{slug}"] = tokens[:, k].numpy()
    write_parquet(path, pa.table(columns))
