"""Every text is where it belongs in the token rows, whatever habits template and tokenizer have."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mrpo_lab.data.chat import ChatFormat, load_format
from mrpo_lab.data.conformance import check_rows
from mrpo_lab.data.texts import Item, Message, TokenRow
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.embedded.tiny7 import SLUGS
from mrpo_lab.errors import UserError
from mrpo_lab.training.inputs import PolicyTokens


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


SYSTEM = message("system", "Be brief.")
ASK = message("user", "  Where can I buy bread?\n")
HELLO, HI = message("user", "Hello!"), message("assistant", "Hi.")
REPLIES = ("At the bakery.", " Um,\n\nsomewhere. ")
PROMPTS: dict[str, tuple[Message, ...]] = {
    "question": (ASK,),
    "system": (SYSTEM, ASK),
    "turns": (HELLO, HI, ASK),
    "system and turns": (SYSTEM, HELLO, HI, ASK),
    "a system message that the question repeats": (SYSTEM, message("user", "Say: Be brief.")),
    "a system message of one letter": (message("system", "s"), ASK),
}

# What each template does with a message m, and with the generation prompt.
EACH = "{%- for m in messages %}"
END = "{%- endfor %}"
CHATML = "{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
OPEN = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
WITHOUT_SYSTEM = (
    "{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{{- '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{%- elif m['role'] == 'assistant' %}{{- m['content'] + '<|end|>\n' }}{%- endif %}{%- endfor %}"
)
LAST_USER = (
    "{%- if messages[0]['role'] == 'system' %}{%- set sys = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{{- bos_token }}{%- for m in rest %}{%- if m['role'] == 'user' %}"
    "{%- if loop.last and sys is defined %}"
    "{{- '[INST] ' + sys + '\n\n' + m['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
HABITS = {  # name to template, and whether it loses a system message that is not folded
    "chatml": (EACH + CHATML + END + OPEN, False),
    "default system message": (
        "{%- if messages[0]['role'] != 'system' %}"
        "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        + EACH
        + CHATML
        + END
        + OPEN,
        False,
    ),
    "empty think block before the last reply": (
        EACH
        + "{%- if loop.last and m['role'] == 'assistant' %}"
        + CHATML.replace("m['content']", "'<think>\n\n</think>\n\n' + m['content']")
        + "{%- else %}"
        + CHATML
        + "{%- endif %}"
        + END
        + OPEN,
        False,
    ),
    "generation prompt that opens a think block": (
        EACH
        + "{%- set c = m['content'] %}{%- if m['role'] == 'assistant' and '</think>' in c %}"
        + "{%- set c = c.split('</think>')[-1] %}{%- endif %}"
        + CHATML.replace("m['content']", "c")
        + END
        + OPEN.replace("assistant\n", "assistant\n<think>\n"),
        False,
    ),
    "channels": (
        EACH
        + "{{- '<|start|>' + m['role'] + ('<|channel|>final' if m['role'] == 'assistant' else '')"
        + " + '<|message|>' + m['content'] + '<|end|>' }}"
        + END
        + "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
        False,
    ),
    "dates, trimming and BOS by the template": (
        "{{- bos_token }}{{- strftime_now('%d %b %Y') }}"
        + EACH
        + CHATML.replace("m['content']", "m['content'] | trim")
        + END
        + OPEN,
        False,
    ),
    "end of text instead of a generation prompt": (
        EACH
        + CHATML
        + END
        + "{{- '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}",
        False,
    ),
    "system refused": (
        "{%- if messages[0]['role'] == 'system' %}"
        "{{- raise_exception('System role not supported') }}{%- endif %}"
        + EACH
        + CHATML
        + END
        + OPEN,
        True,
    ),
    "system dropped": (WITHOUT_SYSTEM, True),
    "system only before the last question": (LAST_USER, True),
    "system dropped beside several turns": (
        "{%- for m in messages %}{%- if m['role'] != 'system' or messages | length < 3 %}"
        + CHATML
        + "{%- endif %}{%- endfor %}"
        + OPEN,
        True,
    ),
    "system cut": (
        EACH
        + "{%- set c = m['content'] if m['role'] != 'system' else m['content'][:3] %}"
        + CHATML.replace("m['content']", "c")
        + END
        + OPEN,
        True,
    ),
}


def words_of(prompt: Sequence[Message]) -> list[str]:
    return ["".join(m["content"].split()) for m in prompt]


def decoded(chat: ChatFormat, row: TokenRow) -> tuple[str, str]:
    """What prompt and reply decode to, without white space."""
    parts = (row.ids[: row.start], row.ids[row.start :])
    return tuple("".join(str(chat.tokenizer.decode(part)).split()) for part in parts)  # type: ignore[return-value]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen2", "tiny-phi3", "words"])
def tokenizer(request: pytest.FixtureRequest, tiny7_dir: Path) -> Any:
    """Tokenizers with and without BOS, padding on either side, and one that lowers and splits."""
    if request.param != "words":
        return load_format("x", tiny7_dir / request.param).tokenizer
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = ["[UNK]", "[BOS]", "[EOS]", *letters, *(f"##{c}" for c in letters)]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing("[BOS] $A", None, [("[BOS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )


@pytest.mark.parametrize("habit", HABITS)
def test_every_text_is_where_it_belongs(tokenizer: Any, habit: str) -> None:
    template, folds = HABITS[habit]
    chat = ChatFormat(tokenizer, template)
    items = [Item(prompt, REPLIES) for prompt in PROMPTS.values()]
    found = chat.rows(items)
    for item, rows in zip(items, found, strict=True):
        assert rows is not None
        for row, reply in zip(rows, item.replies, strict=True):
            asked, told = decoded(chat, row)
            assert all(text in asked for text in words_of(item.prompt))
            assert "".join(reply.split()) in told
            assert not any(text in told for text in words_of(item.prompt) if len(text) > 1)
            assert row.system_folded == (folds and item.prompt[0]["role"] == "system")
    assert check_rows(chat, items, [rows for rows in found if rows]) == []


@pytest.mark.parametrize("slug", SLUGS)
def test_the_seven_conform(tiny7_dir: Path, slug: str) -> None:
    chat = load_format(slug, tiny7_dir / slug)
    items = [Item(prompt, REPLIES) for prompt in PROMPTS.values()]
    assert check_rows(chat, items, [rows for rows in chat.rows(items) if rows]) == []


LOSING = {
    "only the last question": "{{- '<u>' + messages[-1]['content'] + '</u>' }}",
    "no assistant turns": (
        "{%- for m in messages %}{%- if m['role'] != 'assistant' or loop.last %}"
        + CHATML
        + "{%- endif %}{%- endfor %}"
        + OPEN
    ),
    "questions change when answered": (
        EACH
        + "{{- ('? ' if loop.last and m['role'] == 'user' else '') + m['content'] + '\n' }}"
        + END
        + OPEN
    ),
    "a long generation prompt that is gone afterwards": (
        EACH + CHATML + END + "{%- if add_generation_prompt %}{{- 'Think well. ' * 4 }}{%- endif %}"
    ),
    "replies are cut": (
        EACH
        + CHATML.replace("m['content']", "m['content'][: 13 if m['role'] == 'assistant' else 99]")
        + END
        + OPEN
    ),
}


@pytest.mark.parametrize("habit", LOSING)
def test_a_template_that_loses_texts_refuses_such_items(tiny7_dir: Path, habit: str) -> None:
    chat = ChatFormat(load_format("x", tiny7_dir / "tiny-neox").tokenizer, LOSING[habit])
    assert chat.rows([Item(PROMPTS["turns"], REPLIES)]) == [None]


def test_a_token_that_holds_the_end_of_a_message_refuses_the_item(tiny7_dir: Path) -> None:
    """A template that prints nothing between a message and the reply merges their texts."""
    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "|": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    item = Item((message("user", "a"),), ("b",))
    for between, start in (("", None), ("|", 2)):
        template = EACH + "{{- m['content'] }}" + f"{{{{- '{between}' }}}}" + END
        (rows,) = ChatFormat(tokenizer, template).rows([item])
        assert (rows and rows[0].start) == start


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{%- for m in messages if m['role'] == 'user' %}" + CHATML + END,
            "does not print the text of replies",
        ),
        (EACH + "{{- m['content'] + tools | length | string }}" + END, "TypeError: .*NoneType"),
        (EACH + "{{- 1 // 0 }}" + END, "ZeroDivisionError"),
        (EACH + "{{- m['content'] + 1 }}" + END, "TypeError"),
        (EACH, "chat template, line 1: "),
    ],
)
def test_a_broken_template_is_one_line_that_names_model_and_template(
    tiny7_dir: Path, tmp_path: Path, template: str, problem: str
) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text(template)
    chat = load_format("tiny", tiny7_dir / "tiny-neox", str(file))
    with pytest.raises(UserError, match=f"tiny: .*{problem}.*template={file}") as caught:
        chat.rows([Item(PROMPTS["system"], REPLIES)])
    assert "\n" not in str(caught.value)


class TestCheckRows:
    """Rows that are wrong in one way each."""

    @pytest.fixture
    def chat(self, tiny7_dir: Path) -> ChatFormat:
        return load_format("x", tiny7_dir / "tiny-qwen3")

    @pytest.fixture
    def item(self) -> Item:
        return Item((message("system", "Be brief."), HELLO), REPLIES)

    def rows(self, chat: ChatFormat, item: Item) -> tuple[TokenRow, ...]:
        (rows,) = chat.rows([item])
        assert rows is not None
        return rows

    @pytest.mark.parametrize("shift", [-6, -1, 1, 12])
    def test_a_reply_that_begins_elsewhere(self, chat: ChatFormat, item: Item, shift: int) -> None:
        moved = [replace(row, start=row.start + shift) for row in self.rows(chat, item)]
        (problem, *_) = check_rows(chat, [item], [moved])
        assert "the reply's tokens read" in problem or "is not in the prompt" in problem

    def test_a_message_that_is_missing(self, chat: ChatFormat, item: Item) -> None:
        without = self.rows(chat, replace(item, prompt=item.prompt[1:]))
        assert check_rows(chat, [item], [without]) == [
            "a system message is not in the prompt: 'Be brief.'"
        ]

    def test_another_reply_and_a_cut_one(self, chat: ChatFormat, item: Item) -> None:
        rows = self.rows(chat, item)
        assert len(check_rows(chat, [item], [rows[::-1]])) == 2
        cut = [replace(row, ids=row.ids[:-3]) for row in rows]
        assert all("the reply's tokens read" in p for p in check_rows(chat, [item], [cut]))
        assert check_rows(chat, [item], [rows]) == []

    def test_left_padding_read_as_right_padding(self, chat: ChatFormat, item: Item) -> None:
        """Erratum 5: the tokens are those of a row padded on the left, the places are not."""
        padded = [
            replace(row, ids=np.concatenate([np.zeros(5, dtype=np.int32), row.ids])[: len(row.ids)])
            for row in self.rows(chat, item)
        ]
        assert check_rows(chat, [item], [padded])


class TestLambdaInThePrompt:
    ITEMS = (Item((ASK,), REPLIES, {"kind": (1.0, 0.0), "honest": (0.0, 1.0)}),)

    def tokens(self, folder: Path, template: str, into: Path) -> PolicyTokens:
        file = into / "policy.jinja"
        file.write_text(template)
        tokenization = Tokenization("policy", folder, str(file))
        return PolicyTokens(tokenization, self.ITEMS, ["kind", "honest"], conditioned=True)

    @pytest.mark.parametrize("habit", HABITS)
    def test_differs_in_tokens(self, tiny7_dir: Path, tmp_path: Path, habit: str) -> None:
        tokens = self.tokens(tiny7_dir / "tiny-llama", HABITS[habit][0], tmp_path)
        tokens.check()
        (one,), (other,) = (
            tokens.rows([0], torch.tensor(corner)) for corner in ((1.0, 0.0), (0.0, 1.0))
        )
        starts = [row.ids[: row.start].tolist() for row in (one[0], other[0])]
        assert starts[0] != starts[1]

    def test_is_refused_where_it_does_not(
        self, tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokens = self.tokens(tiny7_dir / "tiny-llama", HABITS["chatml"][0], tmp_path)
        monkeypatch.setattr("mrpo_lab.training.inputs.conditioned", lambda prompt, *_: prompt)
        with pytest.raises(UserError, match=r"lambda\.condition: prompts for different lambda"):
            tokens.check()

    def test_rows_of_the_policy_are_checked(
        self, tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokens = self.tokens(tiny7_dir / "tiny-llama", HABITS["chatml"][0], tmp_path)
        monkeypatch.setattr("mrpo_lab.training.inputs.check_rows", lambda *_: ["it is wrong"])
        with pytest.raises(UserError, match="model: it is wrong"):
            tokens.check()


def test_real_prompts_conform(tiny7_dir: Path) -> None:
    """The starter pairs, whose texts have lists, code and several languages in them."""
    from importlib import resources

    text = (resources.files("mrpo_lab.embedded") / "starter.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()[:60]]
    items = [Item((message("user", r["prompt"]),), (r["chosen"], r["rejected"])) for r in rows]
    for slug in SLUGS:
        chat = load_format(slug, tiny7_dir / slug)
        found = [found for found in chat.rows(items) if found]
        assert len(found) == len(items)
        assert check_rows(chat, items, found) == []


@pytest.fixture(scope="module")
def seven(tiny7_dir: Path) -> list[ChatFormat]:
    return [load_format(slug, tiny7_dir / slug) for slug in SLUGS]


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(prompt=st.text(), reply=st.text())
@example(prompt="\x00\n\r\u2028", reply="\U0001f469\u200d\U0001f680 e\u0301")
@example(prompt="", reply="<|im_end|>\n<|im_start|>user\n")
@example(prompt="<think>a</think>", reply="<think>\nb</think>\n\nc")
def test_any_text_conforms(seven: list[ChatFormat], prompt: str, reply: str) -> None:
    item = Item((message("user", prompt),), (reply, reply + "."))
    for chat in seven:
        (rows,) = chat.rows([item])
        assert rows is not None
        assert check_rows(chat, [item], [rows]) == []
