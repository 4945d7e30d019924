"""A program for a user namespace: the cache on a disk that grows by a few pages at a time, and is
read-only now and then. It prints what was said, as JSON; tests/test_edges.py looks at it."""

import gc
import json
import os
import random
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from launchers.scores import write_scored_marker
from mrpo_lab.data.reading import read_rows
from mrpo_lab.embedded.datasets import SyntheticDataset
from mrpo_lab.errors import UserError
from mrpo_lab.models.references import ReferenceSet


def mount(disk: Path, options: str) -> None:
    gc.collect()  # a file that is open for writing keeps a disk from being made read-only
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)


def scores(refs: ReferenceSet) -> np.ndarray | str:
    """All that a run writes to the cache; the scores, or what was said."""
    dataset: Any = SyntheticDataset(pairs=3, train=None, val=1, test=1, max_tokens=200)
    try:
        tokenizers = [reference.tokenization for reference in refs.all]
        data = dataset.prepare(dataset.read(), tokenizers, np.random.default_rng(0))
        found = refs.scores(data.items, data.ids, torch.device("cpu")).scores.sums.numpy()
        write_scored_marker("key", "one", 6)
    except UserError as error:
        return str(error)
    return np.asarray(found)


def rows(folder: Path) -> str:
    """What is said of a data set that ``datasets`` copies to its own cache; empty if it is read."""
    try:
        list(read_rows(str(folder)))
    except UserError as error:
        return str(error)
    return ""


def main(disk: Path, model: str, folder: Path, seed: int) -> None:
    os.environ["MRPO_LAB_CACHE"] = str(disk / "cache")
    entries = [{"slug": "one", "path": model}]
    refs = ReferenceSet(entries=entries, dtype="float32", gate="warn")
    said: list[str] = []
    drafts: list[str] = []
    mount(disk, "size=4k")
    chance, pages = random.Random(seed), 0
    for attempt in count():
        if attempt % 5 == 0:
            mount(disk, "remount,ro")
            said.append(str(scores(refs)))
        pages += chance.choice((1, 2, 3))
        mount(disk, f"remount,rw,size={4 * pages}k")
        found = scores(refs)
        drafts += map(str, disk.rglob(".*.tmp"))
        if not isinstance(found, str):
            break
        said.append(found)
    mount(disk, "remount,rw,size=60m")
    os.environ["MRPO_LAB_CACHE"] = str(disk / "undisturbed")
    same = bool(np.array_equal(found, scores(refs)))
    datasets.config.HF_DATASETS_CACHE = disk / "hf"
    hub = []
    for size in ("16k", "64k", "256k", "1m"):
        subprocess.run(["umount", "-l", disk], check=True)
        mount(disk, f"size={size}")
        hub.append(rows(folder))
    mount(disk, "remount,ro")
    hub.append(rows(folder))
    mount(disk, "remount,rw,size=60m")
    hub.append(rows(folder))
    print(json.dumps({"said": said, "drafts": drafts, "same": same, "hub": hub}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
