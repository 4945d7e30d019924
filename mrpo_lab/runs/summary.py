"""Summary of a finished run for the terminal: accuracies, alpha, cost, and where the files are."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from mrpo_lab.console import show, text_table

ACCURACY_COLUMNS = ("", "before", "after", "gain")
REFERENCE_COLUMNS = ("reference", "mean alpha", "val acc.", "test acc.", "mean |d|")


def print_summary(folder: Path, result: Mapping[str, Any]) -> None:
    """Print the summary: as tables on a terminal, as the text of ``summary`` elsewhere."""
    if not sys.stdout.isatty():
        show(summary(folder, result))
        return
    show("")
    show(_table(ACCURACY_COLUMNS, _accuracy_rows(result)))
    show("")
    show(_table(REFERENCE_COLUMNS, _reference_rows(result)))
    show("\n".join([*_samples(result), "", *_cost(folder, result)]))


def summary(folder: Path, result: Mapping[str, Any]) -> str:
    """The summary as plain text."""
    return "\n".join(
        [
            "",
            f"{'before':>25}{'after':>9}",
            *(
                f"{name:<17}{before:>8}{after:>9}   ({gain} points)"
                for name, before, after, gain in _accuracy_rows(result)
            ),
            "",
            _reference_line(REFERENCE_COLUMNS),
            *map(_reference_line, _reference_rows(result)),
            *_samples(result),
            "",
            *_cost(folder, result),
        ]
    )


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Table:
    table = text_table(*columns, right=columns[1:])
    for row in rows:
        table.add_row(*row)
    return table


def _accuracy_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Split, accuracy before and after training, gain in percentage points."""
    for split in ("val", "test"):
        before, after = result[f"base/{split}_accuracy"], result[f"{split}/accuracy"]
        gain = f"{100 * (after - before):+.1f}"
        yield f"{split} accuracy", f"{before:.3f}", f"{after:.3f}", gain


def _reference_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Slug, mean alpha, accuracies, and mean magnitude of the margin in nats per token."""
    keys = ("mean_alpha", "val_accuracy", "test_accuracy", "test_mean_abs_margin")
    for slug, reference in result["references"].items():
        yield slug, *(f"{reference[key]:.3f}" for key in keys)


def _reference_line(cells: tuple[str, ...]) -> str:
    return f"{cells[0]:<24}" + "".join(f"{cell:>10}" for cell in cells[1:])


def _samples(result: Mapping[str, Any]) -> Iterator[str]:
    """Sampled prompts with the policy's replies before and after training."""
    for sample in result.get("samples", ()):
        yield ""
        for label in ("prompt", "before", "after"):
            text = textwrap.shorten(sample[label], width=400, placeholder=" ...")
            yield textwrap.fill(f"{label + ':':<8}{text}", width=96, subsequent_indent=" " * 8)


def _cost(folder: Path, result: Mapping[str, Any]) -> list[str]:
    return [
        f"{result['steps']} steps in {result['wall_seconds']:.1f} s "
        f"({result['pairs_per_second']:.1f} pairs/s, evaluations included), "
        f"peak memory {result['peak_memory_gib']:.2f} GiB",
        f"{folder}/: result.json, metrics.jsonl, alpha.parquet, adapter/",
    ]
