"""Output through rich: formatted on a terminal, plain text everywhere else."""

from __future__ import annotations

import io
import sys

from rich.console import Console, RenderableType
from rich.table import Table

UNLIMITED = 100_000
"""Width in characters of plain text: wider than any line, so that nothing is wrapped or cut."""


def text_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines, to be filled with ``add_row``; cells are plain text.

    Args:
        columns: headers.
        right: those of them whose cells are aligned to the right.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold")  # never "...", names stay whole
    return table


def plain_text(renderable: RenderableType) -> str:
    """The text of ``renderable`` without colors, wrapping or trailing spaces."""
    console = Console(
        file=io.StringIO(), width=UNLIMITED, color_system=None, highlight=False, markup=False
    )
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(renderable: RenderableType) -> None:
    """Print to stdout: formatted for its width on a terminal, as ``plain_text`` elsewhere."""
    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(renderable)
    else:
        print(plain_text(renderable), flush=True)
