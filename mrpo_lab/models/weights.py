"""Model weights: where they are, what identifies their numbers, and loading them."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from mrpo_lab import embedded
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.models.adapters import check_adapter, with_adapter
from mrpo_lab.models.loading import (
    META,
    check_files,
    load_config,
    load_model,
    stored_quantization,
)
from mrpo_lab.scoring.kernels import KERNELS, fuse
from mrpo_lab.scoring.limits import check_rows, max_positions
from mrpo_lab.storage import hub
from mrpo_lab.storage.contents import content_hash
from mrpo_lab.storage.files import local_path

# transformers shows a bar for every model loaded or saved. Downloads keep theirs.
disable_progress_bar()

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUANTIZATIONS = ("nf4", "int8")
SMALL = 2**30
"""Size of the weights in bytes below which the gate loads a model twice."""
CONFIGURATIONS = (
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "quantize_config.json",
)
"""Files beside the weights that decide what a model computes."""


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
            UserError: not a complete causal language model in safetensors, or an adapter that does
                not fit; see ``load_model`` and ``with_adapter``.
        """
        self.check_files()
        model = self._model(device, self.quantization)
        if self.adapter:
            model = with_adapter(model, locate(self.adapter), self.adapter, self.path)
        return model.eval()

    def _model(self, device: torch.device, quantization: str | None) -> nn.Module:
        return load_model(
            self.folder,
            path=self.path,
            dtype=DTYPES[self.dtype],
            quantization=quantization,
            trust_remote_code=self.trust_remote_code,
            device=device,
        )

    @cached_property
    def config(self) -> Any:
        """The model's ``config.json`` as transformers reads it; see ``load_config``."""
        return load_config(self.folder, self.path, self.trust_remote_code)

    @property
    def positions(self) -> int | None:
        """Largest number of tokens that the model was made for; see ``max_positions``."""
        return max_positions(self.config)

    @property
    def quantized(self) -> bool:
        """Whether the model computes with quantized weights, by setting or as they are stored."""
        return bool(self.quantization or stored_quantization(self.folder))

    def check_files(self) -> None:
        """Check the files of the model and of its adapter by their headers.

        Raises:
            UserError: see ``loading.check_files`` and ``check_adapter``; or a quantization is set
                for weights that are stored quantized.
        """
        check_files(self.folder, self.path)
        if self.quantization and (stored := stored_quantization(self.folder)):
            raise UserError(
                f"{self.name}: {self.path} is stored quantized by {stored}: set quantization=null, "
                "and it is loaded as its own config.json says"
            )
        if self.adapter:
            check_adapter(locate(self.adapter), self.adapter)

    def check(self) -> None:
        """Check all that can be checked without reading the weights, in about a second: files,
        names and shapes of all tensors, and that the template's tokens have embeddings.

        Raises:
            UserError: see ``read``.
        """
        self.check_files()
        if not stored_quantization(self.folder):  # its shapes are known from its numbers only
            self._model(META, quantization=None)
        item = Item(({"role": "user", "content": "a"},), ("b",))
        for rows in self.tokenization.rows([item]):
            self.check_rows(rows or ())

    def check_rows(self, rows: Iterable[TokenRow]) -> None:
        """Check that the model can be given ``rows``, by its configuration.

        Raises:
            UserError: see ``limits.check_rows``.
        """
        vocabulary = getattr(self.config, "vocab_size", None)
        check_rows(rows, f"{self.name}: {self.folder}", self.positions, vocabulary)

    @property
    def is_small(self) -> bool:
        """Whether loading the model costs next to nothing."""
        return sum(f.stat().st_size for f in self.folder.glob("*.safetensors")) < SMALL


def locate(path: str, revision: str | None = None) -> Path:
    """Local folder of a model that is given as a folder, a hub name or ``embedded:NAME``.

    Raises:
        UserError: there is no such folder, or the hub does not give the model.
    """
    if path.startswith("embedded:"):
        return embedded.folder(path.removeprefix("embedded:"))
    local = local_path(path)
    if local.is_dir():
        return local
    if path.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"there is no model folder {path}")
    if (models := os.environ.get("MRPO_LAB_MODELS", "").strip()) and (
        mirror := local_path(models) / path
    ).is_dir():
        return mirror
    return hub.snapshot(path, revision)


def weights_hash(folder: Path) -> str:
    """sha256 of the names and contents of all that a model is made of: weights, their index, the
    configuration, and the code that comes with the model.

    Raises:
        UserError: the folder has no weights in the safetensors format.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors weights there")
    others = [folder / name for name in CONFIGURATIONS]
    for file in [*files, *others, *sorted(folder.glob("*.py"))]:
        if file.is_file():
            digest.update(f"{file.name}\0{content_hash(file)}\0".encode())
    return digest.hexdigest()
