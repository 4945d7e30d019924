"""Tables for people: with lines and colors on a terminal, as plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(table: Table) -> None:
    """Print a table: through rich on a terminal, as ``plain_table`` into a pipe or a file."""
    if sys.stdout.isatty():
        Console().print(table)
    else:
        print(plain_table(table), flush=True)


def plain_table(table: Table) -> str:
    """A table of text cells as plain text: columns of their full width, two spaces apart, no
    boxes."""
    columns = [[column.header, *column.cells] for column in table.columns]
    texts = [[_plain(cell) for cell in column] for column in columns]
    right = [column.justify == "right" for column in table.columns]
    widths = [max(map(len, column)) for column in texts]
    return "\n".join(_line(row, widths, right) for row in zip(*texts, strict=True))


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if aligned else cell.ljust(width)
        for cell, width, aligned in zip(cells, widths, right, strict=True)
    )
    return "  ".join(padded).rstrip()


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
