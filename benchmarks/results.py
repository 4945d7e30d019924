"""Results of measurements: tables, targets, and the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from mrpo_lab.console import show

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


@dataclass(frozen=True)
class Result:
    """A measured number and its target, if it has one."""

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high

    def cells(self) -> list[str]:
        """The result as a row of a table."""
        bounds = {"≤": self.at_most, "≥": self.at_least}
        target = " ".join(f"{sign} {b:g}" for sign, b in bounds.items() if b is not None)
        reached = {None: "", True: "yes", False: "no"}[self.reached]
        return [self.what, f"{self.value:.3g} {self.unit}", target, reached]


def report(results: Iterable[Result], out: Path | None, **more: Any) -> list[Result]:
    """Print a table of the results, and write them to ``out`` after each one.

    Args:
        more: other content of ``out``.
    """
    rows: list[Result] = []
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)

    def cells() -> Iterator[list[str]]:
        for result in results:
            rows.append(result)
            if out:
                listed = [{**vars(row), "reached": row.reached} for row in rows]
                content = {**surroundings(), **more, "rows": listed}
                out.write_text(json.dumps(content, indent=2) + "\n")
            yield result.cells()

    print_table(["what", "measured", "target", "reached"], cells())
    return rows


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table on stdout, of all rows there were even if a later one fails; each row
    is shown on stderr as soon as it is measured."""
    table = Table(*columns, box=box.MARKDOWN)
    try:
        for row in rows:
            print(", ".join(filter(None, row)), file=sys.stderr, flush=True)
            table.add_row(*row)
    finally:
        show(table)


def surroundings() -> dict[str, Any]:
    """The machine, the versions of packages and the commit of this repository."""
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        **dict(versions()),
    }


def versions() -> Iterator[tuple[str, str]]:
    """Name and version of each of ``PACKAGES`` that is installed."""
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def processor() -> str:
    """The processor's model name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def git(*arguments: str) -> str | None:
    """The output of a git command, None if it fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()
    return None
