"""Checks of a model's token rows: is each text where it belongs, and nothing else?

They decode tokens and know nothing of how ``ChatFormat`` made them, so that a mistake in rendering,
a template or a tokenizer that nobody thought of is found before a number is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mrpo_lab.data.chat import BORDER, THOUGHTS, ChatFormat, squeeze
from mrpo_lab.data.texts import Item, Message, TokenRow
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.storage.tables import NONE, Table

VERSION = 1
"""Version of the checks: increase it when they find more or less."""

WORDS = ("zebra", "quartz", "violin", "pumpkin", "harbor", "jigsaw", "walnut", "cobweb", "oxygen")
"""Contents of the messages of a specimen: no template prints them by itself."""


def check_rows(
    chat: ChatFormat, items: Sequence[Item], rows: Sequence[Sequence[TokenRow]]
) -> list[str]:
    """Check token rows against the texts they were made from. Case and white space inside do not
    count.

    The tokens before the reply must decode to a text with every message in it. Those of the reply
    must decode to the reply between what the template prints around any reply, such as an empty
    think block and the end of the turn. That is taken from a specimen, a conversation of the same
    roles in words of its own, of which no word of the prompt may be among the reply.

    Args:
        rows: the token rows of each item, one per reply.

    Returns:
        What is wrong, one line each; empty if nothing is.
    """
    problems: list[str] = []
    for item, replies in zip(items, rows, strict=True):
        specimen = _specimen(chat, [message["role"] for message in item.prompt])
        if isinstance(specimen, str):
            problems.append(specimen)
            continue
        for row, reply in zip(replies, item.replies, strict=True):
            problem = _problem(chat, item.prompt, reply, row, specimen)
            if problem:
                problems.append(problem)
    return list(dict.fromkeys(problems))


def first_problem(tokenization: Tokenization, items: Sequence[Item], ids: np.ndarray) -> str | None:
    """Describe the first mistake in the token rows of ``items``; None if there is none.

    See ``check_rows``.

    What was found is stored per reply, so that items that were checked before need no tokenizer.

    Args:
        ids: (N, R), from ``reply_ids(items)``.
    """
    key = {"text": tokenization.key, "version": VERSION}
    table = Table.open("conformance", tokenization.name, key, {"conforms": "i1"})
    known, found = table.read(ids)
    right = ((known["conforms"] == 1) | (ids == NONE)).all(-1)
    if found.all() and right.all():
        return None
    checked = np.flatnonzero(~(found.all(-1) & right))
    problems = []
    for n in checked.tolist():
        (rows,) = tokenization.rows([items[n]])
        problems.append(check_rows(tokenization.format, [items[n]], [rows or ()]))
    conforms = np.array([not here for here in problems], dtype=np.int8)
    table.append(ids[checked], {"conforms": np.repeat(conforms[:, None], ids.shape[1], axis=1)})
    return next((problem for here in problems for problem in here), None)


class _Around(NamedTuple):
    """What the template prints around any reply to a conversation of some roles."""

    lead: str
    """White space with which the reply's tokens begin."""
    before: str
    after: str


def _specimen(chat: ChatFormat, roles: Sequence[str]) -> _Around | str:
    """Text around the reply in a specimen, or a description of what is out of place."""
    words = [WORDS[i % len(WORDS)] + chr(97 + i // len(WORDS)) for i in range(len(roles) + 1)]
    prompt = tuple({"role": r, "content": word} for r, word in zip(roles, words, strict=False))
    (rows,) = chat.rows([Item(prompt, (words[-1],))])
    if rows is None:
        return f"conversations of {', '.join(roles)} cannot be rendered"
    asked, told = _decoded(chat, rows[0])
    for message in prompt:
        if message["content"] not in _plain(asked):
            return f"the text of the {message['role']} message is not in the prompt"
        if message["content"] in _plain(told):
            return f"the text of the {message['role']} message is part of the reply"
    before, found, after = _plain(told).partition(words[-1])
    if not found or words[-1] in _plain(asked):
        return "the reply's tokens are not the reply"
    return _Around(_lead(told), before, after)


def _problem(
    chat: ChatFormat, prompt: Sequence[Message], reply: str, row: TokenRow, specimen: _Around
) -> str | None:
    """Describe the mistake in one token row; None if there is none."""
    asked, told = _decoded(chat, row)
    for message in prompt:
        if not any(text in _plain(asked) for text in _forms(chat, message["content"])):
            return f"a {message['role']} message is not in the prompt: {message['content'][:40]!r}"
    _, before, after = specimen
    same_lead = _lead(told) == specimen.lead or reply != reply.lstrip() or not reply
    # Thoughts may be printed otherwise or not at all; a merged token may begin before the reply.
    free = bool(THOUGHTS.search(reply)) or row.prefix_broken
    for text in _forms(chat, reply):
        if same_lead and _plain(told) == before + text + after:
            return None
        extra = len(_plain(told)) - len(text + after)
        if free and _plain(told).endswith(text + after) and extra <= len(before) + BORDER:
            return None
    return f"the reply's tokens read {told[:60]!r}, where the reply is {reply[:40]!r}"


def _decoded(chat: ChatFormat, row: TokenRow) -> tuple[str, str]:
    """The texts of prompt and reply as the tokens have them."""
    return _decode(chat, row.ids[: row.start].tolist()), _decode(
        chat, row.ids[row.start :].tolist()
    )


def _decode(chat: ChatFormat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _lead(text: str) -> str:
    """The white space with which a text begins."""
    return text[: len(text) - len(text.lstrip())]


def _plain(text: str) -> str:
    """A text without white space and case."""
    return squeeze(text).casefold()


def _forms(chat: ChatFormat, content: str) -> list[str]:
    """A content as it is and as its tokens decode, whole and without its thoughts."""
    found = []
    for text in (content, THOUGHTS.sub("", content)):
        ids = chat.tokenizer([text.strip()], add_special_tokens=False)["input_ids"][0]
        found += [_plain(text), _plain(_decode(chat, ids))]
    return found
