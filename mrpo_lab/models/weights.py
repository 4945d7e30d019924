"""Model weights: where they are, what identifies their numbers, and loading them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from mrpo_lab import embedded
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.scoring.kernels import KERNELS, fuse
from mrpo_lab.storage import cache, hub
from mrpo_lab.storage.files import write_whole

# transformers shows a bar for every model loaded or saved. Downloads keep theirs.
disable_progress_bar()

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUANTIZATIONS = ("nf4", "int8")


@dataclass(frozen=True, kw_only=True)
class ModelSource(ABC):
    """The weights of a model, and how they are loaded and computed."""

    path: str
    """Hub name, local folder, or ``embedded:NAME`` for a model that the project builds itself."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """PEFT adapter that is added to the weights: local folder or hub name."""
    dtype: str = "bfloat16"
    """float64, float32, bfloat16 or float16."""
    quantization: str | None = None
    """null, nf4 (4-bit NormalFloat, no double quantization) or int8."""
    template: str | None = None
    """plain, chatml or a .jinja file in place of the tokenizer's own chat template."""
    trust_remote_code: bool = False
    kernels: str = "auto"
    """``off`` computes with plain transformers and peft: slower, and the same within rounding."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"quantization must be null or one of {', '.join(QUANTIZATIONS)}, "
                f"got {self.quantization!r}"
            )
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels must be {' or '.join(KERNELS)}, got {self.kernels!r}")

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name in messages and files."""

    @property
    def folder(self) -> Path:
        """Local folder with the weights, downloaded or built if necessary."""
        return locate(self.path, self.revision)

    def fetch(self) -> None:
        """Download or build the weights and the adapter, unless they are in local folders."""
        _ = self.folder
        if self.adapter:
            locate(self.adapter)

    @cached_property
    def tokenization(self) -> Tokenization:
        """The model's tokenizer and template."""
        return Tokenization(self.name, self.folder, self.template, self.trust_remote_code)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the model's log-probabilities of given tokens, found without loading it."""
        adapter = {"adapter": weights_hash(locate(self.adapter))} if self.adapter else {}
        # Only "off" is named, so that keys of scores stored before the setting existed stay valid.
        kernels = {} if self.kernels == "auto" else {"kernels": self.kernels}
        return {
            "weights": weights_hash(self.folder),
            "dtype": self.dtype,
            "quantization": self.quantization,
            **adapter,
            **kernels,
        }

    def load(self, device: torch.device) -> nn.Module:
        """The model in evaluation mode on ``device`` with frozen weights, its layers fused unless
        ``kernels`` is off.

        Raises:
            UserError: see ``read``.
        """
        return self.fused(self.read(device).requires_grad_(False))

    def fused(self, model: nn.Module) -> nn.Module:
        """``model`` with faster layers put in place, unless ``kernels`` is off; see ``fuse``."""
        if self.kernels == "auto":
            fuse(model)
        return model

    def read(self, device: torch.device) -> nn.Module:
        """The model as transformers and peft make it, in evaluation mode on ``device``.

        Raises:
            UserError: not a causal language model in safetensors, or an adapter that does not fit.
        """
        dtype = DTYPES[self.dtype]
        quantized = {
            None: None,
            "nf4": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            ),
            "int8": BitsAndBytesConfig(load_in_8bit=True),
        }[self.quantization]
        # int8 and nf4 weights are placed while loading; the others are moved afterwards.
        placed = {"device_map": {"": device}} if quantized else {}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype,
                quantization_config=quantized,
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
                **placed,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.path}: cannot be loaded: {first_line(error)}") from error
        if self.adapter:
            model = with_adapter(model, self.adapter, self.path)
        model.eval()
        placed_model: nn.Module = model if quantized else model.to(device)
        return placed_model


def with_adapter(model: Any, adapter: str, base: str) -> Any:
    """``model`` with a PEFT adapter.

    Raises:
        UserError: there is no adapter, or one of its tensors has no place in the model.
    """
    import peft
    from safetensors import safe_open

    folder = locate(adapter)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"adapter {adapter}: there is no {file.name} in {folder}")
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder, use_safetensors=True)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"adapter {adapter} does not fit {base}: {first_line(error)}") from error
    placed = peft.get_peft_model_state_dict(adapted)
    with safe_open(file, framework="pt") as tensors:
        stray = sorted(set(tensors.keys()) ^ set(placed))
    if stray:
        raise UserError(
            f"adapter {adapter} does not fit {base}: {len(stray)} tensors have no counterpart, "
            f"first {stray[0]}"
        )
    return adapted


def locate(path: str, revision: str | None = None) -> Path:
    """Local folder of a model that is given as a folder, a hub name or ``embedded:NAME``.

    Raises:
        UserError: there is no such folder, or the hub does not give the model.
    """
    if path.startswith("embedded:"):
        return embedded.folder(path.removeprefix("embedded:"))
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"there is no model folder {path}")
    mirror = Path(os.environ.get("MRPO_LAB_MODELS", "")) / path
    if "MRPO_LAB_MODELS" in os.environ and mirror.is_dir():
        return mirror
    return hub.snapshot(path, revision)


def weights_hash(folder: Path) -> str:
    """sha256 of the names and contents of a folder's weights and model configuration.

    Raises:
        UserError: the folder has no weights in the safetensors format.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors weights there")
    for file in [*files, *(folder / name for name in ("config.json", "adapter_config.json"))]:
        if file.is_file():
            digest.update(f"{file.name}\0{_content_hash(file)}\0".encode())
    return digest.hexdigest()


def _content_hash(file: Path) -> str:
    """sha256 of a file, kept in the cache for as long as the file's size and time stay the same."""
    real = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # the hub's cache names large files by their sha256
    stat = real.stat()
    stamp = [str(real), stat.st_size, stat.st_mtime_ns]
    memo = cache.root() / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError):
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with real.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    with suppress(OSError):  # without it the file is only hashed again
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memo, json.dumps({"stamp": stamp, "sha256": sha256}).encode())
    return sha256
