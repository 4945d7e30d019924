"""Which reference scores a run needs, and whether the store has them, told without loading a model.

The store itself knows replies. What a dispatcher knows is a configuration; so whoever has scored
what a configuration asks for leaves a mark under the hash of that part of it. A mark that is gone
or wrong costs time alone: a run scores by itself what the store then lacks.
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
from mrpo_lab.storage.files import write_whole

TOKENIZED_BY = ("path", "revision", "template", "trust_remote_code")
"""Of a policy, what decides which pairs are eligible."""


@dataclass(frozen=True)
class Need:
    """The scores of one reference on the pairs of one data set."""

    key: str
    slug: str
    path: str


def needs(sections: Mapping[str, Any]) -> list[Need]:
    """Of a run with these ``dataset``, ``model`` and ``reference_set``, in the set's order."""
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
        Need(_hash({**texts, "reference": entry}), str(entry["slug"]), str(entry["path"]))
        for entry in entries
        if entry["slug"] in used
    ]


def mark(key: str) -> Path:
    return cache.root() / "scored" / f"{key}.json"


def put_mark(key: str, slug: str, pairs: int) -> None:
    mark(key).parent.mkdir(parents=True, exist_ok=True)
    write_whole(mark(key), json.dumps({"slug": slug, "pairs": pairs}).encode())


def billions(slug: str, path: str, told: Mapping[str, float]) -> float:
    """Parameters of a model: as the profile tells, by its weights on disk, by its name; infinite
    where nothing says."""
    if slug in told:
        return float(told[slug])
    if path.startswith("embedded:"):
        return 0.2
    files = list(Path(path).expanduser().glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files) / 2e9  # two bytes each, as a rule
    named = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", path.replace("-", " "))
    return float(named[-1]) if named else float("inf")


def _stamp(path: Any) -> list[list[Any]]:
    """Sizes and times of a local data set's files; a hub data set has none."""
    if not isinstance(path, str) or not Path(path).expanduser().exists():
        return []
    place = Path(path).expanduser()
    files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
