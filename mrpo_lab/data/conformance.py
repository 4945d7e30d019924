"""Checks of a model's token rows: is each text where it belongs, and nothing else?

They decode tokens and know nothing of how ``ChatFormat`` made them, so that a mistake in rendering,
a template or a tokenizer that nobody thought of is found before a number is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from mrpo_lab.data.chat import THOUGHTS, ChatFormat, squeeze
from mrpo_lab.data.texts import Item, Message, TokenRow

WORDS = ("zebra", "quartz", "violin", "pumpkin", "harbor", "jigsaw", "walnut", "cobweb", "oxygen")
"""Contents of the messages of a specimen: no template prints them by itself."""


def check_rows(
    chat: ChatFormat, items: Sequence[Item], rows: Sequence[Sequence[TokenRow]]
) -> list[str]:
    """Check token rows against the texts they were made from. White space and case do not count.

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
        try:
            around = _around(chat, [message["role"] for message in item.prompt])
        except _MisplacedError as error:
            problems.append(str(error))
            continue
        for row, reply in zip(replies, item.replies, strict=True):
            problem = _problem(chat, item.prompt, reply, row, around)
            if problem:
                problems.append(problem)
    return list(dict.fromkeys(problems))


class _MisplacedError(Exception):
    """A word of a specimen that is not where it should be."""


def _around(chat: ChatFormat, roles: Sequence[str]) -> tuple[str, str]:
    """What the template prints before and after a reply to a conversation of these roles.

    Raises:
        _MisplacedError: the specimen's rows do not have each word in its place.
    """
    words = [WORDS[i % len(WORDS)] + chr(97 + i // len(WORDS)) for i in range(len(roles) + 1)]
    prompt = tuple({"role": r, "content": word} for r, word in zip(roles, words, strict=False))
    (rows,) = chat.rows([Item(prompt, (words[-1],))])
    if rows is None:
        raise _MisplacedError(f"conversations of {', '.join(roles)} cannot be rendered")
    asked, told = _decoded(chat, rows[0])
    for message in prompt:
        if message["content"] not in asked:
            raise _MisplacedError(f"the text of the {message['role']} message is not in the prompt")
        if message["content"] in told:
            raise _MisplacedError(f"the text of the {message['role']} message is part of the reply")
    before, found, after = told.partition(words[-1])
    if not found or words[-1] in asked:
        raise _MisplacedError("the reply's tokens are not the reply")
    return before, after


def _problem(
    chat: ChatFormat, prompt: Sequence[Message], reply: str, row: TokenRow, around: tuple[str, str]
) -> str | None:
    asked, told = _decoded(chat, row)
    for message in prompt:
        if not any(text in asked for text in _forms(chat, message["content"])):
            return f"a {message['role']} message is not in the prompt: {message['content'][:40]!r}"
    before, after = around
    for text in _forms(chat, reply):
        # With thoughts in it, a template may print other things before the reply, or less of it.
        if told == before + text + after or (
            THOUGHTS.search(reply) and told.endswith(text + after)
        ):
            return None
    return f"the reply's tokens read {told[:60]!r}, where the reply is {reply[:40]!r}"


def _decoded(chat: ChatFormat, row: TokenRow) -> tuple[str, str]:
    """The texts of prompt and reply as the tokens have them, squeezed."""
    return _decode(chat, row.ids[: row.start].tolist()), _decode(
        chat, row.ids[row.start :].tolist()
    )


def _decode(chat: ChatFormat, ids: list[int]) -> str:
    text = chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return squeeze(str(text)).casefold()


def _forms(chat: ChatFormat, content: str) -> list[str]:
    """A content as its tokens decode, which for some tokenizers is not what it was; whole, and
    without its thoughts."""
    found = []
    for text in (content, THOUGHTS.sub("", content)):
        found.append(squeeze(text).casefold())
        ids = chat.tokenizer([text.strip()], add_special_tokens=False)["input_ids"][0]
        found.append(_decode(chat, ids))
    return found
