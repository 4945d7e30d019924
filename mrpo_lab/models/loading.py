"""From a folder of weights to a model that has all of them, or a refusal that names the fault."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from mrpo_lab.errors import UserError, first_line
from mrpo_lab.scoring.memory import fitting, is_out_of_memory
from mrpo_lab.storage.model_files import check_small_files, read_object

META = torch.device("meta")
"""The device on which a model has shapes and no numbers: loading there takes no memory."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of safetensors that are numbers as they stand; others need a scale, which is elsewhere."""
QUANTIZED_BY = ("quantization_config", "compression_config")
"""Keys of config.json that say how weights are quantized as stored."""
NAMED = 4
"""Number of tensors that a message names; of the others it says how many there are."""
LFS_POINTER = b"version https://git-lfs"


def load_model(
    folder: Path,
    *,
    path: str,
    dtype: torch.dtype,
    quantization: str | None,
    trust_remote_code: bool,
    device: torch.device,
) -> nn.Module:
    """The model as transformers makes it, in evaluation mode on ``device``.

    A checkpoint that is stored quantized is loaded as its own config.json says.

    Args:
        path: what messages call the model.
        quantization: nf4 or int8 to quantize the weights while loading.
        device: on ``META`` shapes and names are checked without reading any number.

    Raises:
        UserError: not a causal language model in safetensors; or a tensor is missing, has no place
            in the model, or has another shape, where transformers would fill it at random; or
            weights are not finite, or quantized in a way that transformers does not know, or do not
            fit into memory.
    """
    if device != META and quantization:  # whose numbers show no longer what they were made of
        for file in sorted(folder.glob("*.safetensors")):
            check_finite(file, path)
    settings: dict[str, Any] = {}
    if quantization:
        settings["quantization_config"] = _bitsandbytes(quantization, dtype)
    # Quantized weights are placed while loading; the others are moved afterwards.
    placed = bool(quantization or stored_quantization(folder)) or device == META
    if placed:
        settings["device_map"] = {"": device}
    unfit = f"{path}: a model of dtype {str(dtype).removeprefix('torch.')}"
    with fitting(unfit, "choose a smaller dtype or model, or set quantization"), _no_report():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # so that the report names them all
                output_loading_info=True,
                **settings,
            )
        # What a folder of somebody else's makes transformers raise is of any class.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{path}: cannot be loaded: {first_line(error)}") from error
        model, report = loaded
        stored = stored_quantization(folder)
        if stored and getattr(model, "hf_quantizer", None) is None:
            raise UserError(
                f"{path}: transformers does not know {stored}, by which config.json says that the "
                "weights are quantized: they would be read as raw numbers"
            )
        _check_report(path, model, report, device)
        model.eval()
        on_device: nn.Module = model if placed else model.to(device)
        if device != META:
            _check_finite(on_device.named_parameters(), f"{path}: {folder}")
        return on_device


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _check_report(
    path: str, model: nn.Module, report: dict[str, Any], device: torch.device
) -> None:
    """Refuse a model whose tensors are not exactly those of its checkpoint."""
    mismatched = [
        f"{name} ({list(stored)} stored, {list(wanted)} by config.json)"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unread = [name for name, tensor in tensors.items() if tensor.device == META != device]
    for what, names in (
        ("lacks {} of the model's tensors", sorted(report["missing_keys"])),
        ("has {} tensors of another shape", mismatched),
        ("has {} tensors that have no place in the model", sorted(report["unexpected_keys"])),
        ("left {} of the model's tensors without numbers", unread),
        ("could not be read: {} errors", list(report["error_msgs"])),
    ):
        if names:
            raise UserError(
                f"{path}: the checkpoint {what.format(len(names))}: {_some(names)}; "
                "give a complete checkpoint of this architecture"
            )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from printing its table of missing tensors; the refusal names them."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def read_config(folder: Path, path: str) -> dict[str, Any]:
    """The content of a model folder's config.json.

    Raises:
        UserError: there is none, it is no JSON object, or a part of it that must be one is none.
    """
    config = read_object(folder / "config.json", path)
    for key in ("text_config", *QUANTIZED_BY):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{path}: {folder / 'config.json'}: {key} is not a JSON object")
    return config


def stored_quantization(folder: Path) -> str | None:
    """The method by which a checkpoint's weights are quantized as stored, or None."""
    config = read_config(folder, str(folder))
    for part in (config, config.get("text_config") or {}):
        for key in QUANTIZED_BY:
            if isinstance(how := part.get(key), dict) and how:
                return str(how.get("quant_method") or "bitsandbytes")
    return None


def check_files(folder: Path, path: str) -> None:
    """Check that a folder holds whole weights of a model, by their headers only.

    Raises:
        UserError: a file is missing, cut off or a Git LFS pointer; the folder is that of an
            adapter; or weights are integers without a quantization in config.json.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: this is an adapter, not a model: give its base model as path and "
            f"adapter={path}"
        )
    read_config(folder, path)
    check_small_files(folder, path)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: cannot be loaded: no .safetensors weights in {folder}")
    integers_are_quantized = stored_quantization(folder) is not None
    for file in files:
        for name, dtype in tensor_types(file, path).items():
            if name.endswith("weight") and dtype not in FLOATS and not integers_are_quantized:
                raise UserError(
                    f"{path}: {name} in {file} is stored as {dtype}, and config.json names no "
                    "quantization_config that says what it stands for"
                )
    _check_tokenizer(folder / "tokenizer.json", path)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        shards = read_object(index, path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            raise UserError(f"{path}: {index} is damaged (no weight_map): download it again")
        if absent := sorted({*shards.values()} - {file.name for file in files}):
            raise UserError(f"{path}: {folder} lacks {_some(absent)}: download it again")


def _check_tokenizer(file: Path, path: str) -> None:
    if file.is_file() and not {"model", "added_tokens"} <= read_object(file, path).keys():
        raise UserError(f"{path}: {file} is damaged (it holds no tokenizer): download it again")


def check_finite(file: Path, path: str) -> None:
    """Read the weights in a safetensors file and check that all of them are finite.

    Raises:
        UserError: names the tensor that is not.
    """
    with safe_open(file, framework="pt") as tensors:
        _check_finite(((n, tensors.get_tensor(n)) for n in tensors.keys()), f"{path}: {file}")  # noqa: SIM118


def _check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    for name, tensor in tensors:
        # Masks may be infinite, and integers and numbers of 8 bits are scaled elsewhere.
        scaled = not tensor.is_floating_point() or tensor.element_size() == 1
        if scaled or not name.endswith(("weight", "bias")):
            continue
        # Where the sum is finite all are; it takes a hundredth of the time.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{where}: {name} has NaN or infinite weights in {dtype}: download it again, or "
                "choose a wider dtype"
            )


def tensor_types(file: Path, path: str) -> dict[str, str]:
    """The type of each tensor in a safetensors file, such as F32, by name.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        try:
            with file.open("rb") as content:
                pointer = content.read(len(LFS_POINTER)) == LFS_POINTER
        except OSError:
            pointer = False
        problem = "a Git LFS pointer, not the weights" if pointer else first_line(error)
        raise UserError(f"{path}: {file} is damaged ({problem}): download it again") from error


def load_config(folder: Path, path: str, trust_remote_code: bool) -> Any:
    """The configuration of the language model in a folder.

    Raises:
        UserError: transformers does not know it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any class, as in load_model
        raise UserError(f"{path}: config.json cannot be used: {first_line(error)}") from error
    return config.get_text_config()
