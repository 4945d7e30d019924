"""Parsing rows of preference data: prompts, replies and pairs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_lab.data.texts import Item, Message
from mrpo_lab.errors import UserError, first_line

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant")


def parse_item(row: Row, where: str) -> Item:
    """Parse a row of a pair: a prompt and two replies, the chosen one first.

    Accepted forms: ``prompt``, ``chosen``, ``rejected`` as strings; ``chosen`` and ``rejected`` as
    message lists that begin with the same prompt, with or without ``prompt`` (a string or a list);
    PKU's ``response_0``, ``response_1``, ``better_response_id``; and, in any string prompt or
    conversation, ``Human: ... Assistant: ...`` transcripts.

    Raises:
        UserError: something is missing or of another form; names ``where``.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}")
    if "better_response_id" in row and "chosen" not in row:
        row = _from_pku(row, where)
    missing = [key for key in ("chosen", "rejected") if row.get(key) is None]
    if missing and ("responses" in row or "completions" in row):
        raise UserError(f"{where}: a list of replies, which dataset=jsonl_lists reads")
    if missing:
        raise UserError(
            f"{where}: no {' and no '.join(missing)}; columns are {column_names(row)}; "
            "expected prompt, chosen, rejected or response_0, response_1, better_response_id"
        )
    given = row.get("prompt")
    replies = {"chosen": row["chosen"], "rejected": row["rejected"]}
    prompt, texts = separate(None if given is None else as_turns(given, where), replies, where)
    return checked(Item(as_prompt(prompt, where), tuple(texts)), where)


def separate(
    given: list[Message] | None, replies: Mapping[str, Any], where: str
) -> tuple[list[Message], list[str]]:
    """The prompt, and each reply without it.

    Args:
        given: the prompt as the row has it, if it has one.
        replies: name to a reply, or to a conversation that begins with the prompt and ends in the
            reply; as texts, transcripts or messages.

    Raises:
        UserError: a reply is of another form, or the conversations contradict the prompt.
    """
    parsed = [
        _transcript(value) if isinstance(value, str) else _messages(value, key, where)
        for key, value in replies.items()
    ]
    shared = _shared_start(parsed)
    if given is not None and not shared:  # beside a prompt, such a text is a reply as it stands
        parsed = [
            turns
            if not isinstance(value, str) or (turns[1:] and _merged(given, turns[:-1]))
            else _reply(value)
            for value, turns in zip(replies.values(), parsed, strict=True)
        ]
    parsed = [
        _reply(value) if isinstance(value, str) and len(turns) == 1 else turns
        for value, turns in zip(replies.values(), parsed, strict=True)
    ]
    texts = []
    for key, turns in zip(replies, parsed, strict=True):
        reply = turns[len(shared) :]
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            roles = [message["role"] for message in reply]
            raise UserError(
                f"{where}: {key} must end in one assistant reply after the prompt that both share, "
                f"got {roles[:6] or 'nothing'}"
            )
        texts.append(reply[0]["content"])
    return _joined(given or [], shared, where), texts


def as_prompt(given: Any, where: str) -> tuple[Message, ...]:
    """Parse a prompt: a string, a transcript or messages.

    A final empty ``Assistant:`` turn, which only asks for the reply, is dropped.

    Raises:
        UserError: it is empty or of another form.
    """
    prompt = as_turns(given, where)
    if not prompt:
        raise UserError(f"{where}: no prompt")
    return tuple(prompt)


def as_turns(given: Any, where: str) -> list[Message]:
    """Parse a prompt as ``as_prompt`` does; it may be empty."""
    turns = _transcript(given) if isinstance(given, str) else _messages(given, "prompt", where)
    return turns[:-1] if turns[-1:] == _reply("") else turns


def column_names(row: Row) -> str:
    """The names of a row's columns for a message: the first ones, and each in one short line."""
    names = [shown(str(name)) for name in row]
    return ", ".join([*names[:12], *["..."] * (len(names) > 12)])


