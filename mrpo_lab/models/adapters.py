"""Adapters of peft: on the weights of a reference, and for training the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrpo_lab.errors import UserError, first_line
from mrpo_lab.models.loading import FLOATS, check_finite, tensor_types
from mrpo_lab.storage.model_files import check_small_files

WEIGHTS = "adapter_model.safetensors"
NEED_DATA = ("eva", "lora_ga", "corda")
"""Values of ``init_lora_weights`` for which peft must be given examples first."""
CHANGE_BASE = ("pissa", "olora", "loftq")
"""Beginnings of the values that change the base weights, which is also found by their numbers."""
SAMPLED = 4096
"""Number of entries of each base weight by which a change of it is found."""


def check_adapter(folder: Path, adapter: str) -> None:
    """Check what can be known of an adapter without its base model.

    Raises:
        UserError: files are missing or damaged, or the adapter acts in peft's own forward pass
            (see ``acts_outside_layers``).
    """
    import peft

    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"adapter {adapter}: there is no {file.name} in {folder}")
    check_small_files(folder, f"adapter {adapter}")
    types = tensor_types(file, f"adapter {adapter}")
    if odd := [name for name, dtype in types.items() if dtype not in FLOATS]:
        raise UserError(f"adapter {adapter}: {odd[0]} in {file} is stored as {types[odd[0]]}")
    check_finite(file, f"adapter {adapter}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of any class: the file is somebody else's
        raise UserError(
            f"adapter {adapter}: {folder}/adapter_config.json cannot be used: {first_line(error)}"
        ) from error
    if kind := acts_outside_layers(config):
        raise UserError(
            f"adapter {adapter}: {kind} acts in peft's own forward pass and not in the model's "
            "layers, which is not supported: merge it, or use an adapter such as LoRA"
        )


def acts_outside_layers(config: Any) -> str | None:
    """The kind of an adapter that changes the model's inputs or depends on all of them, rather
    than acting in layers: virtual tokens, and LoRA that begins at a token (aLoRA). None for others.
    """
    if config.is_prompt_learning:
        return str(config.peft_type.value)
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return "aLoRA (alora_invocation_tokens)"
    return None


def with_adapter(model: Any, folder: Path, adapter: str, base: str) -> Any:
    """``model`` with the adapter in ``folder``.

    Raises:
        UserError: there is no adapter, or one of its tensors has no place in the model.
    """
    import peft

    check_adapter(folder, adapter)
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    except Exception as error:  # of any class, by what the two do not agree in
        raise UserError(f"adapter {adapter} does not fit {base}: {first_line(error)}") from error
    names = set(tensor_types(folder / WEIGHTS, f"adapter {adapter}"))
    # An adapter may bring the embeddings with it; peft loads them over the base model's.
    placed = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    embeddings = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=True)) - placed
    stray = sorted((names ^ placed) - (names & embeddings))
    if stray:
        raise UserError(
            f"adapter {adapter} does not fit {base}: {len(stray)} tensors have no counterpart, "
            f"first {stray[0]}"
        )
    return adapted


def lora_config(lora: dict[str, Any]) -> Any:
    """peft's configuration of ``model.lora``.

    Raises:
        UserError: peft refuses it, or it would not train, or the saved adapter would not give the
            run's numbers.
    """
    import peft

    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    except Exception as error:  # of any class, by the value
        raise UserError(f"model.lora: {first_line(error)}") from error
    if kind := acts_outside_layers(config):
        raise UserError(f"model.lora: {kind} is not supported: it would not be trained")
    init = str(config.init_lora_weights).lower()
    if init.startswith(NEED_DATA):
        raise UserError(
            f"model.lora: init_lora_weights={init} needs examples, which peft is not given here: "
            "use true, gaussian or orthogonal"
        )
    if init.startswith(CHANGE_BASE):
        raise _changes_base(init)
    return config


def _changes_base(init: str) -> UserError:
    return UserError(
        f"model.lora: init_lora_weights={init} changes the base weights, without which the saved "
        "adapter gives other numbers: use true, gaussian or orthogonal"
    )


def with_lora(model: nn.Module, lora: dict[str, Any], seed: int) -> nn.Module:
    """``model`` with a new LoRA adapter, initialized by ``seed``.

    Raises:
        UserError: peft refuses ``lora``; or the initialization changes the base weights, so that
            the saved adapter could not be used with the base model as it is.
    """
    import peft

    config = lora_config(lora)
    # By layer: peft keeps the layers, and changes their weights in place or replaces them.
    layers = [layer for layer in model.modules() if layer._parameters]
    before = [_sampled(layer) for layer in layers]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted: nn.Module = peft.get_peft_model(model, config)
        except Exception as error:  # of any class, by the value
            raise UserError(f"model.lora: {first_line(error)}") from error
    for layer, samples in zip(layers, before, strict=True):
        if not all(map(torch.equal, _sampled(layer), samples)):
            raise _changes_base(str(config.init_lora_weights))
    return adapted


def _sampled(layer: nn.Module) -> list[Tensor]:
    """Copies of entries that are evenly spread over each weight of a layer."""
    flat = [
        weight.detach().flatten() for weight in layer._parameters.values() if weight is not None
    ]
    return [weight[:: max(1, len(weight) // SAMPLED)].clone() for weight in flat]
