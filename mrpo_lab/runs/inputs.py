"""The local files that a run is made from: its result is not shown for other files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mrpo_lab.runs.reading import read_sessions
from mrpo_lab.storage.contents import tree_hash
from mrpo_lab.storage.files import local_path

KEYS = ("path", "adapter", "template")
"""Keys of data sets and models that name a file or a folder."""


def local_inputs(config: Mapping[str, Any]) -> dict[str, str]:
    """Hash of each local file or folder that a configuration names, by its key.

    Args:
        config: a resolved configuration. Names on the hub, embedded models and references that are
            not in use have no entry.
    """
    return {key: tree_hash(path) for key, path in _local(config)}


def changed_inputs(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Describe every local file that is not what the run in ``folder`` was made from.

    Empty for runs that were written before their inputs were recorded. Files that do not exist any
    more count as unchanged: the result can still be looked at.
    """
    sessions = read_sessions(folder)
    recorded = sessions[-1].get("inputs", {}) if sessions else {}
    if not recorded:
        return []
    return [
        f"{key}: {path} has changed: its {'data' if key == 'dataset.path' else 'contents'} are "
        f"not those of the run in {folder}"
        for key, path in _local(config)
        if key in recorded and tree_hash(path) != recorded[key]
    ]


def _local(config: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Key and path of every local file or folder that is an input."""
    references = config["reference_set"]
    nodes = {"dataset": config["dataset"], "model": config["model"]}
    for number, entry in enumerate(references["entries"]):
        if references.get("use") is None or entry["slug"] in references["use"]:
            nodes[f"reference_set.entries.{number}"] = entry
    for name, node in nodes.items():
        for key in KEYS:
            given = node.get(key)
            if isinstance(given, str) and local_path(given).exists():
                yield f"{name}.{key}", local_path(given)
