"""``test_pairs.parquet``: margins on each test pair, by which runs are compared."""

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
    """A name for each row of ids (N, R): the same texts have the same name in all runs."""
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in ids]


def reference_weights(loss: PreferenceLoss, policy: Scores, refs: Scores, target: Tensor) -> Tensor:
    """Weight (B, K) of each pair's gradient if one reference alone decided it.

    Policy scores (B, R) and refs (B, K, R) are in the unit of the loss.
    """
    rows, num_refs = refs.sums.shape[:2]
    one_hot = F.one_hot(torch.arange(num_refs), num_refs).to(refs.sums)
    return torch.stack(
        [loss.pair_weights(policy, refs, alpha.expand(rows, -1), target) for alpha in one_hot],
        dim=1,
    )


def write_test_pairs(
    path: Path,
    ids: np.ndarray,
    prompts: np.ndarray,
    slugs: Sequence[str],
    refs: Scores,
    before: Scores,
    after: Scores,
    target: Tensor,
    weights: Tensor,
) -> None:
    """Write one row per test pair.

    Columns: ``pair`` (its name), ``prompt`` (the name of its prompt), ``margin_before`` and
    ``margin`` (the policy's margin before and after training), and for each reference its
    ``margin/SLUG``, ``weight/SLUG`` (see ``reference_weights``, under the trained policy) and
    ``tokens/SLUG`` (length of the chosen reply minus that of the rejected one, in the reference's
    own tokens; for a list weighted as its margin is). Margins are in nats per token.

    Args:
        ids: reply ids (N, R).
        prompts: prompt ids (N,).
        slugs: names of the K references.
        refs: scores (N, K, R) of the references.
        before, after: scores (N, R) of the policy before and after training.
        target: how much each reply is to be preferred (N, R).
        weights: ``reference_weights`` (N, K) under the trained policy.
    """
    columns: dict[str, object] = {
        "pair": pair_names(ids),
        "prompt": pair_names(prompts[:, None]),
        "margin_before": before.margins(target).numpy(),
        "margin": after.margins(target).numpy(),
    }
    margins = refs.margins(target)
    tokens = (contrast(target, refs.present).unsqueeze(1) * refs.counts).sum(-1)
    for k, slug in enumerate(slugs):
        columns[f"margin/{slug}"] = margins[:, k].numpy()
        columns[f"weight/{slug}"] = weights[:, k].numpy()
        columns[f"tokens/{slug}"] = tokens[:, k].numpy()
    write_parquet(path, pa.table(columns))
