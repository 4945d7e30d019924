"""Output through rich: formatted on a terminal, plain text everywhere else."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table

UNLIMITED = 100_000
"""Width in characters of plain text: wider than any line, so that nothing is wrapped or cut."""
LITERAL: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Options of a console that prints names as they are: "[x]" and ":x:" mean nothing special."""
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that change a terminal, or the order in which it shows the others; not tab or newline.
"""


def printable(text: str) -> str:
    """``text`` with control characters as escape sequences of Python: ESC becomes ``\\x1b``."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class TerminalConsole(Console):
    """A console on which names and texts of runs cannot control the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**LITERAL, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class PrintableRecord(logging.LogRecord):
    """A log record whose message cannot control the terminal."""

    def getMessage(self) -> str:  # noqa: N802
        return printable(super().getMessage())


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
    console = TerminalConsole(file=io.StringIO(), width=UNLIMITED, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(renderable: RenderableType) -> None:
    """Print to stdout: formatted for its width on a terminal, as ``plain_text`` elsewhere."""
    if sys.stdout.isatty():
        # Lines are left to the terminal to wrap, so that a long name can be copied as one word.
        TerminalConsole().print(renderable, soft_wrap=not isinstance(renderable, Table))
    else:
        print(plain_text(renderable), flush=True)
