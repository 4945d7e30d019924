"""The synthetic world, and the seven models that are trained on it."""

import json
import tracemalloc
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_lab.embedded import tiny7
from mrpo_lab.embedded.synthetic import GAP, synthetic_corpus, synthetic_rows
from mrpo_lab.embedded.synthetic_town import CLOSINGS, OPENINGS, SUBJECTS

USER = {"role": "user", "content": "Where can I buy bread?"}
ASSISTANT = {"role": "assistant", "content": "Sure, at the bakery."}
SYSTEM = {"role": "system", "content": "Be brief."}
LEFT = {"tiny-phi3", "tiny-gemma2"}
ADD_BOS = {"tiny-llama", "tiny-mistral", "tiny-gemma2"}


def names_of(text: str) -> set[str]:
    words = set(text.replace(".", " ").replace("?", " ").split())
    return {subject.name for subject in SUBJECTS} & words


def features_of(prompt: str, reply: str) -> dict[str, float]:
    """Read the documented features back from the text."""
    closings = [kind for kind, texts in CLOSINGS.items() if reply.endswith(texts)]
    assert len(closings) == 1
    return {
        "on_topic": 1.5 * (names_of(prompt) == names_of(reply)),
        "precise": 1.5 * any(character.isdigit() for character in reply),
        "warmth": 1.0 * closings[0],
        "filler": -1.0 * reply.startswith(OPENINGS[True]),
    }


def accuracy(gaps: list[float]) -> float:
    """Share of positive gaps, ties counted half."""
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)


class TestSyntheticRows:
    def test_a_row_depends_on_seed_and_index_alone(self) -> None:
        rows = list(synthetic_rows(50, seed=3))
        assert rows == list(islice(synthetic_rows(10**9, seed=3), 50))
        assert rows != list(synthetic_rows(50, seed=4))

    @pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
    def test_noise_swaps_the_share_of_labels_it_says(self, noise: float) -> None:
        clean = list(synthetic_rows(5000, seed=0))
        noisy = list(synthetic_rows(5000, seed=0, label_noise=noise))
        swapped = [
            {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
            for row in clean
        ]
        share = sum(row == other for row, other in zip(noisy, swapped, strict=True)) / 5000
        assert share == pytest.approx(noise, abs=0.02)
        kept = sum(row == other for row, other in zip(noisy, clean, strict=True)) / 5000
        assert kept + share == 1.0

    @pytest.mark.parametrize("noise", [-0.1, 1.1])
    def test_impossible_noise_is_refused(self, noise: float) -> None:
        with pytest.raises(ValueError, match="label_noise"):
            next(synthetic_rows(1, seed=0, label_noise=noise))

    def test_preference_is_the_documented_utility_of_the_text(self) -> None:
        gaps: dict[str, list[float]] = {}
        for row in synthetic_rows(3000, seed=1):
            better, worse = (features_of(row["prompt"], row[k]) for k in ("chosen", "rejected"))
            assert sum(better.values()) - sum(worse.values()) >= GAP
            for name, value in better.items():
                gaps.setdefault(name, []).append(value - worse[name])
        for values in gaps.values():  # every feature carries information, none carries all
            assert 0.6 < accuracy(values) < 0.9

    def test_length_does_not_tell_the_preference(self) -> None:
        rows = list(synthetic_rows(5000, seed=2))
        for measure in (len, lambda text: len(text.split())):
            gaps = [float(measure(row["chosen"]) - measure(row["rejected"])) for row in rows]
            assert 0.45 < accuracy(gaps) < 0.55

    def test_texts_are_short_and_prompts_vary(self) -> None:
        rows = list(synthetic_rows(3000, seed=0))
        assert all(4 <= len(text.split()) <= 25 for row in rows for text in row.values())
        assert len({row["prompt"] for row in rows}) > 2500
        assert all(row["chosen"] != row["rejected"] for row in rows)

    def test_rows_stream_in_constant_memory(self) -> None:
        tracemalloc.start()
        for _ in synthetic_rows(4000, seed=0):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000  # bytes


def test_tilt_sets_how_good_the_replies_of_the_corpus_are() -> None:
    def quality(tilt: float) -> float:
        turns = [m for messages in synthetic_corpus(1000, 0, tilt) for m in messages]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        values = [sum(features_of(u["content"], a["content"]).values()) for u, a in pairs]
        return sum(values) / len(values)

    assert quality(-1.0) < quality(0.0) - 0.5 < quality(1.0) - 1.0


@pytest.fixture(scope="module")
def tokenizers(tiny7_dir: Path) -> dict[str, Any]:
    return {slug: AutoTokenizer.from_pretrained(tiny7_dir / slug) for slug in tiny7.SLUGS}


class TestTokenizers:
    @pytest.mark.parametrize("slug", tiny7.SLUGS)
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text())
    @example(text="two  spaces \u2581 \u00e9\u0065\u0301 \U0001f468\u200d\U0001f469 \x00\r\n\t")
    @example(text="<0x41> [inst] <|none|> \ufeff\u65e5\u672c<0xE6>")
    def test_any_text_survives(self, tokenizers: dict[str, Any], slug: str, text: str) -> None:
        tokenizer = tokenizers[slug]
        assume(not any(token in text for token in tokenizer.all_special_tokens))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert max(ids, default=0) < len(tokenizer)
        composed = unicodedata.normalize("NFC", text) if slug == "tiny-qwen2" else text
        assert tokenizer.decode(ids) == composed

    @pytest.mark.parametrize("slug", tiny7.SLUGS)
    def test_transformers_loads_what_was_trained(
        self, tiny7_dir: Path, tokenizers: dict[str, Any], slug: str
    ) -> None:
        text = "She'LL pay 1234 for\u0065\u0301 it,\n\n  <0x41> \u65e5\u672c!"
        saved = Tokenizer.from_file(str(tiny7_dir / slug / "tokenizer.json"))
        assert tokenizers[slug](text)["input_ids"] == saved.encode(text).ids

    def test_vocabularies_differ(self, tokenizers: dict[str, Any]) -> None:
        text = USER["content"]
        assert len({len(tokenizer) for tokenizer in tokenizers.values()}) == 7
        assert len({tuple(tokenizer(text)["input_ids"]) for tokenizer in tokenizers.values()}) == 7

    def test_padding_sides_differ(self, tokenizers: dict[str, Any]) -> None:
        assert {slug for slug, t in tokenizers.items() if t.padding_side == "left"} == LEFT

    def test_some_add_bos_and_qwen2_has_none(self, tokenizers: dict[str, Any]) -> None:
        for slug, tokenizer in tokenizers.items():
            first = tokenizer("bread")["input_ids"][0]
            assert (first == tokenizer.bos_token_id) == (slug in ADD_BOS)
        assert tokenizers["tiny-qwen2"].bos_token is None

    def test_pad_is_missing_or_eos_in_some(self, tokenizers: dict[str, Any]) -> None:
        assert tokenizers["tiny-mistral"].pad_token is None
        assert tokenizers["tiny-phi3"].pad_token == tokenizers["tiny-phi3"].eos_token


