"""Rendering and tokenizing messages, each model with its own tokenizer and chat template."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mrpo_lab.data.texts import Item, Message, TokenRow
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage.files import local_path
from mrpo_lab.storage.model_files import check_small_files, read_object

FROZEN_DATE = "26 Jul 2024"
"""Date shown by templates that print today's date: scores must not depend on the current day."""
FREEZE = "{% macro strftime_now(format) %}" + FROZEN_DATE + "{% endmacro %}\n"
"""Macro put before a template, in place of transformers' function of the same name."""

BORDER = 32
"""Largest number of characters at the end of a generation prompt that may be absent, or printed
otherwise, once a reply follows it, such as the opening of a think block."""
THOUGHTS = re.compile(r".*[<\[]/[\w:|]*(?:think|thought|reason)\w*[>\]]", re.DOTALL | re.IGNORECASE)
"""A reply up to the end of its thoughts, which templates of reasoning models leave out."""

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
"""The usual files of a tokenizer, in the order in which they are hashed."""
NOT_TOKENIZER = re.compile(
    r"\..*"
    r"|(readme|licen[cs]e|notice|use_policy|changelog)\b.*"
    r"|(config|generation_config|adapter_config|trainer_state|.*\.index)\.json"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|npz|md|pdf|png|jpe?g|gif|svg|log|lock)",
    re.IGNORECASE,
)
"""Files of a model's folder that its tokenizer does not read. Of config.json, see
``Tokenization.key``."""


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer and a chat template."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    name: str = "model"
    """What messages call the model."""
    origin: str = "its own template"
    """Where the template is from, for messages."""
    _closings: dict[tuple[str, ...], str | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    def rows(self, items: Sequence[Item]) -> list[tuple[TokenRow, ...] | None]:
        """The token rows of each item, one per reply; None where the item cannot be rendered.

        That is where the template refuses the prompt, loses the text of a message, or prints the
        prompt otherwise once a reply follows, even after the system message was merged into the
        first user message.

        Raises:
            UserError: the template has an error or does not print replies.
        """
        rendered = [self._render(item) for item in items]
        texts = [text for item in rendered if item for text in item.texts]
        encoded = iter(
            self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ()
        )
        return [
            item and self._split([next(encoded) for _ in item.texts], item) for item in rendered
        ]

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """The prompt as rendered for generation.

        Raises:
            UserError: the template refuses the prompt or loses the text of a message.
        """
        rendered = self._render(Item(tuple(prompt), ()))
        if rendered is None:
            raise UserError(f"{self.name}: the chat template refuses a prompt ({self.origin})")
        return rendered.texts[0]

    def _render(self, item: Item) -> _Rendered | None:
        """Render an item as it is or, failing that, without the system role."""
        folded = fold_system(item.prompt)
        for prompt in [item.prompt] if folded == item.prompt else [item.prompt, folded]:
            closing = self._closing(tuple(message["role"] for message in prompt))
            texts = None if closing is None else self._texts(prompt, item.replies, closing)
            if closing is not None and texts:
                return _Rendered(texts, closing, folded=prompt is not item.prompt)
        return None

    def _texts(
        self, prompt: Sequence[Message], replies: Sequence[str], closing: str
    ) -> list[str] | None:
        """The prompt alone and with each reply; None if a text is lost or the prompt changes."""
        try:
            asked, *wholes = self._apply(prompt, replies)
        except TemplateError:
            return None
        for message in prompt:
            if not prints(asked, message["content"], thoughts=message["role"] == "assistant"):
                return None
        begin = len(asked) - len(closing)
        for whole, reply in zip(wholes, replies, strict=True):
            if not _continues(asked, whole, closing) or not prints(whole[begin:], reply, True):
                return None
        return [asked, *wholes]

    def _closing(self, roles: tuple[str, ...]) -> str | None:
        """What the template prints between the last text of a prompt and the reply.

        Found with marks in place of the texts, so that no text of a message can be mistaken for
        another. None if the template refuses these roles, loses one of their texts, or prints the
        prompt otherwise once a reply follows.
        """
        if roles not in self._closings:
            self._closings[roles] = self._probe(roles)
        return self._closings[roles]

    def _probe(self, roles: tuple[str, ...]) -> str | None:
        *marks, reply = (f"lorem{i}ipsum" for i in range(len(roles) + 1))
        messages = [{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)]
        try:
            asked, whole = self._apply(messages, [reply])
        except TemplateError:
            return None
        if not all(mark in asked for mark in marks):
            return None
        closing = asked[max(asked.rfind(mark) + len(mark) for mark in marks) :]
        if not _continues(asked, whole, closing):
            return None
        if reply not in whole:
            raise UserError(
                f"{self.name}: the chat template does not print the text of replies "
                f"({self.origin}): give another, template=chatml or template=FILE.jinja"
            )
        return closing

    def _apply(self, prompt: Sequence[Message], replies: Iterable[str]) -> list[str]:
        """Render the prompt alone and the prompt with each reply.

        Raises:
            TemplateError: the template refuses them.
            UserError: the template has an error.
        """

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
        try:
            return [render(prompt, True), *(render([*prompt, answer], False) for answer in answers)]
        except TemplateSyntaxError as error:
            problem = f"line {error.lineno - FREEZE.count(chr(10))}: {first_line(error)}"
            raise UserError(f"{self.name}: chat template, {problem} ({self.origin})") from error
        except TemplateError:
            raise
        except Exception as error:  # a template is a program: anything can go wrong in it
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"{self.name}: chat template fails with {problem} ({self.origin})"
            ) from error

    def _split(self, encoded: list[list[int]], rendered: _Rendered) -> tuple[TokenRow, ...] | None:
        """The token rows of the replies; None if a reply would share a token with a message.

        Args:
            encoded: the tokens of the prompt, then those of the prompt with each reply.
        """
        prompt, *replies = encoded
        starts = [common_prefix(prompt, ids) for ids in replies]
        if starts and min(starts) < len(prompt):
            spilled = self.tokenizer.decode(prompt[min(starts) :])
            if len(squeeze(str(spilled))) > len(squeeze(rendered.closing)):
                return None
        return tuple(
            TokenRow(np.array(ids, dtype=np.int32), start, start < len(prompt), rendered.folded)
            for ids, start in zip(replies, starts, strict=True)
        )


