"""Models and adapters that would give wrong numbers are refused, each in one line."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import LORA, reference, scores, slow_scores, some_rows
from test_scoring import GROUPED, build, random_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from whole_logits import random_rows

from mrpo_lab.data.chat import TOKENIZER_FILES
from mrpo_lab.data.dataset import Dataset
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.rows import parse_item
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.embedded.datasets import SyntheticDataset
from mrpo_lab.embedded.synthetic import synthetic_rows
from mrpo_lab.errors import UserError
from mrpo_lab.models import stored_scores
from mrpo_lab.models.policy import PolicyConfig
from mrpo_lab.models.references import Reference, ReferenceSet
from mrpo_lab.scoring.scorer import ReplyScorer

CPU = torch.device("cpu")
ITEMS = [parse_item(row, "") for row in synthetic_rows(16, seed=4)]


@pytest.fixture
def mistral(tiny7_dir: Path) -> Path:
    return tiny7_dir / "tiny-mistral"


@pytest.fixture
def copy(mistral: Path, tmp_path: Path) -> Path:
    return shutil.copytree(mistral, tmp_path / "model")


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def loop(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file)


def put_a_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def change_header(folder: Path, old: bytes, new: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(old, new, 1))


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"lacks 1 .*{NORM}"),
    "head": (lambda f: change_tensors(f, lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "unexpected": (
        lambda f: change_tensors(f, lambda t: t.update(stray=torch.ones(2))),
        "1 tensors that have no place in the model: stray",
    ),
    "mismatched": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.ones(5)})),
        rf"another shape: {NORM} \(\[5\] stored",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.ones(64).to(torch.int8)})),
        f"{NORM} in .* is stored as I8, and config.json names no quantization_config",
    ),
    "half": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors is damaged"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"safetensors is damaged"),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"),
        "a Git LFS pointer, not the weights",
    ),
    "config": (lambda f: cut(f / "config.json"), r"config\.json is damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is damaged"),
    "text config": (
        lambda f: change_config(f, text_config=[3]),
        "text_config is not a JSON object",
    ),
    "quantization": (
        lambda f: change_config(f, quantization_config="nf4"),
        "quantization_config is not a JSON object",
    ),
    "number in a shard's place": (
        lambda f: (
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
            and (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors")
        ),
        "index.json is damaged",
    ),
    "folder of weights": (
        lambda f: put_a_folder(f / "model.safetensors"),
        r"model\.safetensors is damaged",
    ),
    "loop of weights": (lambda f: loop(f / "model.safetensors"), r"model\.safetensors is damaged"),
    "unknown type": (
        lambda f: change_header(f, b'"F32"', b'"F99"'),
        r"model\.safetensors is damaged",
    ),
    "vocabulary": (lambda f: change_config(f, vocab_size=9999), "another shape: .*embed_tokens"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json is damaged"),
    "half tokenizer": (lambda f: cut(f / "tokenizer.json"), r"tokenizer\.json is damaged"),
    "shard": (
        lambda f: (
            (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
            )
            and (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors")
        ),
        "lacks model-00002-of-00002.safetensors",
    ),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "this is an adapter, not a model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(copy: Path, damage: str) -> None:
    spoil, problem = DAMAGES[damage]
    reference(copy).check()
    spoil(copy)
    for refuses in (reference(copy).check, lambda: reference(copy).load(CPU)):
        with pytest.raises(UserError, match=problem) as caught:
            refuses()
        assert "\n" not in str(caught.value)
        assert str(copy) in str(caught.value)
    for lora, quantization in ((None, None), (LORA, "nf4")):
        with pytest.raises(UserError, match=problem):
            PolicyConfig(path=str(copy), lora=lora, quantization=quantization).check()


NO_OBJECTS = (b"", b"[]", b"3", b"null", b'"x"', b"NaN", b"{", b"\0\0", b"\xff\xfe{}", b"[" * 99999)
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)


def test_damaged_small_files(copy: Path) -> None:
    """Each of them in each way, whether the model has it or not: never passed over."""
    adapter = copy / "adapter"
    base = AutoModelForCausalLM.from_pretrained(copy)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(str(adapter))
    for file in (*(copy / name for name in SMALL_FILES), adapter / "adapter_config.json"):
        whole = file.read_bytes() if file.exists() else None
        spoils: list[Callable[[], object]] = [partial(file.write_bytes, c) for c in NO_OBJECTS]
        spoils += [partial(loop, file), partial(put_a_folder, file)]
        for spoil in spoils:
            file.unlink(missing_ok=True)
            spoil()
            given = reference(copy, adapter=str(adapter))
            refuse_each: list[Callable[[], object]] = [given.check_files]
            if file.name in TOKENIZER_FILES:  # token counts are made before models are looked at
                refuse_each.append(partial(getattr, given.tokenization, "format"))
            for refuse in refuse_each:
                with pytest.raises(UserError) as caught:
                    refuse()
                assert f"{file} is damaged (" in str(caught.value)
                assert "\n" not in str(caught.value)
        file.rmdir()
        if whole is not None:
            file.write_bytes(whole)
    reference(copy, adapter=str(adapter)).check()


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_damaged_template_is_not_passed_over(copy: Path, content: bytes | None) -> None:
    file = copy / "chat_template.jinja"
    if content is None:
        loop(file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} is damaged \("):
        _ = reference(copy).tokenization.format


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(
    copy: Path, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(copy), config)
    next(p for p in adapted.parameters() if p.requires_grad).data.view(-1)[-1] = value
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"adapter_model.*lora_A\.weight has NaN or infinite"):
        reference(copy, adapter=str(tmp_path / "adapter")).check()
    stored = load_file(copy / "model.safetensors")
    stored = {name: tensor.to(dtype) for name, tensor in stored.items()}
    stored[NORM][3] = value
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{copy}: {NORM} has NaN or infinite"):
        reference(copy).load(CPU)
    with pytest.raises(UserError, match="has NaN or infinite"):
        PolicyConfig(path=str(copy), lora=LORA, quantization="nf4").build(CPU, 0)


def test_a_quantization_that_transformers_does_not_know(copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "nope"})
    with pytest.raises(UserError, match="does not know nope, by which config"):
        reference(copy).load(CPU)


def test_tokens_beyond_the_embeddings(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"<|more{i}|>" for i in range(2000)] + ["<|im_start|>", "<|im_end|>"])
    tokenizer.save_pretrained(copy)
    reference(copy).check()  # texts that do not contain them are scored
    with pytest.raises(
        UserError, match=r"tokenizer\.json has token \d+, and .* embeddings of only"
    ):
        reference(copy, template="chatml").check()
    scorer = ReplyScorer(random_model("llama"))
    with pytest.raises(UserError, match="embeddings of only 97 tokens"):
        scorer.padded_logps([TokenRow(np.array([3, 97], dtype=np.int32), 1)])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_that_are_stored_quantized(mistral: Path, tmp_path: Path, kind: str) -> None:
    how = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    shutil.copytree(mistral, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(
        mistral, quantization_config=how, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "model")
    stored = reference(tmp_path / "model")
    stored.check()
    rows = some_rows(stored)
    found = scores(stored.load(CPU), rows)
    expected = scores(reference(mistral, quantization=kind).load(CPU), rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    with pytest.raises(UserError, match="is stored quantized by bitsandbytes: set quantization"):
        reference(tmp_path / "model", quantization="nf4").check()
    policy = PolicyConfig(path=str(tmp_path / "model"), dtype="float32")
    for refuses in (policy.check, lambda: policy.build(CPU, 0)):
        with pytest.raises(UserError, match="stored quantized and cannot be trained"):
            refuses()
    PolicyConfig(path=str(tmp_path / "model"), dtype="float32", lora=LORA).check()


KINDS: dict[str, Any] = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "alora": peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]
    ),
}


class TestAdapters:
    @pytest.mark.parametrize("kind", KINDS)
    def test_that_act_in_pefts_own_forward(self, mistral: Path, tmp_path: Path, kind: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(mistral)
        adapted = peft.get_peft_model(base, KINDS[kind])
        adapted.save_pretrained(str(tmp_path))
        adapted_reference = reference(mistral, adapter=str(tmp_path))
        for refuses in (adapted_reference.check, lambda: adapted_reference.load(CPU)):
            with pytest.raises(UserError, match="acts in peft's own forward pass"):
                refuses()

    def test_that_are_known_by_their_numbers_alone(self, mistral: Path) -> None:
        """Whatever its kind: peft's own forward pass must be that of the model."""
        base = AutoModelForCausalLM.from_pretrained(mistral)
        adapted = peft.get_peft_model(base, KINDS["prompt"]).eval()
        with pytest.raises(UserError, match="acts in peft's own forward pass"):
            ReplyScorer(adapted)

    @pytest.mark.parametrize("adapter", ["lora", "embeddings", "saved whole", "ia3", "norms"])
    def test_are_scored_as_in_plain_peft(self, mistral: Path, tmp_path: Path, adapter: str) -> None:
        causal: Any = {"task_type": "CAUSAL_LM"}
        config: Any = {
            "ia3": peft.IA3Config(
                **causal, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
            "norms": peft.LNTuningConfig(**causal, target_modules=["input_layernorm"]),
            "saved whole": peft.LoraConfig(
                **causal, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
            ),
        }.get(adapter, peft.LoraConfig(**causal, r=2, target_modules=["q_proj"]))
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(mistral), config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or (adapter == "embeddings" and "embed" in name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise, alpha=0.05)
        adapted.save_pretrained(str(tmp_path), save_embedding_layers=adapter == "embeddings")
        base = AutoModelForCausalLM.from_pretrained(mistral)
        plain = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
        rows = some_rows(reference(mistral))
        found = scores(reference(mistral, adapter=str(tmp_path)).load(CPU), rows)
        torch.testing.assert_close(found, slow_scores(plain, rows), rtol=0, atol=2e-4)
        assert (found - scores(reference(mistral).load(CPU), rows)).abs().max() > 0.01

    def test_that_are_damaged(self, mistral: Path, tmp_path: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(mistral)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        peft.get_peft_model(base, config).save_pretrained(str(tmp_path))
        cut(tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
            reference(mistral, adapter=str(tmp_path)).check()
        (tmp_path / "adapter_config.json").write_text("{")
        with pytest.raises(UserError):
            reference(mistral, adapter=str(tmp_path)).check()


class TestInitialization:
    def config(self, mistral: Path, init: Any, **more: Any) -> PolicyConfig:
        lora = {**LORA, "init_lora_weights": init, **more}
        return PolicyConfig(path=str(mistral), dtype="float32", lora=lora)

    @pytest.mark.parametrize(
        "init", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "lora_ga", "loftq", "nonsense"]
    )
    def test_refused(self, mistral: Path, init: str) -> None:
        more = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
        with pytest.raises(UserError, match=r"model\.lora: .*init"):
            self.config(mistral, init, **more).build(CPU, 0)

    def test_a_change_of_the_base_weights_is_found(
        self, mistral: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also of values that are not known by name."""
        monkeypatch.setattr("mrpo_lab.models.adapters.CHANGE_BASE", ("none",))
        for init in ("pissa", "olora"):
            with pytest.raises(UserError, match="changes the base weights"):
                self.config(mistral, init).build(CPU, 0)

    @pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
    def test_the_saved_adapter_has_the_runs_numbers(
        self, mistral: Path, tmp_path: Path, init: Any
    ) -> None:
        config = self.config(mistral, init)
        policy, rows = config.build(CPU, 0), some_rows(config)
        for parameter in policy.trainable.values():
            parameter.data.add_(0.01)
        policy.save(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(mistral)
        plain = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
        found = policy.scorer.padded_logps(rows)[0].detach()
        torch.testing.assert_close(found, slow_scores(plain, rows), rtol=0, atol=2e-4)

    def test_alora_is_refused(self, mistral: Path) -> None:
        with pytest.raises(UserError, match=r"aLoRA .* would not be trained"):
            self.config(mistral, True, alora_invocation_tokens=[4]).check()


@pytest.mark.parametrize("template", ["plain", None])
def test_the_saved_tokenizer_is_the_one_of_the_run(
    mistral: Path, tmp_path: Path, template: str | None
) -> None:
    policy = PolicyConfig(path=str(mistral), dtype="float32", template=template).build(CPU, 0)
    policy.save(tmp_path)
    saved, own = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(mistral)
    assert saved.model_max_length == own.model_max_length == 2048
    assert saved.chat_template == policy.tokenization.format.template
    assert (saved.chat_template == own.chat_template) == (template is None)


def test_a_base_model_that_is_the_model_itself() -> None:
    class Itself(LlamaForCausalLM):
        base_model_prefix = "nowhere"

    model = build(Itself(LlamaConfig(**GROUPED)))
    assert model.base_model is model
    rows = random_rows()
    with torch.no_grad():
        found = ReplyScorer(model).padded_logps(rows)[0]
    torch.testing.assert_close(found, slow_scores(model, rows), rtol=0, atol=2e-5)


def test_a_model_that_sees_what_it_predicts() -> None:
    sizes = {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}
    for is_decoder in (True, False):
        model = build(AutoModelForCausalLM.from_config(BertConfig(**sizes, is_decoder=is_decoder)))
        if is_decoder:
            ReplyScorer(model)
        else:
            with pytest.raises(UserError, match="BertLMHeadModel is not causal"):
                ReplyScorer(model, "off")


class TestLength:
    def test_longer_pairs_are_dropped_and_counted(self, mistral: Path) -> None:
        dataset: Dataset = SyntheticDataset(pairs=40, train=None, val=0.2, test=0.2)
        tokenization = reference(mistral).tokenization
        totals = [
            max(len(row.ids) for row in rows or ())
            for rows in tokenization.rows(list(dataset.read()))
        ]
        limit = int(np.median(totals))
        rng = np.random.default_rng
        prepared = dataset.prepare(dataset.read(), [tokenization], rng(0), limit)
        assert prepared.counts["dropped_longer_than_a_model"] == sum(n > limit for n in totals)
        assert prepared.counts["eligible"] == sum(n <= limit for n in totals)
        for positions in (None, 5000):
            counts = dataset.prepare(dataset.read(), [tokenization], rng(0), positions).counts
            assert "dropped_longer_than_a_model" not in counts

    def test_a_reference_is_not_loaded_for_what_it_cannot_be_given(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change_config(copy, max_position_embeddings=20)
        monkeypatch.setattr(Reference, "load", lambda *_: pytest.fail("loaded"))
        refs = ReferenceSet(entries=[{"slug": "one", "path": str(copy)}], dtype="float32")
        with pytest.raises(UserError, match="and the model has 20 positions: lower dataset"):
            refs.scores(ITEMS, reply_ids(ITEMS), CPU)

    def test_generation_ends_with_the_positions(self, copy: Path) -> None:
        prompt = [{"role": "user", "content": "Where is it?"}]
        whole = PolicyConfig(path=str(copy), dtype="float32").build(CPU, 0)
        tokens = len(
            whole.tokenization.format.tokenizer(
                whole.tokenization.format.prompt_text(prompt), add_special_tokens=False
            )["input_ids"]
        )
        for positions in (tokens, tokens + 3):
            change_config(copy, max_position_embeddings=positions)
            policy = PolicyConfig(path=str(copy), dtype="float32").build(CPU, 0)
            (text,) = policy.generate([prompt], 10)
            (longer,) = whole.generate([prompt], 10)
            assert longer.startswith(text)
            assert (text == "") == (positions == tokens)


NONSENSE = [Item(item.prompt, ("qqzx 0 #", f"{i} @@ ~~ xq")) for i, item in enumerate(ITEMS[:8])]


class TestGate:
    """Data are judged by their own rows."""

    def findings(self, mistral: Path, items: list[Item], gate: str = "stop") -> list[Any]:
        entries = [{"slug": "one", "path": str(mistral)}]
        refs = ReferenceSet(entries=entries, dtype="float32", gate=gate)
        return refs.scores(items, reply_ids(items), CPU).findings

    @pytest.mark.parametrize("mixed", [False, True])
    def test_of_other_data(
        self, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool
    ) -> None:
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))
        if mixed:  # good rows first or bad ones: neither condemns nor absolves the others
            assert self.findings(mistral, [*NONSENSE, *ITEMS], "warn")
            assert not self.findings(mistral, ITEMS)
        else:
            assert not self.findings(mistral, [*ITEMS, *NONSENSE])
        with pytest.raises(UserError, match="of a uniform guess"):
            self.findings(mistral, NONSENSE)
        assert not self.findings(mistral, ITEMS)
        assert self.findings(mistral, NONSENSE, "warn")
        for _ in range(2):
            with pytest.raises(UserError, match="of a uniform guess"):
                self.findings(mistral, NONSENSE)
            assert not self.findings(mistral, ITEMS)

    def test_a_model_that_differs_from_load_to_load(
        self, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))
        load, calls = Reference.load, iter(range(9))

        def other(self: Reference, device: torch.device) -> Any:
            model: Any = load(self, device)
            model.get_output_embeddings().weight.data.mul_(1 + 0.5 * next(calls))
            return model

        monkeypatch.setattr(Reference, "load", other)
        with pytest.raises(UserError, match="by the model loaded again differ by"):
            self.findings(mistral, ITEMS)

    def test_scores_of_an_earlier_format_are_passed_over_aloud(
        self,
        mistral: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))
        caplog.set_level("INFO", logger="mrpo_lab")
        now = stored_scores.FORMAT
        for form in (now - 1, now, now):
            monkeypatch.setattr(stored_scores, "FORMAT", form)
            caplog.clear()
            self.findings(mistral, ITEMS[:3])
            replaced = [m for m in caplog.messages if stored_scores.REASON in m]
            assert len(replaced) == (form == now and len(caplog.messages) > 0)
