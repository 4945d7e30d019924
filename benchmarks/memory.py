"""``python -m benchmarks.memory [PAIRS ...]``: peak memory of preparing so many pairs.

Pairs are read, tokenized (with an empty store), filtered and split as a run does it, and all
eligible ones are the pool. Each number of pairs is a process of its own that imports what a run
imports. A million pairs take six minutes on one core.
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
"""The target: most bytes that a million pairs may take, libraries included."""


class Usage(NamedTuple):
    """Memory and time of preparing pairs."""

    before: int
    """Peak bytes after importing libraries."""
    peak: int
    """Peak bytes of the whole process."""
    eligible: int
    """Number of pairs that pass the filters."""
    seconds: float
    """Processor time without imports."""


def measure(pairs: int, model: str) -> Usage:
    """Prepare so many pairs in a process of its own.

    Raises:
        SystemExit: the process failed; its errors are on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(pairs), "--model", model, "--here"],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{pairs} pairs: failed")
    return Usage(*json.loads(done.stdout.splitlines()[-1]))


def prepare(pairs: int, model: str) -> Usage:
    """Prepare so many pairs in this process."""
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
    return Usage(before, peak(), len(prepared.items), time.process_time() - began)


def peak() -> int:
    """Peak bytes of this process, without those of its parent."""
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
    from benchmarks.results import print_table  # it imports torch, which must not count above

    used = ((pairs, measure(pairs, options.model)) for pairs in options.pairs)
    print_table(
        ["pairs", "eligible", "peak memory", "of it libraries", "seconds"],
        (
            [
                f"{pairs:,}",
                f"{usage.eligible:,}",
                f"{usage.peak / 1e9:.2f} GB",
                f"{usage.before / 1e9:.2f} GB",
                f"{usage.seconds:.0f}",
            ]
            for pairs, usage in used
        ),
    )


if __name__ == "__main__":
    main()
