"""The end of a run, for the terminal: accuracy before and after, alpha, and where things are."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def summary(folder: Path, result: Mapping[str, Any]) -> str:
    """A few lines of plain text."""
    lines = [
        "",
        "                   before    after",
        *(_accuracy(result, split) for split in ("val", "test")),
        "",
        f"{'reference':<24}{'mean alpha':>10}{'val acc.':>10}{'test acc.':>10}{'mean |d|':>10}",
    ]
    for slug, reference in result["references"].items():
        lines.append(
            f"{slug:<24}{reference['mean_alpha']:>10.3f}{reference['val_accuracy']:>10.3f}"
            f"{reference['test_accuracy']:>10.3f}{reference['test_mean_abs_margin']:>10.3f}"
        )
    for sample in result.get("samples", ()):
        lines += ["", _wrapped("prompt", sample["prompt"])]
        lines += [_wrapped(when, sample[when]) for when in ("before", "after")]
    lines += [
        "",
        f"{result['steps']} steps in {result['wall_seconds']:.1f} s "
        f"({result['pairs_per_second']:.1f} pairs/s, evaluations included), "
        f"peak memory {result['peak_memory_gib']:.2f} GiB",
        f"{folder}/: result.json, metrics.jsonl, alpha.parquet, adapter/",
    ]
    return "\n".join(lines)


def _accuracy(result: Mapping[str, Any], split: str) -> str:
    before, after = result[f"base/{split}_accuracy"], result[f"{split}/accuracy"]
    gain = f"({100 * (after - before):+.1f} points)"
    return f"{split + ' accuracy':<17}{before:>8.3f}{after:>9.3f}   {gain}"


def _wrapped(label: str, text: str) -> str:
    short = textwrap.shorten(text, width=400, placeholder=" ...")
    return textwrap.fill(f"{label + ':':<8}{short}", width=96, subsequent_indent=" " * 8)
