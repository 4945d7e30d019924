"""Values that no setting can have, whatever it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mrpo_lab.console import UNPRINTABLE
from mrpo_lab.redaction import holds_secret

MAGNITUDES = (1e-30, 1e30)
"""Magnitudes that a number other than 0 may have, so that float32 can hold what is made of it."""
MAX_INTEGER = 2**63 - 1


def unusable(node: Any, path: str = "") -> Iterator[str]:
    """Yield the problems of all values in a tree of dicts and lists, each with its key.

    Numbers must be finite and of a magnitude within ``MAGNITUDES``. Texts must not be empty, hold
    control characters, or look like a key or a password.
    """
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            if UNPRINTABLE.search(str(key)):
                yield f"{path or 'configuration'}: a key has control characters: {key!r}"
            else:
                yield from unusable(child, f"{path}.{key}".lstrip("."))
    elif isinstance(node, str) and not node.strip():
        yield f"{path}: expected text, got {node!r}" + ("; null means none" if "." in path else "")
    elif isinstance(node, str):
        yield from unsafe_text(node, path)
    elif isinstance(node, float) and not math.isfinite(node):
        yield f"{path}: expected a finite number, got {node}"
    elif isinstance(node, float) and node and not MAGNITUDES[0] <= abs(node) <= MAGNITUDES[1]:
        yield f"{path}: expected a number between 1e-30 and 1e30 in magnitude, or 0, got {node}"
    elif isinstance(node, int) and abs(node) > MAX_INTEGER:
        yield f"{path}: expected a number below 2 to the power of 63, got {node}"


def unsafe_text(text: str, path: str) -> Iterator[str]:
    """Yield why a text must be neither shown on a terminal nor stored with a run."""
    if UNPRINTABLE.search(text):
        yield f"{path}: expected text without control characters, got {text!r}"
    key = path.rpartition(".")[2]
    if holds_secret(f"{key}={text}" if key == "revision" else text):
        yield (
            f"{path} looks like a key or a password, which would be stored with the run: set "
            "HF_TOKEN or WANDB_API_KEY in the environment instead"
        )