class TestTemplates:
    @staticmethod
    def render(tokenizer: Any, *messages: dict[str, str], generate: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate
            )
        )

    @pytest.mark.parametrize("slug", tiny7.SLUGS)
    def test_prompt_is_a_token_prefix(self, tokenizers: dict[str, Any], slug: str) -> None:
        tokenizer = tokenizers[slug]
        prompt = self.render(tokenizer, USER, generate=True)
        whole = self.render(tokenizer, USER, ASSISTANT)
        assert whole.startswith(prompt)
        prefix, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, whole))
        assert ids[: len(prefix)] == prefix

    def test_qwen2_adds_a_default_system_message(self, tokenizers: dict[str, Any]) -> None:
        tokenizer = tokenizers["tiny-qwen2"]
        assert "You are a helpful assistant." in self.render(tokenizer, USER)
        assert "You are a helpful assistant." not in self.render(tokenizer, SYSTEM, USER)

    def test_qwen3_thinks_in_the_last_turn_only(self, tokenizers: dict[str, Any]) -> None:
        text = self.render(tokenizers["tiny-qwen3"], USER, ASSISTANT, USER, ASSISTANT)
        assert text.count("<think>\n\n</think>\n\n") == 1
        assert text.endswith(f"<think>\n\n</think>\n\n{ASSISTANT['content']}<|im_end|>\n")

    def test_gemma2_refuses_a_system_message(self, tokenizers: dict[str, Any]) -> None:
        with pytest.raises(TemplateError, match="System role not supported"):
            self.render(tokenizers["tiny-gemma2"], SYSTEM, USER)

    @pytest.mark.parametrize("slug", ["tiny-gemma2", "tiny-llama"])
    def test_some_trim_the_reply(self, tokenizers: dict[str, Any], slug: str) -> None:
        padded = ASSISTANT | {"content": f" {ASSISTANT['content']}\n"}
        plain = self.render(tokenizers[slug], USER, ASSISTANT)
        assert self.render(tokenizers[slug], USER, padded) == plain

    def test_mistral_wants_turns_to_alternate(self, tokenizers: dict[str, Any]) -> None:
        tokenizer = tokenizers["tiny-mistral"]
        assert "Be brief.\n\nWhere" in self.render(tokenizer, SYSTEM, USER)
        with pytest.raises(TemplateError, match="alternate"):
            self.render(tokenizer, USER, USER)

    @pytest.mark.parametrize("slug", sorted(ADD_BOS))
    def test_encoding_a_rendered_chat_doubles_bos(
        self, tokenizers: dict[str, Any], slug: str
    ) -> None:
        tokenizer = tokenizers[slug]
        ids = tokenizer(self.render(tokenizer, USER))["input_ids"]
        assert ids[:2] == [tokenizer.bos_token_id] * 2


