"""What a model's forward and backward pass cost per token, found by running them on no data.

The program's own layers run on torch's meta device, where tensors have a shape and no numbers, and
every operation is recorded. So the counts are of the code as it is, for any model that it can pack.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.simulate.layouts import rows_of
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.models.adapters import lora_config
from mrpo_lab.scoring import attention
from mrpo_lab.scoring.head import Head
from mrpo_lab.scoring.kernels import fuse
from mrpo_lab.scoring.packing import pack

META = torch.device("meta")
TOKENS = (32, 64, 96)
"""Lengths of the observed rows: costs are a quadratic function of the length, by attention."""
LAYERS = (1, 2)
"""Numbers of observed layers: costs are a linear function of the number of layers."""
PER_LAYER = ("layer_types", "max_window_layers")
"""Keys of a configuration that a model with fewer layers derives anew."""


class Counts(NamedTuple):
    """What some operations cost."""

    flops: float
    """Floating point operations of matrix products."""
    moved: float
    """Bytes that all other operations read and write."""
    launches: float
    """Number of operations that are kernels on a GPU."""
    saved: float
    """Bytes of activations kept for the backward pass."""
    peak: float
    """Most bytes held at once of all that operations without gradients make."""


class Cost(NamedTuple):
    """The cost of a body's pass: a function of its tokens and of the pairs that attention sees."""

    token: Counts
    """For each token."""
    pair: Counts
    """For each pair of a query and a key, over all layers."""
    once: Counts
    """For the pass itself."""

    @property
    def launches(self) -> float:
        return self.once.launches


@dataclass(frozen=True)
class Shape:
    """A model, as far as its cost depends on it."""

    hidden: int
    """Width of the hidden states."""
    vocabulary: int
    """Number of logits."""
    layers: int
    linear: int
    """Number of weights of linear layers, which quantization applies to; the head is none."""
    parameters: int
    """Number of all parameters without LoRA's, a tied output embedding counted once."""
    trained: int
    """Number of trained parameters; 0 for a reference."""
    head_trained: bool
    """Whether the output embedding is trained, by itself or as the input embedding."""
    scoring: Cost
    """A forward pass without gradients, up to the output embedding."""
    training: Cost
    """A forward and a backward pass."""
    checkpointed: Cost
    """The same with gradient checkpointing."""

    @property
    def lora(self) -> bool:
        return bool(self.trained) and not self.head_trained

    @classmethod
    def of(cls, config: Mapping[str, Any], train: bool = False, lora: Any = None) -> Shape:
        """The shape of the model that a config.json describes.

        Args:
            config: the content of config.json; ``model_type`` and sizes are enough.
            train: whether the model is a policy: then ``lora`` has the keys of peft's LoraConfig,
                or is None, which trains all weights.

        Raises:
            UserError: the model cannot be built from ``config``, or is not one that can be packed.
        """
        try:
            with warnings.catch_warnings(action="ignore"):
                few, more = (_observed(config, count, train, lora) for count in LAYERS)
            layers = int(read_config(config).num_hidden_layers)
        except UserError:
            raise
        except Exception as error:  # of any class: the configuration is somebody else's
            kind = config.get("model_type")
            raise UserError(
                f"a model of type {kind!r} is not counted: {first_line(error)}"
            ) from error

        def extended(a: Any, b: Any) -> Any:
            """The value at ``layers`` layers, of numbers or of tuples of them."""
            if isinstance(a, tuple):
                values = [extended(*both) for both in zip(a, b, strict=True)]
                return type(a)(*values)
            return a + (layers - LAYERS[0]) * (b - a) // (LAYERS[1] - LAYERS[0])

        same = ("hidden", "vocabulary", "head_trained")
        return cls(
            layers=layers,
            **{key: few[key] for key in same},
            **{key: extended(few[key], more[key]) for key in few if key not in same},
        )


COMPARISONS = (torch.ops.aten.allclose.default, torch.ops.aten._local_scalar_dense.default)
"""Operations whose result is a number of Python's."""


class Recorder(TorchDispatchMode):
    """Counts operations as they run. On the meta device, where nothing can be compared, all numbers
    are taken to agree, so that layers are fused as they are with real weights."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.moved, self.launches, self.saved, self.peak = 0, 0, 0, 0, 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COMPARISONS and args[0].is_meta:
            return True
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not torch.is_grad_enabled():
            self._hold(given, made)
        if self._is_kernel(func, given, made):
            self.launches += 1
            packet = func._overloadpacket
            if packet in PRODUCTS:
                self.flops += PRODUCTS[packet](*args, **kwargs, out_val=out)
            else:  # of the table of embeddings only the rows that are asked for are read
                read = made if packet is torch.ops.aten.embedding else given
                self.moved += sum(
                    map(_bytes, {id(tensor): tensor for tensor in read + made}.values())
                )
        return out

    @property
    def counts(self) -> Counts:
        return Counts(self.flops, self.moved, self.launches, self.saved, self.peak)

    def _hold(self, given: list[Tensor], made: list[Tensor]) -> None:
        """Add the memory of new tensors to what is held, and forget what is held no longer."""
        before = {_storage(tensor) for tensor in given}
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for tensor in made:
            storage = tensor.untyped_storage()
            if _storage(tensor) not in before:
                self._held[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))

    @staticmethod
    def _is_kernel(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether the operation computes something, and does not only reserve or view memory."""
        if "empty" in func._opname or not made:
            return False
        before = {_storage(tensor) for tensor in given}
        return func._schema.is_mutable or not all(_storage(tensor) in before for tensor in made)


