"""``python -m benchmarks.memory [PAIRS ...]``: what a process takes that prepares so many pairs.

From rows to splits as a run does it: read, tokenized (nothing is in the store yet) and filtered,
all eligible pairs the pool. Every count is a fresh process with all that a run imports. A million
pairs take six minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

BYTES = 1.5e9
"""What a million pairs may take, libraries included."""


class Taken(NamedTuple):
    before: int
    """Bytes, at most, of the imported libraries."""
    peak: int
    """Bytes, at most, of the whole process."""
    eligible: int
    seconds: float
    """Of its processor time, imports left out."""


def measure(pairs: int, model: str) -> Taken:
    """In a fresh process.

    Raises:
        SystemExit: it failed, with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(pairs), "--model", model, "--here"],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{pairs} pairs: failed")
    return Taken(*json.loads(done.stdout.splitlines()[-1]))


def prepare(pairs: int, model: str) -> Taken:
    """In this process."""
    from mrpo_lab.progress import quiet_libraries

    quiet_libraries()
    import mrpo_lab.experiment  # noqa: F401  as a run does
    from mrpo_lab.embedded.datasets import SyntheticDataset
    from mrpo_lab.models.policy import PolicyConfig
    from mrpo_lab.storage import cache

    tokenization = PolicyConfig(path=model, dtype="float32").tokenization
    dataset = SyntheticDataset(pairs=pairs, train=None, val=0.1, test=0.2, max_tokens=256)
    before, began = peak(), time.process_time()
    with TemporaryDirectory(dir=cache.root()) as empty:
        os.environ["MRPO_LAB_CACHE"] = empty
        prepared = dataset.prepare(dataset.read(), [tokenization], np.random.default_rng(0))
    return Taken(before, peak(), len(prepared.items), time.process_time() - began)


def peak() -> int:
    """Most bytes that this process held since it began; its parent's do not count."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "this needs Linux"
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("pairs", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--model", default="embedded:tiny7/tiny-qwen2", help="whose tokenizer")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(prepare(options.pairs[0], options.model)))
        return
    print("| pairs | eligible | peak memory | of it libraries | seconds |", flush=True)
    print("| --- | --- | --- | --- | --- |", flush=True)
    for pairs in options.pairs:
        found = measure(pairs, options.model)
        sizes = f"{found.peak / 1e9:.2f} GB | {found.before / 1e9:.2f} GB"
        print(f"| {pairs:,} | {found.eligible:,} | {sizes} | {found.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
