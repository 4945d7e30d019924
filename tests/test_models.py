"""Model weights: dtypes, adapters, quantization, kernels, and where weights come from."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from harness import TINY, compose, replaced
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from whole_logits import assert_same_gradient, gradient, slow_score, weighted

from mrpo_lab import configs
from mrpo_lab.data.rows import parse_item
from mrpo_lab.data.texts import TokenRow
from mrpo_lab.embedded.synthetic import synthetic_rows
from mrpo_lab.errors import UserError
from mrpo_lab.models import weights
from mrpo_lab.models.policy import PolicyConfig
from mrpo_lab.models.references import Reference
from mrpo_lab.models.weights import locate, weights_hash
from mrpo_lab.runs.identity import difference
from mrpo_lab.scoring.padding import Side
from mrpo_lab.scoring.scorer import ReplyScorer

CPU = torch.device("cpu")
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "init_lora_weights": "gaussian",
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
SIDES: tuple[Side | None, ...] = ("right", "left", None)
"""None is packed."""


@pytest.fixture
def mistral(tiny7_dir: Path) -> Path:
    return tiny7_dir / "tiny-mistral"


def reference(folder: Path, **options: Any) -> Reference:
    return Reference(**{"slug": "one", "path": str(folder), "dtype": "float32"} | options)


def some_rows(source: Reference | PolicyConfig, pairs: int = 3) -> list[TokenRow]:
    items = [parse_item(row, "") for row in synthetic_rows(pairs, seed=9)]
    return [row for rows in source.tokenization.rows(items) for row in rows or ()]


def scores(model: nn.Module, rows: list[TokenRow], side: Side | None = None) -> Tensor:
    with torch.no_grad():
        scorer = ReplyScorer(model)
        return (scorer.logps([tuple(rows)]) if side is None else scorer.padded_logps(rows, side))[0]


def slow_scores(model: nn.Module, rows: list[TokenRow]) -> Tensor:
    with torch.no_grad():
        return torch.stack([slow_score(model, row) for row in rows])


def trained(model: nn.Module) -> None:
    """Move an adapter away from its start, where it changes nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)


