"""Faster forms of a model's layers, each accepted only where it computes the same numbers.

``fuse`` is the only entry: it replaces the ``forward`` of single layers and leaves every layer that
is different in any way to transformers or peft.
"""

from __future__ import annotations

from torch import nn

from mrpo_lab.scoring.backend import backend_for
from mrpo_lab.scoring.kernels import lora, norms, swiglu

KERNELS = ("auto", "off")
"""``auto``: fused layers, packed rows and chunked logits wherever the model allows them.
``off``: plain transformers and peft, to check a number or to find a fault."""


def fuse(model: nn.Module) -> None:
    """Replace the forward of all layers of ``model`` that a faster one fits, in place.

    Call it once, when the model is complete: on its device, with its adapters, in evaluation mode,
    and with ``requires_grad`` set, since RMS norms are replaced only where they are frozen. Forward
    results stay the same to the last bits; LoRA's sum is rounded to the model's dtype once less.
    On a device whose backend fuses no layers, nothing is replaced.
    """
    first = next(model.parameters())
    if not backend_for(first.device, first.dtype).fuses_layers:
        return
    if hasattr(model, "peft_config"):
        lora.fuse(model)
    norms.fuse(model)
    swiglu.fuse(model)
