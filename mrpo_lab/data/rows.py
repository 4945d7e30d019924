"""Reading rows of preference data from files and the hub, and parsing rows of pairs."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrpo_lab.data.texts import Item, Message
from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage import hub
from mrpo_lab.storage.files import local_path

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(
    path: str, split: str = "train", config: str | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) from a local file, a local copy of a hub data set, or the hub.

    Args:
        path: a .jsonl, .json, .csv (each also .gz) or .parquet file, a folder in the hub's layout,
            or the name of a hub data set.
        split: the split of a hub data set; files have none.
        config: the configuration of a hub data set that has several.

    Raises:
        UserError: ``path`` does not exist or cannot be read, or the hub cannot be reached.
    """
    local = local_path(path)
    if local.is_file():
        yield from _file_rows(local)
    elif local.is_dir() or not _looks_local(path):
        for index, row in enumerate(_hub_rows(path, split, config)):
            yield f"{path}[{split}] row {index}", row
    else:
        raise UserError(f"dataset.path: there is no file or folder {path}")


def _looks_local(path: str) -> bool:
    return (
        path.startswith(("/", ".", "~"))
        or path.endswith((*SUFFIXES, ".gz"))
        or not (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path))
    )


def _hub_rows(path: str, split: str, config: str | None) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # They show downloads file by file, and log what is raised as well.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = local_path(path)
    reason = None if folder.is_dir() else hub.use_cache_if_unreachable()
    try:
        if any((folder / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(folder)
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise ValueError(f"there is none, choose from {', '.join(saved)}")
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(str(folder), config, split=split)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError, DatasetNotFoundError) as error:
        refusal = reason or f"the hub refused it ({first_line(error)})"
        raise hub.NotAtHandError(path, refusal) from error
    except (OSError, KeyError, ValueError, DatasetsError) as error:
        damage = folder.is_dir() and isinstance(error, DatasetsError) and _damage(folder)
        problem = damage or _explained(error)
        raise UserError(f"dataset.path: {path}, split {split}: {problem}") from error
    yield from rows


def _explained(error: BaseException) -> str:
    """An error of ``datasets`` in one line, with the cause that its message leaves out."""
    text = str(error)
    if "Config name is missing" in text or "BuilderConfig" in text:
        choices = re.search(r"\[.*?\]", text, re.DOTALL)
        return f"choose its configuration, dataset.config, from {choices[0] if choices else text}"
    root = error
    while root.__cause__ is not None and not isinstance(root, (ConnectionError, KeyError)):
        root = root.__cause__
    lines = dict.fromkeys([first_line(error), first_line(root)])
    return ": ".join(lines)


def _damage(folder: Path) -> str | None:
    """Why ``datasets`` cannot read a folder's files as one table: which file is damaged, or which
    two differ in their columns; None if neither is found."""
    columns: dict[Path, list[str]] = {}
    for file in sorted(folder.rglob("*")):
        if not file.name.removesuffix(".gz").endswith((".jsonl", ".csv", ".parquet")):
            continue
        try:
            for where, row in _file_rows(file):
                if not isinstance(row, Mapping):
                    return f"{where}: expected an object, got {type(row).__name__}"
                columns.setdefault(file, list(row))
        except UserError as error:
            return str(error)
    for file, names in columns.items():
        first, expected = next(iter(columns.items()))
        odd = sorted({*names} ^ {*expected})
        if odd:
            return (
                f"{first} and {file} differ in their columns ({', '.join(odd)}): give one of the "
                "files as dataset.path, or each its own configuration"
            )
    return None


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
    content = text.read()
    try:
        rows = _loads(content, str(path))
    except UserError:
        first = content.lstrip().partition("\n")[0]
        if first.startswith("{") and first.rstrip().endswith("}"):  # one object a line
            rows = None
        else:
            raise
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
    except (ValueError, RecursionError) as error:  # numbers of too many digits, too deep a nesting
        problem = first_line(error).partition(";")[0]
        raise UserError(f"{where}: JSON that cannot be read: {problem}") from error


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
                f"got {roles or 'nothing'}"
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