@pytest.fixture(scope="module")
def adapter(tiny7_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter of tiny-mistral on disk."""
    config = PolicyConfig(path=str(tiny7_dir / "tiny-mistral"), dtype="float32", lora=LORA)
    policy = config.build(CPU, seed=0)
    trained(policy.model)
    folder = tmp_path_factory.mktemp("adapter")
    policy.save(folder)
    return folder


class TestAdapters:
    @pytest.mark.parametrize("side", SIDES)
    def test_lora_is_scored_and_trained_through_the_head(
        self, mistral: Path, side: Side | None
    ) -> None:
        config = PolicyConfig(path=str(mistral), dtype="float32", lora=LORA)
        policy, rows = config.build(CPU, seed=0), some_rows(config)
        base = scores(config.load(CPU), rows)
        torch.testing.assert_close(scores(policy.model, rows), base)  # before training, nothing
        trained(policy.model)
        expected = torch.stack([slow_score(policy.model, row) for row in rows])
        scorer = policy.scorer
        found = (scorer.padded_logps(rows, side) if side else scorer.logps([tuple(rows)]))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (found - base).abs().min() > 0.01
        assert set(policy.trainable) == {
            name for name, _ in policy.model.named_parameters() if "lora_" in name
        }
        wanted = gradient(policy.model, weighted(expected))
        assert_same_gradient(gradient(policy.model, weighted(found)), wanted)

    def test_gradient_checkpointing_changes_no_gradient(self, mistral: Path) -> None:
        found = []
        for checkpointing in (False, True):
            config = PolicyConfig(
                path=str(mistral), dtype="float32", lora=LORA, gradient_checkpointing=checkpointing
            )
            policy = config.build(CPU, seed=0)
            trained(policy.model)
            policy.model.train()
            rows = some_rows(config)
            found.append(gradient(policy.model, weighted(policy.scorer.logps([tuple(rows)])[0])))
        assert_same_gradient(*found)

    def test_an_adapter_from_disk_is_the_merged_model(self, mistral: Path, adapter: Path) -> None:
        with_adapter = reference(mistral, adapter=str(adapter))
        model: Any = with_adapter.load(CPU)
        rows = some_rows(with_adapter)
        adapted = scores(model, rows)
        torch.testing.assert_close(adapted, slow_scores(model, rows), rtol=0, atol=1e-4)
        merged = scores(model.merge_and_unload(), rows)
        torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)
        assert (adapted - scores(reference(mistral).load(CPU), rows)).abs().min() > 0.01

    def test_an_adapter_that_does_not_fit_is_refused(
        self, tiny7_dir: Path, adapter: Path, tmp_path: Path
    ) -> None:
        other = reference(tiny7_dir / "tiny-llama", adapter=str(adapter))
        with pytest.raises(UserError, match=r"adapter .* does not fit .*tiny-llama"):
            other.load(CPU)
        stray = shutil.copytree(adapter, tmp_path / "stray")
        tensors = load_file(stray / "adapter_model.safetensors")
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
        save_file(tensors, stray / "adapter_model.safetensors")
        with pytest.raises(UserError, match=r"1 tensors have no counterpart, first .*lm_head"):
            reference(tiny7_dir / "tiny-mistral", adapter=str(stray)).load(CPU)
        (stray / "adapter_model.safetensors").unlink()
        with pytest.raises(UserError, match=r"there is no adapter_model\.safetensors"):
            reference(tiny7_dir / "tiny-mistral", adapter=str(stray)).load(CPU)


class TestQuantized:
    @pytest.mark.parametrize(
        ("quantization", "layer", "tolerance"),
        [("nf4", "Linear4bit", 1e-3), ("int8", "Linear8bitLt", 0.02)],
    )
    def test_scored_as_their_own_logits_say(
        self, mistral: Path, quantization: str, layer: str, tolerance: float
    ) -> None:
        quantized = reference(mistral, quantization=quantization)
        model, rows = quantized.load(CPU), some_rows(quantized)
        kinds = [type(module).__name__ for module in model.modules()]
        assert kinds.count(layer) == 3 * 7  # all projections of three layers, the head not
        found = scores(model, rows)
        torch.testing.assert_close(found, slow_scores(model, rows), rtol=0, atol=tolerance * 20)
        counts = torch.tensor([row.reply_tokens for row in rows])
        apart = ((found - scores(reference(mistral).load(CPU), rows)) / counts).abs()
        assert 1e-5 < apart.max() < 0.2  # quantized, and still the same model

    @pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 1e-6), ("int8", 1e-3)])
    def test_lora_trains_as_on_the_weights_that_the_bits_stand_for(
        self, mistral: Path, quantization: str, tolerance: float
    ) -> None:
        config = PolicyConfig(
            path=str(mistral), dtype="float32", lora=LORA, quantization=quantization
        )
        policy, rows = config.build(CPU, seed=0), some_rows(config)
        base: Any = config.load(CPU)
        exact = peft.get_peft_model(base.dequantize(), peft.LoraConfig(**LORA))
        assert {p.dtype for p in exact.parameters()} == {torch.float32}
        found = []
        for model in (policy.model, exact):
            adapter = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
            generator = torch.Generator().manual_seed(0)
            for parameter in adapter:
                parameter.data.normal_(0, 0.1, generator=generator)
            scorer = ReplyScorer(model.train())
            scorer.score([tuple(rows)], 10**6)  # as a run does before and between its steps
            found.append(gradient(adapter, weighted(scorer.logps([tuple(rows)])[0])))
        assert torch.cosine_similarity(found[0], found[1], dim=0) > 1 - tolerance
        assert found[0].norm() == pytest.approx(float(found[1].norm()), rel=0.02)

    def test_an_adapter_on_quantized_weights(self, mistral: Path, adapter: Path) -> None:
        adapted = reference(mistral, quantization="nf4", adapter=str(adapter))
        model, rows = adapted.load(CPU), some_rows(adapted)
        assert isinstance(model, peft.PeftModel)
        found = scores(model, rows)
        torch.testing.assert_close(found, slow_scores(model, rows), rtol=0, atol=0.02)
        bare = scores(reference(mistral, quantization="nf4").load(CPU), rows)
        assert (found - bare).abs().min() > 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_narrow_dtypes_are_scored_near_float32(mistral: Path, dtype: str, tolerance: float) -> None:
    exact, narrow = reference(mistral), reference(mistral, dtype=dtype)
    rows = some_rows(exact)
    model = narrow.load(CPU)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    counts = torch.tensor([row.reply_tokens for row in rows])
    apart = ((scores(model, rows) - scores(exact.load(CPU), rows)) / counts).abs()
    assert 0 < apart.max() < tolerance


class TestKernels:
    """``kernels=off`` computes with plain transformers and peft."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_nothing_is_replaced_and_scores_agree(
        self, mistral: Path, adapter: Path, dtype: str
    ) -> None:
        near = 1e-5 if dtype == "float32" else 0.1
        lora = {**LORA, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
        rows = some_rows(reference(mistral))
        counts = torch.tensor([row.reply_tokens for row in rows])
        for options in ({"adapter": str(adapter)}, {}):
            found = []
            for kernels in ("auto", "off"):
                plain = kernels == "off"
                source = reference(mistral, dtype=dtype, kernels=kernels, **options)
                model: Any = source.load(CPU)
                self.check(model, scorer := ReplyScorer(model, source.kernels), rows, plain=plain)
                found.append(scorer.score([tuple(rows)], 10**6).sums[0] / counts)
            torch.testing.assert_close(found[0], found[1], rtol=0, atol=near)
        gradients = []
        for kernels in ("auto", "off"):
            config = PolicyConfig(path=str(mistral), dtype=dtype, lora=lora, kernels=kernels)
            policy = config.build(CPU, seed=0)
            trained(policy.model)
            self.check(policy.model, policy.scorer, rows, plain=kernels == "off")
            policy.model.train()
            gradients.append(gradient(policy.model, policy.scorer.logps([tuple(rows)])[0].sum()))
        near = 1e-4 if dtype == "float32" else 0.1
        assert float((gradients[0] - gradients[1]).norm()) < near * float(gradients[1].norm())

    def check(self, model: Any, scorer: ReplyScorer, rows: list[TokenRow], plain: bool) -> None:
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        shapes: list[torch.Size] = []
        hook = causal.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output: shapes.append(output.shape)
        )
        scorer.score([tuple(rows)], 10**6)
        hook.remove()
        width = max(len(row.ids) for row in rows)
        whole_logits = any(shape[:2] == (len(rows), width) for shape in shapes)
        assert whole_logits == plain
        assert (not replaced(model)) == plain
        assert causal.config._attn_implementation == ("sdpa" if plain else "packed_or_sdpa")
        assert scorer.packs != plain

    def test_a_policy_is_fused_once_its_adapter_is_there(self, mistral: Path) -> None:
        lora = {**LORA, "target_modules": "all-linear"}
        config = PolicyConfig(path=str(mistral), dtype="float32", lora=lora)
        names = replaced(config.build(CPU, seed=0).model)
        assert sum(name.endswith("norm") for name in names) == 2 * 3 + 1
        assert sum(name.endswith(".mlp") for name in names) == 3
        assert sum(name.endswith("_proj") for name in names) == 7 * 3
        full = replace(config, lora=None).build(CPU, seed=0).model
        assert {name.rpartition(".")[2] for name in replaced(full)} == {"mlp"}

    def test_layers_are_replaced_on_the_device_of_the_model(
        self, mistral: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a layer keeps, such as a norm's effective weight, must be on that device."""
        seen: list[str] = []
        monkeypatch.setattr(
            weights, "fuse", lambda m: seen.append(next(m.parameters()).device.type)
        )
        reference(mistral).load(torch.device("meta"))
        PolicyConfig(path=str(mistral), dtype="float32").build(CPU, seed=0)
        assert seen == ["meta", "cpu"]

    @pytest.mark.parametrize("value", ["off", False])
    def test_one_key_is_for_models_and_references(self, value: str | bool) -> None:
        cfg = compose(TINY[0])
        before = configs.check(cfg)
        assert before["kernels"] == before["model"]["kernels"] == "auto"
        cfg.kernels = value  # false is how YAML reads the word off
        off = configs.check(cfg)
        assert off["kernels"] == off["model"]["kernels"] == off["reference_set"]["kernels"] == "off"
        assert {r.kernels for r in configs.build(cfg, "reference_set").all} == {"off"}
        assert {line.partition(":")[0] for line in difference(off, before)} == {
            "kernels",
            "model.kernels",
            "reference_set.kernels",
        }
        older = {key: node for key, node in before.items() if key != "kernels"}
        for section in ("model", "reference_set"):
            older[section] = {k: v for k, v in before[section].items() if k != "kernels"}
        assert difference(older, before) == difference(before, older) == []
        assert difference(off, older)

    def test_other_values_are_refused(self, mistral: Path) -> None:
        with pytest.raises(ValueError, match="kernels must be auto or off, got 'fast'"):
            reference(mistral, kernels="fast")
        cfg = compose(TINY[0], "kernels=fast")
        for section in ("model", "reference_set"):
            with pytest.raises(UserError, match=f"^{section}.*kernels must be auto or off"):
                configs.build(cfg, section)


class TestFiles:
    def test_the_hash_is_of_names_and_contents(
        self, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path / "cache"))
        copy = shutil.copytree(mistral, tmp_path / "copy")
        before = weights_hash(mistral)
        weights = copy / "model.safetensors"
        assert weights_hash(copy) == before  # not of the place
        os.utime(weights, (1, 1))
        assert weights_hash(copy) == before  # nor of the time
        (copy / "README.md").write_text("other")
        (copy / "tokenizer_config.json").write_text("{}")
        assert weights_hash(copy) == before
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        after = weights_hash(copy)
        assert after != before
        weights.rename(copy / "other.safetensors")
        assert weights_hash(copy) not in (before, after)
        (copy / "config.json").write_text("{}")
        assert len({before, after, weights_hash(copy)}) == 3

    def test_without_safetensors_it_is_no_model(self, mistral: Path, tmp_path: Path) -> None:
        bare = shutil.copytree(mistral, tmp_path / "bare")
        (bare / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"no \.safetensors weights"):
            weights_hash(bare)
        with pytest.raises(UserError, match="cannot be loaded"):
            reference(bare).load(CPU)

    def test_where_a_name_leads(
        self, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert locate(str(mistral)) == mistral
        monkeypatch.chdir(mistral.parent)
        assert locate("tiny-mistral").resolve() == mistral
        with pytest.raises(UserError, match="no model folder /nowhere/at/all"):
            locate("/nowhere/at/all")
        with pytest.raises(UserError, match="embedded:tiny7/tiny-bert"):
            locate("embedded:tiny7/tiny-bert")
        (tmp_path / "org" / "name").mkdir(parents=True)
        monkeypatch.setenv("MRPO_LAB_MODELS", str(tmp_path))
        assert locate("org/name") == tmp_path / "org" / "name"

    def test_wrong_values_are_named(self, mistral: Path) -> None:
        with pytest.raises(ValueError, match=r"dtype must be one of .* got 'float8'"):
            reference(mistral, dtype="float8")
        with pytest.raises(ValueError, match="quantization must be null or one of nf4, int8"):
            reference(mistral, quantization="int4")
        with pytest.raises(ValueError, match="set lora"):
            PolicyConfig(path=str(mistral), quantization="nf4")
