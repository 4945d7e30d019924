"""Checkpoint files: nested dicts, lists, tensors and numbers in one safetensors file, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrpo_lab.errors import UserError
from mrpo_lab.storage.files import replacing


def save_state(path: Path, state: dict[Any, Any]) -> None:
    """Write ``state`` atomically: an interruption leaves the former file in place.

    Raises:
        OSError: it cannot be written; no draft is left.
    """
    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_outline(state, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        save_file(tensors, draft, metadata={"state": outline})


def load_state(path: Path) -> dict[Any, Any]:
    """Read what ``save_state`` wrote, with tensors on the CPU.

    Raises:
        UserError: the file is truncated or was written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            outline = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = _restore(outline, tensors)
        if not isinstance(state, dict):
            raise TypeError("it holds no state")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): delete it to start this run over") from error
    return state


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