class _Rendered(NamedTuple):
    """An item as texts."""

    texts: list[str]
    """The prompt alone, then the prompt with each reply."""
    closing: str
    """See ``ChatFormat._closing``."""
    folded: bool
    """See ``TokenRow.system_folded``."""


def _continues(asked: str, whole: str, closing: str) -> bool:
    """Whether ``whole`` begins with the prompt, but for a few characters of its ``closing``."""
    if whole.startswith(asked):
        return asked.endswith(closing)
    changed = len(asked) - common_prefix(asked, whole)
    return asked.endswith(closing) and changed <= min(len(closing), BORDER)


def prints(text: str, content: str, thoughts: bool = False) -> bool:
    """Whether ``text`` has ``content`` in it, white space aside.

    Args:
        thoughts: whether the content may lack its thoughts, up to ``</think>`` or the like.
    """
    if content in text:
        return True
    printed = squeeze(text)
    return squeeze(content) in printed or (
        thoughts and squeeze(THOUGHTS.sub("", content)) in printed
    )


def squeeze(text: str) -> str:
    """``text`` without white space."""
    return "".join(text.split())


def common_prefix(left: Sequence[int] | str, right: Sequence[int] | str) -> int:
    """Length of the longest common prefix of two token sequences or texts."""
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
    check_small_files(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # libraries raise anything for a damaged file
        if (folder / "tokenizer.json").is_file():
            read_object(folder / "tokenizer.json", name)
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
    return ChatFormat(
        tokenizer, source, name, f"template={template}" if template else f"the template of {folder}"
    )


def template_source(name: str, template: str) -> str:
    """The text of a template: ``plain`` or ``chatml``, which ship with the project, or a file.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    shipped = resources.files("mrpo_lab") / "templates" / f"{template}.jinja"
    if shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    file = local_path(template)
    if not file.is_file():
        raise UserError(f"{name}: template {template!r} is neither plain, chatml nor a file")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: template {template}: {first_line(error)}") from error


def format_fingerprint(
    folder: Path, name: str, template: str | None, trust_remote_code: bool = False
) -> str:
    """The sha256 of what determines the tokens of a text: tokenizer files and chat template.

    Every file in the folder counts but weights, documentation and the model's configuration, since
    tokenizers read vocabularies of many names and, if trusted, code.
    """
    digest = hashlib.sha256(FROZEN_DATE.encode())
    others = {f.name for f in folder.glob("*") if not NOT_TOKENIZER.fullmatch(f.name)}
    # The usual files first: keys of numbers that were stored before the others counted stay valid.
    for file in [*TOKENIZER_FILES, *sorted(others - {*TOKENIZER_FILES})]:
        if (folder / file).is_file():
            digest.update(file.encode() + b"\0" + (folder / file).read_bytes())
    digest.update(template_source(name, template).encode() if template else b"")
    digest.update(b"trust_remote_code" if trust_remote_code else b"")
    return digest.hexdigest()