def _in_place(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> int:
    """The operations of ``addmm_``, which torch's counter does not know."""
    return 2 * prod(a.shape) * b.shape[-1]


PRODUCTS: dict[Any, Callable[..., int]] = {**flop_registry, torch.ops.aten.addmm_: _in_place}
"""Operations of each matrix product."""


@cache
def head_cost(training: bool, trained: bool) -> Counts:
    """What each logit costs besides the projection, and each chunk of logits in kernels.

    Observed on a small output embedding with real numbers: the number of logits at once depends on
    the device, and it has none for ``meta``.
    """
    positions, vocabulary = 32, 64
    head = Head(nn.Linear(8, vocabulary, bias=False, dtype=torch.bfloat16), vocabulary)
    head.projection.requires_grad_(trained)
    hidden = torch.zeros(positions, 8, dtype=torch.bfloat16, requires_grad=training)
    with torch.set_grad_enabled(training), Recorder() as recorder:
        logps = head.token_logps(hidden, torch.zeros(positions, dtype=torch.int64))
        if training:
            logps.sum().backward()
    counts: Counts = recorder.counts
    return counts._replace(flops=0, moved=counts.moved / (positions * vocabulary))


def _observed(config: Mapping[str, Any], layers: int, train: bool, lora: Any) -> dict[str, Any]:
    """The fields of ``Shape`` for a model with so many layers."""
    causal = _built({**config, "num_hidden_layers": layers})
    linear = _linear_weights(causal)
    parameters = sum(p.numel() for p in causal.parameters())
    model: Any = causal.requires_grad_(train and lora is None)
    if train and lora is not None:
        import peft

        with META:
            model = peft.get_peft_model(model, lora_config(lora))
    with Recorder():
        fuse(model.eval())
    attention.install(causal.config.get_text_config())
    head = causal.get_output_embeddings()
    scoring = _cost(causal, torch.no_grad())
    training = _cost(causal, torch.enable_grad()) if train else scoring
    checkpointed = training
    if train:
        causal.activation_checkpointing_enable({"use_reentrant": False})
        checkpointed = _cost(causal.train(), torch.enable_grad())
    return {
        "hidden": head.in_features,
        "vocabulary": head.out_features,
        "linear": linear,
        "parameters": parameters,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head_trained": head.weight.requires_grad,
        "scoring": scoring,
        "training": training,
        "checkpointed": checkpointed,
    }


def read_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration from the content of a config.json."""
    from transformers import AutoConfig

    if "model_type" not in config:
        raise UserError("config.json: model_type: required")
    kept = {key: value for key, value in config.items() if key not in ("model_type", *PER_LAYER)}
    return AutoConfig.for_model(config["model_type"], **kept)


def _built(config: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    with META:
        return AutoModelForCausalLM.from_config(read_config(config), dtype=torch.bfloat16)


def _linear_weights(causal: Any) -> int:
    """Number of weights of all linear layers but the output embedding.

    Raises:
        UserError: there are other weights that are multiplied, whose products may not be seen.
    """
    embeddings = {id(causal.get_output_embeddings().weight)}
    linear = 0
    for name, module in causal.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
        for key, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and id(weight) not in embeddings:
                linear += weight.numel() if key == "weight" else 0
            elif weight.ndim > 1 and id(weight) not in embeddings:
                raise UserError(
                    f"{type(causal).__name__} is not counted: {name}.{key} is no weight of a "
                    "linear layer"
                )
    return linear


def _cost(causal: Any, mode: AbstractContextManager[object]) -> Cost:
    """A quadratic function through the costs at ``TOKENS``."""
    with mode:
        observed = np.array([_pass(causal, tokens) for tokens in TOKENS], dtype=np.float64)
    powers = np.vander(TOKENS, 3, increasing=True).astype(np.float64)
    once, token, pair = np.linalg.solve(powers, observed).round(6)
    return Cost(Counts(*token.tolist()), Counts(*pair.tolist()), Counts(*once.tolist()))


def _pass(causal: Any, tokens: int) -> Counts:
    """The cost of one row, which is one block of attention: each query meets each key."""
    packed = pack([rows_of([tokens // 4, tokens // 4, tokens // 2])], META)
    causal.zero_grad()  # the first gradient is written, further ones are added
    saved: dict[int, Tensor] = {}
    parameters = {_storage(parameter) for parameter in causal.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in parameters:
            saved[_storage(tensor)] = tensor
        return tensor

    with Recorder() as recorder, saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = causal.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # As in the program: a mask with four axes keeps transformers from making one.
            attention_mask=torch.ones(1, 1, 1, 1, device=META),
            layout=packed.layout,
            use_cache=False,
        ).last_hidden_state
        recorder.saved = sum(map(_bytes, saved.values()))
        saved.clear()
        if hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden))
    counts: Counts = recorder.counts
    return counts


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """Bytes of memory that a tensor is spread over; an expanded one repeats none."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
