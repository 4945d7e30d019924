"""The content of ``result.json``, by which finished runs are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mrpo_lab.models.gate import Finding
from mrpo_lab.runs.trade_off import hypervolumes
from mrpo_lab.training.inputs import Data
from mrpo_lab.training.state import LoopState


def compose_result(
    state: LoopState,
    data: Data,
    mean_lambda: Float[Tensor, " A"],
    *,
    epochs: int,
    trade_off: Sequence[Mapping[str, Any]],
    counts: Mapping[str, int],
    findings: Sequence[Finding],
    setup_seconds: float,
    peak_memory_gib: float,
    samples: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Compose the result of a run that has reached its last step.

    ``val/accuracy``, ``test/accuracy`` (and ranking metrics of lists) are those of the trained
    policy, ``base/...`` those before training. Margins are in nats per token.
    """
    return {
        "status": "finished",
        **state.latest,
        **state.base,
        "references": _references(state, data, mean_lambda),
        "pairs": {name: len(getattr(data, name)) for name in ("train", "val", "test")},
        "steps": state.step,
        "wall_seconds": round(state.seconds, 3),
        "pairs_per_second": round(len(data.train) * epochs / state.seconds, 3),
        "undecided_pairs": state.undecided,
        **({"hypervolume": hypervolumes(trade_off, "pairwise")} if trade_off else {}),
        "counts": dict(counts),
        "gate": [asdict(finding) for finding in findings],
        "setup_seconds": round(setup_seconds, 3),
        "peak_memory_gib": round(peak_memory_gib, 3),
        "samples": [dict(sample) for sample in samples],
    }


def _references(
    state: LoopState, data: Data, mean_lambda: Float[Tensor, " A"]
) -> dict[str, dict[str, float]]:
    """Mean alpha of each reference, and what it says about the held-out pairs by itself."""
    alpha = np.array(state.alpha_sum) / state.step
    found = {slug: {"mean_alpha": float(a)} for slug, a in zip(data.slugs, alpha, strict=True)}
    margins, accuracy = {}, {}
    for name, split in (("val", data.val), ("test", data.test)):
        refs, target = data.refs[split.tolist()], data.target(split.tolist(), mean_lambda)
        margins[name], accuracy[name] = refs.margins(target), refs.accuracy(target)
    for k, slug in enumerate(data.slugs):
        for name in ("val", "test"):
            found[slug][f"{name}_accuracy"] = float(accuracy[name][k])
        for name in ("val", "test"):
            found[slug][f"{name}_mean_abs_margin"] = float(margins[name][:, k].abs().mean())
    return found
