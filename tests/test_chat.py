"""Rendering and tokenizing messages, with the peculiarities of many templates and tokenizers."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_lab.data.chat import (
    ChatFormat,
    common_prefix,
    fold_system,
    format_fingerprint,
    load_format,
)
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.storage.tables import Table

SLUGS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "neox")
END = {
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "qwen2": "<|im_end|>\n",
    "qwen3": "<|im_end|>\n",
    "phi3": "<|end|>\n<|endoftext|>",
    "gemma2": "<end_of_turn>\n",
    "neox": "<|endoftext|>",
}
START = {"mistral": " ", "qwen3": "<think>\n\n</think>\n\n"}
DEFAULT_SYSTEM = "You are a helpful assistant."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


BREAD = Item((user("Where can I buy bread?"),), ("Sure, at the bakery.", "Um, somewhere."))
TURNS = Item((user("Hi!"), assistant("Hello."), user("Bread?")), ("At the bakery.", ""))


@pytest.fixture(scope="module")
def formats(tiny7_dir: Path) -> dict[str, ChatFormat]:
    return {slug: load_format(slug, tiny7_dir / f"tiny-{slug}") for slug in SLUGS}


def one(chat: ChatFormat, item: Item) -> tuple[TokenRow, ...]:
    (rows,) = chat.rows([item])
    assert rows is not None
    return rows


def prompt_of(chat: ChatFormat, row: TokenRow) -> str:
    return str(chat.tokenizer.decode(row.ids[: row.start]))


def reply_of(chat: ChatFormat, row: TokenRow) -> str:
    return str(chat.tokenizer.decode(row.ids[row.start :]))


def with_template(folder: Path, template: str, into: Path) -> ChatFormat:
    """The tokenizer in ``folder`` with a template from a file."""
    file = into / "some.jinja"
    file.write_text(template)
    return load_format("x", folder, str(file))


class TestSevenHabits:
    @pytest.mark.parametrize("item", [BREAD, TURNS])
    @pytest.mark.parametrize("slug", SLUGS)
    def test_rows_are_what_transformers_itself_renders(
        self, formats: dict[str, ChatFormat], slug: str, item: Item
    ) -> None:
        chat = formats[slug]
        tokenizer: Any = chat.tokenizer
        asked = tokenizer.apply_chat_template(
            list(item.prompt), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for row, reply in zip(one(chat, item), item.replies, strict=True):
            whole = tokenizer.apply_chat_template(
                [*item.prompt, assistant(reply)], tokenize=True, return_dict=False
            )
            assert row.ids.tolist() == whole
            assert row.ids[: row.start].tolist() == asked
            assert reply_of(chat, row) == START.get(slug, "") + reply + END[slug]
            assert row.reply_tokens == len(whole) - len(asked) >= 1
            assert not row.prefix_broken
            assert not row.system_folded
            assert row.ids.dtype == np.int32

    @pytest.mark.parametrize("slug", SLUGS)
    def test_one_bos_or_none(self, formats: dict[str, ChatFormat], slug: str) -> None:
        chat = formats[slug]
        own = {"llama": 1, "mistral": 1, "gemma2": 1}.get(slug, 0)
        for row in one(chat, BREAD):
            first = int(row.ids[0]) == chat.tokenizer.bos_token_id
            assert (row.ids[:-1] == chat.tokenizer.bos_token_id).sum() == own or slug == "neox"
            assert first == bool(own)

    def test_a_default_system_message_stays_a_given_one_replaces_it(
        self, formats: dict[str, ChatFormat]
    ) -> None:
        chat = formats["qwen2"]
        given = Item((system("Be brief."), *BREAD.prompt), BREAD.replies)
        assert DEFAULT_SYSTEM in prompt_of(chat, one(chat, BREAD)[0])
        text = prompt_of(chat, one(chat, given)[0])
        assert "Be brief." in text
        assert DEFAULT_SYSTEM not in text

    def test_a_refused_system_message_goes_before_the_first_question(
        self, formats: dict[str, ChatFormat]
    ) -> None:
        given = Item((system("Be brief."), *TURNS.prompt), TURNS.replies)
        by_hand = Item((user("Be brief.\n\nHi!"), *TURNS.prompt[1:]), TURNS.replies)
        for slug, chat in formats.items():
            for row, same in zip(one(chat, given), one(chat, by_hand), strict=True):
                assert row.system_folded == (slug == "gemma2")
                assert not same.system_folded
                alike = row.ids.tolist() == same.ids.tolist()
                assert alike == (slug in ("gemma2", "mistral"))  # mistral's own template does so

    def test_fold_system_touches_only_what_it_is_for(self) -> None:
        for prompt in ((user("a"),), (system("s"),), (system("s"), assistant("a"))):
            assert fold_system(prompt) == prompt
        folded = fold_system((system("s"), user("a"), assistant("b")))
        assert folded == (user("s\n\na"), assistant("b"))

    def test_a_prompt_that_the_template_refuses_is_none_its_neighbors_are_not(
        self, formats: dict[str, ChatFormat]
    ) -> None:
        twice = Item((user("a"), user("b")), ("c", "d"))
        chat = formats["mistral"]
        assert [rows is None for rows in chat.rows([BREAD, twice, TURNS])] == [False, True, False]
        for item, rows in zip((BREAD, TURNS), chat.rows([BREAD, twice, TURNS])[::2], strict=True):
            assert rows is not None
            assert [row.ids.tolist() for row in rows] == [r.ids.tolist() for r in one(chat, item)]
        assert chat.rows([]) == []


def shared_by_hand(left: list[int], right: list[int]) -> int:
    length = 0
    while left[: length + 1] == right[: length + 1] and length < min(len(left), len(right)):
        length += 1
    return length


class TestPrefix:
    TEMPLATE = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' + OPENING }}{% endif %}"
    )

    @pytest.mark.parametrize(
        ("opening", "reply"),
        [
            (" the b", " the bakery."),  # the prompt's last token changes when the reply follows
            ("<think>\n", "Sure, at the bakery."),  # the generation prompt is not in prompt + reply
        ],
    )
    def test_otherwise_the_reply_begins_at_the_longest_common_prefix(
        self, tiny7_dir: Path, tmp_path: Path, opening: str, reply: str
    ) -> None:
        template = self.TEMPLATE.replace("OPENING", json.dumps(opening))
        chat = with_template(tiny7_dir / "tiny-llama", template, tmp_path)
        tokenizer: Any = chat.tokenizer
        asked = tokenizer(f"user:Bread?\nassistant:{opening}", add_special_tokens=False)
        whole = tokenizer(f"user:Bread?\nassistant:{reply}\n", add_special_tokens=False)
        (row,) = one(chat, Item((user("Bread?"),), (reply,)))
        assert row.ids.tolist() == whole["input_ids"]
        assert row.start == shared_by_hand(asked["input_ids"], whole["input_ids"])
        assert 0 < row.start < len(asked["input_ids"])
        assert row.prefix_broken

    @given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
    def test_common_prefix(self, shared: list[int], left: list[int], right: list[int]) -> None:
        pair = shared + left, shared + right
        assert common_prefix(*pair) == shared_by_hand(*pair)


class TestTemplates:
    def test_plain(self, tiny7_dir: Path) -> None:
        given = Item((system("Be brief."), *TURNS.prompt), ("Bakery.",))
        for slug, bos, eos in (("llama", "<|begin_of_text|>", "<|eot_id|>"), ("qwen2", "", "")):
            chat = load_format("x", tiny7_dir / f"tiny-{slug}", "plain")
            (row,) = one(chat, given)
            end = eos or "<|im_end|>"
            assert chat.tokenizer.decode(row.ids) == (
                f"{bos}System: Be brief.\n\nUser: Hi!\n\nAssistant: Hello.{end}\n\n"
                f"User: Bread?\n\nAssistant: Bakery.{end}\n\n"
            )
            assert reply_of(chat, row) == f" Bakery.{end}\n\n"
            if bos:
                assert (row.ids == chat.tokenizer.bos_token_id).sum() == 1

    def test_chatml(self, tiny7_dir: Path) -> None:
        chat = load_format("x", tiny7_dir / "tiny-qwen3", "chatml")
        (row,) = one(chat, Item(TURNS.prompt, ("Bakery.",)))
        assert chat.tokenizer.decode(row.ids) == (
            "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\nBread?<|im_end|>\n<|im_start|>assistant\nBakery.<|im_end|>\n"
        )
        assert reply_of(chat, row) == "Bakery.<|im_end|>\n"  # and no think block

    def test_no_score_depends_on_the_day(self, tiny7_dir: Path, tmp_path: Path) -> None:
        """The templates of Llama 3 and gpt-oss print the date; whitespace around it is kept."""
        template = (
            "  {% set known = date_string is defined %}\n "
            "{{ strftime_now('%Y-%m-%d') if strftime_now is defined else '' }}|"
            "{{ date_string if known else strftime_now(format='%d %b %Y') }}|"
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        )
        chat = with_template(tiny7_dir / "tiny-neox", template, tmp_path)
        (row,) = one(chat, Item((user("a"),), ("b",)))
        assert chat.tokenizer.decode(row.ids) == " 26 Jul 2024|26 Jul 2024|ab"
        contents = "\n\n{% for m in messages %}{{ m.content }}{% endfor %}"
        undated = with_template(tiny7_dir / "tiny-neox", contents, tmp_path)
        (row,) = one(undated, Item((user("a"),), ("b",)))
        assert undated.tokenizer.decode(row.ids) == "\n\nab"

    def test_the_default_of_several_templates(self, tiny7_dir: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny7_dir / "tiny-neox", tmp_path / "several")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        own = tokenizer.chat_template
        tokenizer.chat_template = {"default": own, "tool_use": "{{ 1 }}"}
        tokenizer.save_pretrained(folder)
        assert load_format("x", folder).template == own

    def test_what_is_missing_or_broken_is_said(self, tiny7_dir: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny7_dir / "tiny-neox", tmp_path / "bare")
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(UserError, match=r"slug: .*bare has no chat template: .*template=plain"):
            load_format("slug", folder)
        with pytest.raises(UserError, match="slug: template 'plane' is neither plain, chatml nor"):
            load_format("slug", folder, "plane")
        assert len(one(load_format("slug", folder, "plain"), BREAD)) == 2
        with pytest.raises(UserError, match="chat template, line 2: "):
            with_template(folder, "\n{% for m in messages %}", tmp_path).rows([BREAD])
        (folder / "tokenizer.json").write_text('{"version"')
        with pytest.raises(UserError, match=r"slug: .*bare/tokenizer\.json is damaged"):
            load_format("slug", folder, "plain")


@pytest.fixture(scope="module")
def neox(tiny7_dir: Path) -> ReplyScorer:
    model = AutoModelForCausalLM.from_pretrained(tiny7_dir / "tiny-neox")
    return ReplyScorer(model.requires_grad_(False))


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(prompt=st.text(), replies=st.tuples(st.text(), st.text()))
@example(prompt="\x00\n\r\u2028", replies=("\U0001f469\u200d\U0001f680 e\u0301", "\u202e\ufeff"))
@example(prompt="", replies=("", "<|im_end|>\n<|im_start|>user\n"))
def test_any_text_is_scored_with_a_sane_count(
    formats: dict[str, ChatFormat], neox: ReplyScorer, prompt: str, replies: tuple[str, str]
) -> None:
    item = Item((user(prompt),), replies)
    for slug, chat in formats.items():
        (empty,) = one(chat, Item(item.prompt, ("",)))
        for row, reply in zip(one(chat, item), replies, strict=True):
            assert 0 <= row.ids.min() <= row.ids.max() < len(chat.tokenizer)
            assert row.start > 0
            # No token holds less than a byte; composing characters may add a few (Qwen2's NFC).
            most = 3 * len(reply.encode()) + empty.reply_tokens + 1
            assert 1 <= row.reply_tokens <= most, slug
    rows = one(formats["neox"], item)
    sums, counts = neox.logps([rows])
    assert counts.tolist() == [row.reply_tokens for row in rows]
    assert all(-40 * count < value < 0 for value, count in zip(sums, counts, strict=True))


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


class TestFingerprint:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for name in TOKENIZER_FILES:
            (folder / name).write_text(f"content of {name}")
        return folder

    @pytest.mark.parametrize("name", TOKENIZER_FILES)
    def test_changes_with_each_file(self, folder: Path, name: str) -> None:
        before = format_fingerprint(folder, "x", None)
        (folder / name).write_text("other")
        changed = format_fingerprint(folder, "x", None)
        (folder / name).unlink()
        assert len({before, changed, format_fingerprint(folder, "x", None)}) == 3

    @pytest.mark.parametrize(
        "name",
        [
            *("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken"),
            *("tokenization_own.py", "bpe.codes", "emoji.json", "tokenizer.vocab", "dict.txt"),
        ],
    )
    def test_changes_with_whatever_a_tokenizer_may_read(self, folder: Path, name: str) -> None:
        found = {format_fingerprint(folder, "x", None)}
        for content in ("one", "two"):
            (folder / name).write_text(content)
            found.add(format_fingerprint(folder, "x", None))
        assert len(found) == 3

    def test_of_usual_files_is_the_one_that_stored_numbers_have(self, folder: Path) -> None:
        digest = hashlib.sha256(b"26 Jul 2024")
        for name in TOKENIZER_FILES:
            digest.update(name.encode() + b"\0" + f"content of {name}".encode())
        assert format_fingerprint(folder, "x", None) == digest.hexdigest()

    def test_changes_where_code_is_trusted(self, folder: Path) -> None:
        found = {format_fingerprint(folder, "x", None, trusted) for trusted in (True, False)}
        assert len(found) == 2

    def test_changes_with_the_template_in_its_place(self, folder: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.jinja"
        file.write_text("{{ 1 }}")
        templates = [None, "plain", "chatml", str(file)]
        found = {format_fingerprint(folder, "x", template) for template in templates}
        file.write_text("{{ 2 }}")
        assert len({*found, format_fingerprint(folder, "x", str(file))}) == 5

    def test_changes_with_nothing_else(self, folder: Path, tmp_path: Path) -> None:
        before = format_fingerprint(folder, "x", "plain")
        moved = folder.rename(tmp_path / "elsewhere")
        others = ("LICENSE.txt", ".gitattributes", "optimizer.pt", "model.safetensors.index.json")
        usual = ("model.safetensors", "config.json", "generation_config.json", "README.md")
        for name in (*usual, *others):
            (moved / name).write_text("anything")
        os.utime(moved / "tokenizer.json", (1, 1))
        assert format_fingerprint(moved, "other name", "plain") == before


class TestLengths:
    ITEMS = (BREAD, TURNS, Item((user("a"), user("b")), ("c", "d")))

    @pytest.fixture(autouse=True)
    def cache(self, tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))

    def test_are_those_of_the_rows(self, tiny7_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mrpo_lab.data.tokenization.CHUNK", 2)
        tokenizer = Tokenization("x", tiny7_dir / "tiny-mistral")
        lengths = tokenizer.lengths(self.ITEMS, reply_ids(self.ITEMS))
        rows = [one(tokenizer.format, item) for item in self.ITEMS[:2]]
        assert lengths.prompt.tolist() == [*([r.start for r in pair] for pair in rows), [0, 0]]
        expected = [[len(r.ids) - r.start for r in pair] for pair in rows]
        assert lengths.reply.tolist() == [*expected, [0, 0]]  # the template refuses the third
        folding = Tokenization("x", tiny7_dir / "tiny-gemma2")
        items = [BREAD, Item((system("s"), *BREAD.prompt), BREAD.replies)]
        assert folding.lengths(items, reply_ids(items)).system_folded.tolist() == [[0, 0], [1, 1]]

    def test_are_counted_once_and_then_need_no_tokenizer(
        self, tiny7_dir: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(tiny7_dir / "tiny-neox", tmp_path / "model")
        ids = reply_ids(self.ITEMS)
        first = Tokenization("x", folder).lengths(self.ITEMS, ids)
        again = Tokenization("another name", folder)
        for column, same in zip(first, again.lengths(self.ITEMS, ids), strict=True):
            np.testing.assert_array_equal(column, same)
        assert "format" not in vars(again)  # it was not even loaded
        more = (*self.ITEMS, Item(BREAD.prompt, (BREAD.replies[0], "New.")))
        assert again.lengths(more, reply_ids(more)).reply[3, 1] > 0
        assert "format" in vars(again)
        (folder / "chat_template.jinja").write_text("{% for m in messages %}-{% endfor %}")
        other = Tokenization("x", folder).lengths(self.ITEMS, ids)
        assert other.reply.tolist() != first.reply.tolist()


class TestCountsOfTokenizersThatLookAlike:
    """Numbers of one tokenizer are never another's."""

    @pytest.fixture(autouse=True)
    def cache(self, tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path / "cache"))

    def word_pieces(self, folder: Path, words: list[str]) -> Tokenization:
        letters = [chr(i) for i in range(33, 127)]
        folder.mkdir()
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words]
        vocabulary += [f"##{letter}" for letter in letters]
        (folder / "vocab.txt").write_text("\n".join(vocabulary))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        (folder / "config.json").write_text('{"model_type": "bert"}')
        return Tokenization(folder.name, folder, "plain")

    def test_vocabularies_alone(self, tmp_path: Path) -> None:
        ids = reply_ids([BREAD])
        one, other = (
            self.word_pieces(tmp_path / name, words)
            for name, words in (("one", []), ("other", ["sure", "bakery"]))
        )
        first = one.lengths([BREAD], ids).reply
        second = other.lengths([BREAD], ids).reply
        rows = [format.rows([BREAD])[0] or () for format in (one.format, other.format)]
        assert first.tolist() == [[row.reply_tokens for row in rows[0]]]
        assert second.tolist() == [[row.reply_tokens for row in rows[1]]]
        assert first.tolist() != second.tolist()

    def test_the_model_type_decides_the_class(self, tmp_path: Path) -> None:
        one = self.word_pieces(tmp_path / "one", [])
        before = one.key
        (one.folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3}')
        after = Tokenization("one", one.folder, "plain").key
        assert before != after
        (one.folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 4}')
        assert Tokenization("one", one.folder, "plain").key == after

    def test_counts_of_an_older_format_are_passed_over_with_a_word(
        self, tiny7_dir: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        tokenizer = Tokenization("x", tiny7_dir / "tiny-neox")
        old = {"format": tokenizer.fingerprint}
        table = Table.open("lengths", "x", old, {"reply": "i4"})
        ids = reply_ids([BREAD])
        table.append(ids, {"reply": np.full(ids.shape, 7)})
        assert 7 not in tokenizer.lengths([BREAD], ids).reply
        assert "x: tokens are counted anew, since counts in an older format" in caplog.text
        caplog.clear()
        tokenizer.lengths([BREAD], ids)
        assert not caplog.text


def test_a_reply_that_nothing_precedes_is_not_scorable(
    tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))
    file = tmp_path / "contents_only.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer = Tokenization("x", tiny7_dir / "tiny-neox", str(file))
    empty = Item((user(""),), BREAD.replies)
    lengths = tokenizer.lengths([empty], reply_ids([empty]))
    assert [row.reply_tokens > 0 for row in one(tokenizer.format, empty)] == [True, True]
    assert lengths.reply.tolist() == [[0, 0]]
