"""Output through rich: formatted on a terminal, plain text everywhere else."""

from __future__ import annotations

import io
import sys
from typing import Any

from rich.console import Console, JustifyMethod, RenderableType
from rich.table import Table

UNLIMITED = 100_000
"""Width in characters of plain text: wider than any line, so that nothing is wrapped or cut."""
LITERAL: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Options of a console that prints names as they are: "[x]" and ":x:" mean nothing special."""


def text_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines, to be filled with ``add_row``; cells are plain text.

    Args:
        columns: headers.
        right: those of them whose cells are aligned to the right.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        # Narrow terminals fold long cells over several lines; "..." would hide names.
        side: JustifyMethod = "right" if column in right else "left"
        table.add_column(column, justify=side, overflow="fold")
    return table


def plain_text(renderable: RenderableType) -> str:
    """The text of ``renderable`` without colors, wrapping or trailing spaces."""
    console = Console(file=io.StringIO(), width=UNLIMITED, color_system=None, **LITERAL)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(renderable: RenderableType) -> None:
    """Print to stdout: formatted for its width on a terminal, as ``plain_text`` elsewhere."""
    if sys.stdout.isatty():
        # Lines are left to the terminal to wrap, so that a long name can be copied as one word.
        Console(**LITERAL).print(renderable, soft_wrap=not isinstance(renderable, Table))
    else:
        print(plain_text(renderable), flush=True)
