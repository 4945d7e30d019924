"""Messages to tokens: each model with its own tokenizer and chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mrpo_lab.data.texts import Item, Message, TokenRow
from mrpo_lab.errors import UserError, first_line

# Some templates print today's date. Scores must not depend on the day they are computed.
FROZEN_DATE = "26 Jul 2024"
# A template calls transformers' function of this name unless it has a macro of it.
FREEZE = "{% macro strftime_now(format) %}" + FROZEN_DATE + "{% endmacro %}\n"

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


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer and a template."""

    tokenizer: PreTrainedTokenizerBase
    template: str

    def rows(self, items: Sequence[Item]) -> list[tuple[TokenRow, ...] | None]:
        """The R token rows of each item; None where the template refuses the prompt."""
        rendered = [self._render(item) for item in items]
        texts = [text for item in rendered for text in item.texts]
        encoded = iter(
            self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ()
        )
        return [
            _split([next(encoded) for _ in item.texts], item.folded) if item.texts else None
            for item in rendered
        ]

    def _render(self, item: Item) -> _Rendered:
        try:
            return _Rendered(self._apply(item.prompt, item.replies), folded=False)
        except TemplateSyntaxError as error:
            line = error.lineno - FREEZE.count("\n")
            raise UserError(f"chat template, line {line}: {first_line(error)}") from error
        except TemplateError:
            folded = fold_system(item.prompt)
        try:
            return _Rendered(self._apply(folded, item.replies), folded=True)
        except TemplateError:
            return _Rendered([], folded=False)

    def _apply(self, prompt: Sequence[Message], replies: Iterable[str]) -> list[str]:
        """Texts of the prompt alone and of the prompt with each reply."""

        def render(messages: Sequence[Message], generate: bool) -> str:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=FREEZE + self.template,
                add_generation_prompt=generate,
                tokenize=False,
                date_string=FROZEN_DATE,
            )
            assert isinstance(text, str)
            return text

        answers = [{"role": "assistant", "content": reply} for reply in replies]
        return [render(prompt, True), *(render([*prompt, answer], False) for answer in answers)]

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """The rendered prompt that a generated reply would follow."""
        return self._render(Item(tuple(prompt), ())).texts[0]


class _Rendered(NamedTuple):
    texts: list[str]
    """Of the prompt alone and of the prompt with each reply; empty if the template refused."""
    folded: bool


def _split(encoded: list[list[int]], folded: bool) -> tuple[TokenRow, ...]:
    """Token rows of the replies, given the tokens of the prompt and of prompt + each reply."""
    prompt, *replies = encoded
    starts = [common_prefix(prompt, ids) for ids in replies]
    return tuple(
        TokenRow(np.array(ids, dtype=np.int32), start, start < len(prompt), folded)
        for ids, start in zip(replies, starts, strict=True)
    )


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    if list(right[: len(left)]) == list(left):
        return len(left)
    return next(
        i for i, pair in enumerate(zip(left, [*right, None], strict=False)) if pair[0] != pair[1]
    )


def fold_system(prompt: Sequence[Message]) -> tuple[Message, ...]:
    """The same prompt with its system message put before the first user message."""
    if len(prompt) < 2 or prompt[0]["role"] != "system" or prompt[1]["role"] != "user":
        return tuple(prompt)
    content = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
    return ({"role": "user", "content": content}, *prompt[2:])


def load_format(
    name: str, folder: Path, template: str | None = None, trust_remote_code: bool = False
) -> ChatFormat:
    """The tokenizer in ``folder``, with ``template`` in place of its own if one is given.

    Raises:
        UserError: no template at all, or the tokenizer cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no usable tokenizer in {folder}: {first_line(error)}") from error
    source = template_source(name, template) if template else tokenizer.chat_template
    if isinstance(source, dict):  # several, by name
        source = source.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{name}: {folder} has no chat template: give one, template=plain, template=chatml "
            "or template=FILE.jinja"
        )
    # Prompts longer than the context are filtered by us, with a count; no warning per row.
    tokenizer.model_max_length = int(1e30)
    return ChatFormat(tokenizer, source)


def template_source(name: str, template: str) -> str:
    """Text of a template that ships with the project, or of a local file."""
    shipped = resources.files("mrpo_lab") / "templates" / f"{template}.jinja"
    if shipped.is_file():
        return shipped.read_text()
    if Path(template).is_file():
        return Path(template).read_text()
    raise UserError(f"{name}: template {template!r} is neither plain, chatml nor a file")


def format_fingerprint(folder: Path, name: str, template: str | None) -> str:
    """sha256 of all that decides the tokens of a text: tokenizer files and template."""
    digest = hashlib.sha256(FROZEN_DATE.encode())
    for file in TOKENIZER_FILES:
        if (folder / file).is_file():
            digest.update(file.encode() + b"\0" + (folder / file).read_bytes())
    digest.update(template_source(name, template).encode() if template else b"")
    return digest.hexdigest()
