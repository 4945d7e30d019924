"""Reading rows of preference data from files and the hub, and parsing rows of pairs."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mrpo_lab.data.texts import Item, Message
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage import hub

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path: str, split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yield (where, row) from a local file, a local copy of a hub data set, or the hub.

    Args:
        path: a .jsonl, .json, .csv (each also .gz) or .parquet file, a folder in the hub's layout,
            or the name of a hub data set.
        split: the split of a hub data set; files have none.

    Raises:
        UserError: ``path`` does not exist or cannot be read, or the hub cannot be reached.
    """
    local = Path(path).expanduser()
    if local.is_file():
        yield from _file_rows(local)
    elif local.is_dir() or not _looks_local(path):
        for index, row in enumerate(_hub_rows(path, split)):
            yield f"{path}[{split}] row {index}", row
    else:
        raise UserError(f"dataset.path: there is no file or folder {path}")


def _looks_local(path: str) -> bool:
    return (
        path.startswith(("/", ".", "~"))
        or path.endswith((*SUFFIXES, ".gz"))
        or not (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path))
    )


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # They show downloads file by file.
    datasets.disable_progress_bars()
    folder = Path(path).expanduser()
    reason = None if folder.is_dir() else hub.use_cache_if_unreachable()
    try:
        if any((folder / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(folder)
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise ValueError(f"there is none, choose from {', '.join(saved)}")
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(str(folder), split=split)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError, DatasetNotFoundError) as error:
        refusal = reason or f"the hub refused it ({first_line(error)})"
        raise hub.NotAtHandError(path, refusal) from error
    except (OSError, KeyError, ValueError, DatasetsError) as error:
        raise UserError(f"dataset.path: {path}, split {split}: {first_line(error)}") from error
    yield from rows


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            # The default, 65,536 rows, takes much memory as Python objects.
            batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path} row {index}", row) for index, row in enumerate(rows))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged or no parquet file: {first_line(error)}") from error
        return
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: expected {', '.join(SUFFIXES)}, the text ones also with .gz")
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
        # utf-8-sig drops the byte order mark of spreadsheets; newline="" keeps line ends in texts.
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        try:
            yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix](path, text)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error, csv.Error) as error:
            raise UserError(f"{path}: damaged: {first_line(error)}") from error


def _jsonl(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            yield f"{path} line {number}", _loads(line, f"{path} line {number}")


def _json(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    rows = _loads(text.read(), str(path))
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of objects, one a pair; for one a line use .jsonl"
        )
    yield from ((f"{path} row {index}", row) for index, row in enumerate(rows))


def _csv(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(text, strict=True)
    for row in reader:
        if None in row:
            raise UserError(f"{path} line {reader.line_num}: more cells than columns")
        yield f"{path} line {reader.line_num}", row


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error


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
            f"{where}: no {' and no '.join(missing)}; columns are {', '.join(map(str, row))}; "
            "expected prompt, chosen, rejected or response_0, response_1, better_response_id"
        )
    given = None if row.get("prompt") is None else list(as_prompt(row["prompt"], where))
    chosen, rejected = (_conversation(row[key], key, where, given) for key in ("chosen", "rejected"))
    shared = _shared_start(chosen, rejected)
    prompt = joined(given or [], shared, where)
    chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
    for key, reply in (("chosen", chosen), ("rejected", rejected)):
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            roles = [message["role"] for message in reply]
            raise UserError(
                f"{where}: {key} must end in one assistant reply after the prompt that both share, "
                f"got {roles or 'nothing'}"
            )
    asked = as_prompt(prompt, where)
    return checked(Item(asked, (chosen[0]["content"], rejected[0]["content"])), where)


def as_prompt(given: Any, where: str) -> tuple[Message, ...]:
    """Parse a prompt: a string, a transcript or messages.

    A final empty ``Assistant:`` turn, which only asks for the reply, is dropped.

    Raises:
        UserError: it is empty or of another form.
    """
    prompt = _transcript(given) if isinstance(given, str) else _messages(given, "prompt", where)
    prompt = prompt[:-1] if prompt[-1:] == _reply("") else prompt
    if not prompt:
        raise UserError(f"{where}: no prompt")
    return tuple(prompt)


def checked(item: Item, where: str) -> Item:
    """Return the item if its texts can be encoded as UTF-8.

    Raises:
        UserError: a text holds half of a surrogate pair.
    """
    try:
        "".join([*(message["content"] for message in item.prompt), *item.replies]).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode: {first_line(error)}") from error
    return item


def _from_pku(row: Row, where: str) -> Row:
    """Convert a row of PKU-SafeRLHF to ``prompt``, ``chosen`` and ``rejected``."""
    better = row["better_response_id"]
    if better not in (0, 1, "0", "1") or "prompt" not in row:
        raise UserError(
            f"{where}: better_response_id must be 0 or 1, beside a prompt; got {better!r}"
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


def _conversation(
    value: Any, key: str, where: str, given: list[Message] | None
) -> list[Message]:
    """Parse a reply, or a conversation that ends in one, to messages.

    Beside a prompt a text is a reply, unless it is a transcript that repeats the prompt.
    """
    if not isinstance(value, str):
        return _messages(value, key, where)
    turns = _transcript(value)
    conversation = len(turns) > 1 and (given is None or _overlap(given, turns[:-1]) is not None)
    return turns if conversation else _reply(value)


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


def _shared_start(left: list[Message], right: list[Message]) -> list[Message]:
    """The messages that two conversations have in common at the start, their last ones excluded."""
    shared = []
    for a, b in zip(left[:-1], right[:-1], strict=False):
        if a != b:
            break
        shared.append(a)
    return shared


def joined(given: list[Message], shared: list[Message], where: str) -> list[Message]:
    """The prompt, of which a row has one part as its prompt and one in its conversations.

    Messages that stand in both, white space aside, are taken once.

    Raises:
        UserError: the two parts contradict each other, so that a turn would stand there twice.
    """
    if not given or not shared:
        return given or shared
    overlap = _overlap(given, shared)
    if overlap is not None:
        return [*given[: len(given) - overlap], *shared] if overlap < 0 else given + shared[overlap:]
    repeated = [m for m in _normal(given) if m in _normal(shared) and m[0] != "assistant"]
    if repeated or given[-1]["role"] == shared[0]["role"] or shared[0]["role"] == "system":
        raise UserError(
            f"{where}: prompt and the start of chosen and rejected are different conversations, "
            f"the one with {given[-1]['content'][:40]!r}, the other with "
            f"{shared[-1]['content'][:40]!r}: leave one of them out"
        )
    return given + shared


def _overlap(given: list[Message], shared: list[Message]) -> int | None:
    ...


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
