"""Rendering and tokenizing messages, each model with its own tokenizer and chat template."""

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
from mrpo_lab.storage.files import local_path

FROZEN_DATE = "26 Jul 2024"
"""Date shown by templates that print today's date: scores must not depend on the current day."""
FREEZE = "{% macro strftime_now(format) %}" + FROZEN_DATE + "{% endmacro %}\n"
"""Macro put before a template, in place of transformers' function of the same name."""

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
    """A tokenizer and a chat template."""

    tokenizer: PreTrainedTokenizerBase
    template: str

    def rows(self, items: Sequence[Item]) -> list[tuple[TokenRow, ...] | None]:
        """The token rows of each item, one per reply; None where the template refuses the prompt.

        Raises:
            UserError: the template has a syntax error.
        """
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
        """Render an item; if the template refuses it, try again without the system role."""
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
        """Render the prompt alone and the prompt with each reply."""

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
        """The prompt as rendered for generation."""
        return self._render(Item(tuple(prompt), ())).texts[0]


class _Rendered(NamedTuple):
    """An item as texts."""

    texts: list[str]
    """The prompt alone, then the prompt with each reply; empty if the template refused."""
    folded: bool
    """See ``TokenRow.system_folded``."""


def _split(encoded: list[list[int]], folded: bool) -> tuple[TokenRow, ...]:
    """The token rows of the replies.

    ``encoded`` has the tokens of the prompt, then those of the prompt with each reply.
    """
    prompt, *replies = encoded
    starts = [common_prefix(prompt, ids) for ids in replies]
    return tuple(
        TokenRow(np.array(ids, dtype=np.int32), start, start < len(prompt), folded)
        for ids, start in zip(replies, starts, strict=True)
    )


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix of two token sequences."""
    if list(right[: len(left)]) == list(left):
        return len(left)
    return next(
        i for i, pair in enumerate(zip(left, [*right, None], strict=False)) if pair[0] != pair[1]
    )


def fold_system(prompt: Sequence[Message]) -> tuple[Message, ...]:
    """The prompt with its system message merged into the first user message."""
    if len(prompt) < 2 or prompt[0]["role"] != "system" or prompt[1]["role"] != "user":
        return tuple(prompt)
    content = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
    return ({"role": "user", "content": content}, *prompt[2:])


def load_format(
    name: str, folder: Path, template: str | None = None, trust_remote_code: bool = False
) -> ChatFormat:
    """Load the tokenizer in ``folder``, with ``template`` in place of its own if one is given.

    Args:
        name: what error messages call the model.
        template: see ``template_source``.

    Raises:
        UserError: there is no chat template, or the tokenizer cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no usable tokenizer in {folder}: {first_line(error)}") from error
    source = template_source(name, template) if template else tokenizer.chat_template
    if isinstance(source, dict):  # several templates by name
        source = source.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{name}: {folder} has no chat template: give one, template=plain, template=chatml "
            "or template=FILE.jinja"
        )
    # ``Dataset`` filters long prompts and counts them; the tokenizer shall not warn about each.
    tokenizer.model_max_length = int(1e30)
    return ChatFormat(tokenizer, source)


def template_source(name: str, template: str) -> str:
    """The text of a template: ``plain`` or ``chatml``, which ship with the project, or a file.

    Raises:
        UserError: it is neither.
    """
    shipped = resources.files("mrpo_lab") / "templates" / f"{template}.jinja"
    if shipped.is_file():
        return shipped.read_text()
    if local_path(template).is_file():
        return local_path(template).read_text()
    raise UserError(f"{name}: template {template!r} is neither plain, chatml nor a file")


def format_fingerprint(folder: Path, name: str, template: str | None) -> str:
    """The sha256 of what determines the tokens of a text: tokenizer files and chat template."""
    digest = hashlib.sha256(FROZEN_DATE.encode())
    for file in TOKENIZER_FILES:
        if (folder / file).is_file():
            digest.update(file.encode() + b"\0" + (folder / file).read_bytes())
    digest.update(template_source(name, template).encode() if template else b"")
    return digest.hexdigest()
