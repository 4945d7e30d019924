"""Which reference scores a run needs, and whether they exist, without loading a model.

The store of scores is indexed by replies, but the dispatching process knows only a configuration.
So a job that has scored a reference for a configuration writes a marker file, named by the hash of
the part of the configuration that decides the scores. A marker that is missing or wrong only costs
time: a run scores by itself what it does not find in the store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrpo_lab.storage import cache
from mrpo_lab.storage.checksums import DamagedError, read_json, without_checksum, write_json
from mrpo_lab.storage.files import local_path

TOKENIZED_BY = ("path", "revision", "template", "trust_remote_code")
"""Keys of ``model`` that decide how texts are tokenized, and thereby which pairs are kept."""


@dataclass(frozen=True)
class RequiredScores:
    """The scores of one reference on the pairs of one data set, which a run needs."""

    key: str
    """Hash of all configuration that decides these scores."""
    slug: str
    """Short name of the reference."""
    path: str
    """Path or hub name of the reference."""


def required_scores(sections: Mapping[str, Any]) -> list[RequiredScores]:
    """List the scores that a run needs, in the order of its reference set.

    Args:
        sections: the resolved ``dataset``, ``model`` and ``reference_set`` of the run.
    """
    dataset, model, references = (sections[k] for k in ("dataset", "model", "reference_set"))
    common = {key: references.get(key) for key in ("dtype", "quantization")}
    if references.get("kernels", "auto") != "auto":  # marks from before the setting stay valid
        common["kernels"] = "off"
    entries = [{**common, **entry} for entry in references["entries"]]
    texts = {
        "dataset": dataset,
        "files": _stamp(dataset.get("path")),
        "policy": {key: model.get(key) for key in TOKENIZED_BY},
        "tokenizers": entries,
    }
    used = references.get("use") or [entry["slug"] for entry in entries]
    return [
        RequiredScores(_hash({**texts, "reference": entry}), str(entry["slug"]), str(entry["path"]))
        for entry in entries
        if entry["slug"] in used
    ]


def scored_marker(key: str) -> Path:
    """The file that exists once the scores with this key are in the store."""
    return cache.root() / "scored" / f"{key}.json"


def write_scored_marker(key: str, slug: str, pairs: int) -> None:
    """Record that a reference has scored ``pairs`` pairs under this key."""
    marker = scored_marker(key)
    with cache.writing():
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"slug": slug, "pairs": pairs}, bound=True)


def is_scored(key: str) -> bool:
    """Whether the scores with this key are in the store; a damaged marker does not count."""
    try:
        content = read_json(scored_marker(key), bound=True)
    except DamagedError:
        return False
    return without_checksum(content).keys() == {"slug", "pairs"}


def billions_of_parameters(slug: str, path: str, known: Mapping[str, float]) -> float:
    """Estimate the size of a model, in billions of parameters.

    Taken from ``known`` (by slug), else from the size of its weights on disk, else from its name;
    infinite if none of them tells.
    """
    if slug in known:
        return float(known[slug])
    if path.startswith("embedded:"):
        return 0.2
    files = list(local_path(path).glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files) / 2e9  # 16-bit weights, as a rule
    named = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", path.replace("-", " "))
    return float(named[-1]) if named else float("inf")


def _stamp(path: Any) -> list[list[Any]]:
    """Size and modification time of each file of a local data set; empty for one of the hub."""
    if not isinstance(path, str) or not local_path(path).exists():
        return []
    place = local_path(path)
    files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
