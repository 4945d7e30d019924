"""``python -m benchmarks [FILE ...]``: speed and memory beside TRL on the same pairs.

Every measurement is a process of its own. Log-probabilities are compared before times are printed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from benchmarks.results import print_table, surroundings
from benchmarks.workload import Workload, measure
from mrpo_lab.storage.files import path_argument

TOKENS = {"float32": 512, "bfloat16": 1536}
"""Number of tokens in a forward pass of this project. More are up to 7 % faster and take more
memory."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
"""Largest relative difference of a pair's log-probabilities from the plain computation."""


@dataclass(frozen=True)
class Row:
    """This project beside another program."""

    what: str
    ours: str
    theirs: str
    ratio: float

    def cells(self) -> list[str]:
        """The comparison as a row of a table."""
        return [self.what, self.ours, self.theirs, f"{self.ratio:.2f}"]


def compare(work: Workload) -> Iterator[Row]:
    """Compare training, then scoring.

    Raises:
        SystemExit: log-probabilities differ from those of a plain computation.
    """
    tokens = TOKENS[work.dtype]
    ours = measure("ours_training", tokens, work)
    assert ours["packs"]
    peak = measure("peak", 0, work)["flops_per_second"]
    small, default = (measure("trl_training", size, work) for size in (1, work.batch))
    best = max(small, default, key=lambda trl: trl["pairs_per_second"])
    name = f"{work.name()}, {work.dtype}"
    yield speed(f"training, {name}", ours, best)
    yield memory(f"memory, {name}, TRL at its best", ours, best)
    yield memory(f"memory, {name}, TRL at micro-batch {work.batch}", ours, default)
    # Shared machines change their speed by the minute, so the faster of two readings counts.
    peak = max(peak, measure("peak", 0, work)["flops_per_second"])
    share = ours["flops_per_second"] / peak
    yield Row(
        f"share of the matmul peak, {name}",
        f"{ours['flops_per_second'] / 1e9:.0f} GFLOP/s",
        f"{peak / 1e9:.0f} GFLOP/s",
        share,
    )
    ours = measure("ours_scoring", 2 * tokens, work)
    plain = measure("plain_scoring", 2 * tokens, work)
    trl = measure("trl_scoring", 1, work)
    apart = difference(ours["logps"], plain["logps"])
    if not apart < TOLERANCE[work.dtype]:
        raise SystemExit(f"{name}: log-probabilities differ from the plain ones by {apart:.2g}")
    yield speed(f"scoring, {name}, beside TRL's", ours, trl)
    yield speed(f"scoring, {name}, beside plain batches", ours, plain)


def difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Largest relative difference between two sets of log-probabilities of pairs."""
    return max(
        abs(a - b) / abs(b)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine, other, strict=True)
    )


def speed(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Row:
    """Compare pairs per second; a ratio above 1 means that this project is faster."""
    a, b = ours["pairs_per_second"], theirs["pairs_per_second"]
    return Row(what, f"{a:.2f} pairs/s", f"{b:.2f} pairs/s", a / b)


def memory(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Row:
    """Compare peak memory; a ratio below 1 means that this project takes less."""
    a, b = ours["peak_gib"], theirs["peak_gib"]
    return Row(what, f"{a:.2f} GiB", f"{b:.2f} GiB", a / b)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    starter = resources.files("mrpo_lab") / "embedded" / "starter.jsonl"
    parser.add_argument("files", nargs="*", default=[str(starter)], help="preference pairs")
    parser.add_argument("--model", default="embedded:smollm2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=TOKENS)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="pairs an optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=path_argument, help="also write all numbers to this JSON file"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    rows: list[Row] = []

    def cells() -> Iterator[list[str]]:
        for file in options.files:
            work = Workload(
                data=file,
                model=options.model,
                dtype="float32",
                max_tokens=options.max_tokens,
                batch=options.batch,
                steps=options.steps,
                threads=options.threads,
            )
            for dtype in options.dtypes:
                for row in compare(replace(work, dtype=dtype)):
                    rows.append(row)
                    yield row.cells()

    print_table(["what", "this project", "the other", "ratio"], cells())
    if options.out:
        content = {**surroundings(), "rows": [vars(row) for row in rows]}
        options.out.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