def shown(name: str) -> str:
    """A name from the data for a message: as it is, or quoted and cut where it is long or odd."""
    return name if name.isprintable() and len(name) <= 40 else repr(name[:40])


def checked(item: Item, where: str) -> Item:
    """Return the item if its texts can be encoded as UTF-8.

    Raises:
        UserError: a text holds half of a surrogate pair.
    """
    try:
        contents = (message["content"] for message in item.prompt)
        "".join([*contents, *item.replies, *item.ratings]).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode: {first_line(error)}") from error
    return item


def _from_pku(row: Row, where: str) -> Row:
    """Convert a row of PKU-SafeRLHF to ``prompt``, ``chosen`` and ``rejected``."""
    better = row["better_response_id"]
    if better not in (0, 1, "0", "1") or "prompt" not in row:
        raise UserError(
            f"{where}: better_response_id must be 0 or 1, beside a prompt; got {repr(better)[:40]}"
        )
    replies = [row.get("response_0"), row.get("response_1")]
    if None in replies:
        raise UserError(f"{where}: no response_{replies.index(None)} beside better_response_id")
    return {
        "prompt": row["prompt"],
        "chosen": replies[int(better)],
        "rejected": replies[1 - int(better)],
    }


def _reply(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _messages(value: Any, key: str, where: str) -> list[Message]:
    well_formed = isinstance(value, list) and all(
        isinstance(m, Mapping) and m.get("role") in ROLES and isinstance(m.get("content"), str)
        for m in value
    )
    if not well_formed:
        raise UserError(
            f"{where}: {key} must be a string or a list of {{role, content}} with roles "
            f"{', '.join(ROLES)}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _shared_start(conversations: Sequence[list[Message]]) -> list[Message]:
    """The messages with which all conversations begin, their last ones excluded."""
    shared = []
    for messages in zip(*(turns[:-1] for turns in conversations), strict=False):
        if any(message != messages[0] for message in messages):
            break
        shared.append(messages[0])
    return shared


def _joined(given: list[Message], shared: list[Message], where: str) -> list[Message]:
    """The whole prompt, from a row's prompt and from the start that its conversations share.

    Raises:
        UserError: they contradict each other, so that a turn would be in the prompt twice.
    """
    if not shared or not any(message["content"].strip() for message in given):
        return shared or given
    merged = _merged(given, shared)
    if merged is not None:
        return merged
    repeated = any(m in _normal(shared) for m in _normal(given) if m[0] != "assistant")
    if repeated or given[-1]["role"] == shared[0]["role"] or shared[0]["role"] == "system":
        raise UserError(
            f"{where}: the prompt, {given[-1]['content'][:40]!r}, is not how the conversations "
            f"begin, {shared[-1]['content'][:40]!r}: leave one of the two out of the row"
        )
    return given + shared


def _merged(given: list[Message], shared: list[Message]) -> list[Message] | None:
    """The two as one, if one contains or continues the other, white space aside; else None."""
    left, right = _normal(given), _normal(shared)
    if any(right[i : i + len(left)] == left for i in range(len(right))):
        return shared
    for length in range(min(len(left), len(right)), 0, -1):
        if left[-length:] == right[:length]:
            return given + shared[length:]
    return None


def _normal(messages: list[Message]) -> list[tuple[str, str]]:
    """Messages as (role, text), each run of white space as one space."""
    return [(message["role"], " ".join(message["content"].split())) for message in messages]


_TURN = re.compile(r"(?:^|(?:\r\n|\r(?!\n)|(?<!\r)\n){2})\s*(Human|Assistant):")
"""The beginning of a transcript's turn: at the start, or after an empty line of any system."""


def _transcript(text: str) -> list[Message]:
    """Parse ``Human: ... Assistant: ...`` to messages; any other text is one user message."""
    if not re.match(r"\s*Human:", text):
        return [{"role": "user", "content": text}]
    turns = _TURN.split(text.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(turns[1::2], turns[2::2], strict=True)
    ]