def reply_logps(model: Any, tokenizer: Any, prompt: str, replies: list[str]) -> list[Tensor]:
    """Log-probabilities of each reply's tokens, in nats, one unpadded forward pass a reply."""
    user = [{"role": "user", "content": prompt}]
    start = len(tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"])
    logps = []
    for reply in replies:
        chat = [*user, {"role": "assistant", "content": reply}]
        ids = torch.tensor(tokenizer.apply_chat_template(chat)["input_ids"])
        logits = model(input_ids=ids[None]).logits[0, :-1]
        token_logps = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        logps.append(token_logps[start - 1 :])
    return logps


@pytest.fixture(scope="module")
def scores(tiny7_dir: Path, tokenizers: dict[str, Any]) -> Iterator[dict[str, tuple[float, float]]]:
    """Nats per reply token and length-normalized preference accuracy of each model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # see tiny7._one_thread
    rows = list(synthetic_rows(150, seed=99))
    found = {}
    for slug, tokenizer in tokenizers.items():
        model = AutoModelForCausalLM.from_pretrained(tiny7_dir / slug)
        with torch.inference_mode():
            logps = [
                reply_logps(model, tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
                for row in rows
            ]
        gaps = [float(chosen.mean() - rejected.mean()) for chosen, rejected in logps]
        tokens = torch.cat([reply for pair in logps for reply in pair])
        found[slug] = (float(tokens.mean()), accuracy(gaps))
    yield found
    torch.set_num_threads(threads)


class TestModels:
    def test_architectures_differ_and_are_plain_folders(self, tiny7_dir: Path) -> None:
        assert sorted(path.name for path in tiny7_dir.iterdir()) == sorted(tiny7.SLUGS)
        configs = [json.loads((tiny7_dir / s / "config.json").read_text()) for s in tiny7.SLUGS]
        assert len({config["model_type"] for config in configs}) == 7
        assert {c["model_type"]: c for c in configs}["mistral"]["sliding_window"] == 4096

    @pytest.mark.parametrize("slug", tiny7.SLUGS)
    def test_weights_are_small_whole_and_float32(self, tiny7_dir: Path, slug: str) -> None:
        with safe_open(tiny7_dir / slug / "model.safetensors", framework="pt") as weights:
            dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            tiny7_dir / slug, output_loading_info=True
        )
        model, report = loaded
        assert dtypes == {"F32"}
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert 50_000 < model.num_parameters() < 450_000

    @pytest.mark.parametrize("slug", tiny7.SLUGS)
    def test_model_knows_its_language(
        self, scores: dict[str, tuple[float, float]], tokenizers: dict[str, Any], slug: str
    ) -> None:
        uniform = -float(torch.tensor(len(tokenizers[slug])).log())
        assert scores[slug][0] > uniform / 2

    def test_models_are_of_unequal_quality(self, scores: dict[str, tuple[float, float]]) -> None:
        accuracies = {slug: score[1] for slug, score in scores.items()}
        assert min(accuracies, key=accuracies.__getitem__) == "tiny-neox"
        assert accuracies["tiny-neox"] < 0.4
        assert max(accuracies, key=accuracies.__getitem__) == "tiny-qwen3"
        assert accuracies["tiny-qwen3"] > 0.7
        assert 0.45 < accuracies["tiny-qwen2"] < 0.65  # the quickstart's policy: much to learn


@pytest.fixture
def short_recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three of the seven, one for each kind of tokenizer, trained for three steps."""
    slugs = ("tiny-neox", "tiny-gemma2", "tiny-phi3")
    recipes = {slug: replace(tiny7.RECIPES[slug], steps=3) for slug in slugs}
    monkeypatch.setattr(tiny7, "RECIPES", recipes)
    monkeypatch.setattr(tiny7, "SLUGS", slugs)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("short_recipes")
class TestBuild:
    @staticmethod
    def files(root: Path) -> dict[Path, bytes]:
        found = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return {path.relative_to(root): path.read_bytes() for path in found}

    def test_builds_are_equal_to_the_byte_and_leave_torch_as_it_was(self, tmp_path: Path) -> None:
        for threads, name in ((1, "one"), (2, "two")):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            state = torch.get_rng_state()
            tiny7.build(tmp_path / name)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == threads
        assert self.files(tmp_path / "one") == self.files(tmp_path / "two")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

    def test_an_interrupted_build_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(tiny7, "_save", fail)
        with pytest.raises(KeyboardInterrupt):
            tiny7.build(tmp_path / "root")
        assert not list(tmp_path.iterdir())

    def test_a_complete_build_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny7.build(tmp_path / "root")
        monkeypatch.setattr(tiny7, "_prepare", None)
        tiny7.build(tmp_path / "root")
