"""Checkpoint files: nested dicts, lists, tensors and numbers in one safetensors file, no pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrpo_lab.storage.checksums import CHECKSUM, DIFFERS, DamagedError, sha256
from mrpo_lab.storage.files import replacing

logger = logging.getLogger(__name__)


def save_state(path: Path, state: dict[Any, Any]) -> None:
    """Write ``state`` atomically: an interruption leaves the former file in place.

    Raises:
        OSError: it cannot be written; no draft is left.
    """
    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_outline(state, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        save_file(tensors, draft, metadata={"state": outline, CHECKSUM: _digest(outline, tensors)})


def load_state(path: Path) -> dict[Any, Any]:
    """Read what ``save_state`` wrote, with tensors on the CPU.

    Raises:
        DamagedError: the file is not as it was written, or was written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        outline = metadata["state"]
        if metadata.keys() == {"state"}:
            logger.info("%s is of an earlier version, without a checksum: unverified", path)
        elif metadata.get(CHECKSUM) != _digest(outline, tensors):
            raise ValueError(DIFFERS)
        state = _restore(json.loads(outline), tensors)
        if not isinstance(state, dict):
            raise TypeError("it holds no state")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(path, error, "delete it to start this run over") from error
    return state


def _digest(outline: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the outline and the name, type, shape and content of every tensor."""
    parts: list[bytes | memoryview] = [outline.encode()]
    for name, tensor in sorted(tensors.items()):
        parts.append(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256(*parts)


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; its tensors are collected in ``tensors`` under numbered names."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        # As pairs, since an optimizer's state has integer keys and JSON has none.
        return {"dict": [[key, _outline(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_outline(item, tensors) for item in value]
    return value


def _restore(outline: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(outline, dict):
        if "tensor" in outline:
            return tensors[outline["tensor"]]
        return {key: _restore(item, tensors) for key, item in outline["dict"]}
    if isinstance(outline, list):
        return [_restore(item, tensors) for item in outline]
    return outline
