"""Fused layers give the numbers and gradients of transformers and peft."""

from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from harness import replaced
from test_packing import OTHERS
from test_scoring import CONFIGS, build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mrpo_lab.scoring.kernels import lora, norms, swiglu

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
IDS = torch.tensor([[5, 9, 2, 44, 7], [3, 3, 60, 1, 8]])


def adapted(dtype: torch.dtype, **options: Any) -> Any:
    """A frozen llama with an adapter that does something."""
    model = build(AutoModelForCausalLM.from_config(CONFIGS["llama"])).to(dtype)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA | options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def adapter_gradient(model: Any) -> Tensor:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    (
        logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    ).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


class TestLoRA:
    def test_the_same_numbers_and_gradients(self) -> None:
        theirs = adapted(torch.float64)
        ours = deepcopy(theirs)
        lora.fuse(ours)
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
        expected = adapter_gradient(theirs)
        assert expected.abs().max() > 1
        torch.testing.assert_close(adapter_gradient(ours), expected, rtol=1e-9, atol=1e-9)

    def test_16_bit_is_as_near_the_truth_as_autocast(self) -> None:
        """One layer: its output, and the gradients of its input and of the adapter."""
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(96, 64))
        model: Any = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["0"]))
        layer = model.base_model.model[0]
        layer.lora_B["default"].weight.data.normal_(0, 0.3)
        x, above = torch.randn(200, 96), torch.randn(200, 64)

        def numbers(layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
            leaf = x.to(dtype).requires_grad_()
            out = layer(leaf)
            layer.zero_grad()
            out.backward(above.to(dtype))
            trained = [p.grad for p in layer.parameters() if p.requires_grad]
            return [tensor.double() for tensor in (out, leaf.grad, *trained) if tensor is not None]

        exact = numbers(deepcopy(layer).double(), torch.float64)
        layer.base_layer.bfloat16()  # the adapter stays in float32, as in training
        with torch.autocast("cpu", torch.bfloat16):
            theirs = numbers(layer, torch.bfloat16)
        lora.fuse(layer)
        ours = numbers(layer, torch.bfloat16)
        assert len(exact) == 4
        for right, their, our in zip(exact, theirs, ours, strict=True):
            errors = [float((found - right).detach().norm()) for found in (our, their)]
            assert errors[0] < 1.1 * errors[1] < 0.011 * float(right.detach().norm())

    def test_adapters_can_be_switched_off_and_merged(self) -> None:
        model = adapted(torch.float64)
        lora.fuse(model)
        with_adapter = model(input_ids=IDS).logits
        with model.disable_adapter():
            without = model(input_ids=IDS).logits
        base = build(AutoModelForCausalLM.from_config(CONFIGS["llama"])).double()
        torch.testing.assert_close(without, base(input_ids=IDS).logits)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, with_adapter)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, with_adapter)

    @pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}])
    def test_what_is_more_than_lora_stays_pefts(self, options: dict[str, Any]) -> None:
        model = adapted(torch.float32, **options)
        lora.fuse(model)
        assert not replaced(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_norms_are_the_same_to_the_last_bit_or_nearly(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS.get(name) or OTHERS[name]
    theirs = build(AutoModelForCausalLM.from_config(config)).to(dtype).requires_grad_(False)
    ours = deepcopy(theirs)
    norms.fuse(ours)
    expected = {n for n, layer in ours.named_modules() if type(layer).__name__.endswith("RMSNorm")}
    if dtype == torch.bfloat16 and name not in ("llama", "qwen3"):
        expected = set()  # they multiply by the weight before they round
    assert set(replaced(ours)) == expected
    pairs = zip(theirs.named_modules(), ours.modules(), strict=True)
    for layer, other in [(a, b) for (n, a), b in pairs if n in expected]:
        weight: Any = layer.weight
        x = torch.randn(3, 5, len(weight), generator=torch.Generator().manual_seed(0)).to(dtype)
        slopes = []
        for module in (layer, other):
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)).sum().backward()
            slopes.append(leaf.grad)
        near = 1e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(other(x), layer(x), rtol=near, atol=near)
        torch.testing.assert_close(slopes[1], slopes[0], rtol=near, atol=2 * near)


@pytest.mark.parametrize("width", [576, 896, 4096])
def test_norms_of_real_widths_are_taken_over(width: int) -> None:
    """Where a sum of so many squares may round to another last bit."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = LlamaRMSNorm(width)
        layer.weight = nn.Parameter(torch.linspace(0.3, 1.7, width).to(dtype), requires_grad=False)
        model = nn.Sequential(layer)
        norms.fuse(model)
        assert replaced(model) == ["0"]


def test_norms_that_are_trained_or_of_another_kind_are_left_alone() -> None:
    trained = build(AutoModelForCausalLM.from_config(CONFIGS["llama"])).requires_grad_(True)
    norms.fuse(trained)
    layered = build(AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"])).requires_grad_(False)
    norms.fuse(layered)
    assert replaced(trained) == replaced(layered) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_swiglu_is_the_same_and_other_activations_are_left_alone(
    name: str, dtype: torch.dtype
) -> None:
    theirs = build(AutoModelForCausalLM.from_config(CONFIGS[name])).to(dtype)
    ours = deepcopy(theirs)
    swiglu.fuse(ours)
    layers = [n for n, _ in ours.named_modules() if n.endswith(".mlp")]
    assert replaced(ours) == (layers if name in ("llama", "qwen3") else [])
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    expected = adapter_gradient(theirs)
    near = 1e-12 if dtype == torch.float64 else 0.02
    assert float((adapter_gradient(ours) - expected).norm()) < near * float(expected.norm())


def test_swiglu_keeps_less_for_the_backward_pass() -> None:
    gate, up = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu.swiglu(gate, up)
    assert kept == [40, 40]
    assert torch.autograd.gradcheck(
        swiglu.swiglu, [x.detach().double().requires_grad_() for x in (gate, up)]
    )
