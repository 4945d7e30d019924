"""What was measured, beside its target, and where."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HEADER = "| what | measured | target | reached |\n| --- | --- | --- | --- |"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


@dataclass(frozen=True)
class Result:
    """One row: a number and, if it has one, its bound."""

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.at_most is None and self.at_least is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high

    def __str__(self) -> str:
        bounds = {"≤": self.at_most, "≥": self.at_least}
        target = " ".join(f"{sign} {b:g}" for sign, b in bounds.items() if b is not None)
        reached = {None: "", True: "yes", False: "no"}[self.reached]
        return f"| {self.what} | {self.value:.3g} {self.unit} | {target} | {reached} |"


def report(results: Iterable[Result], out: Path | None, **more: Any) -> list[Result]:
    """Print each row as soon as it is there; after each write all so far to ``out``."""
    print(HEADER, flush=True)
    rows = []
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    for result in results:
        rows.append(result)
        print(result, flush=True)
        if out:
            listed = [{**vars(row), "reached": row.reached} for row in rows]
            content = {**surroundings(), **more, "rows": listed}
            out.write_text(json.dumps(content, indent=2) + "\n")
    return rows


def surroundings() -> dict[str, Any]:
    """Hardware, versions and commit."""
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
    """Of the packages that are installed."""
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def git(*arguments: str) -> str | None:
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
