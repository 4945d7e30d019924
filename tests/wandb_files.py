"""What W&B keeps offline, read back without W&B's own reader, which is gone since 0.31."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

PROTOCOL: Any = wandb_internal_pb2  # generated, without types
HEADER, BLOCK, PREFIX = 7, 2**15, struct.Struct("<IHB")


def records(path: Path) -> Iterator[Any]:
    """Every whole record of a LevelDB-format log: 32 KiB blocks of <crc, length, type> payload."""
    data, at, parts = path.read_bytes(), HEADER, b""
    while at + PREFIX.size <= len(data):
        if BLOCK - at % BLOCK < PREFIX.size:
            at += BLOCK - at % BLOCK  # no room for a prefix: zeros fill the block
            continue
        _, length, kind = PREFIX.unpack_from(data, at)
        at += PREFIX.size + length
        parts += data[at - length : at]
        if kind in (1, 4):  # whole, or the last of several parts
            record = PROTOCOL.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def plain(items: Any) -> dict[str, Any]:
    """W&B's key and JSON pairs as a dict, nested keys too."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(path: Path) -> list[dict[str, Any]]:
    """The logged lines, W&B's own keys (_step, _timestamp, ...) left out."""
    rows = [plain(record.history.item) for record in records(path) if record.HasField("history")]
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in rows]


def run(path: Path) -> Any:
    """The record that a run begins with: run_id, display_name, project, config, ..."""
    (begun,) = (record.run for record in records(path) if record.HasField("run"))
    return begun


def config(path: Path) -> dict[str, Any]:
    """The configuration that the run was begun with."""
    return {key: value for key, value in plain(run(path).config.update).items() if key[0] != "_"}


def summary(path: Path) -> dict[str, Any]:
    """The last value of every key of the summary."""
    found: dict[str, Any] = {}
    for record in records(path):
        if record.HasField("summary"):
            found |= plain(record.summary.update)
    return found


def saved(path: Path) -> set[str]:
    """Names of the files that a sync would upload."""
    found = (record.files.files for record in records(path) if record.HasField("files"))
    return {file.path for files in found for file in files}


def exit_code(path: Path) -> int:
    (code,) = (record.exit.exit_code for record in records(path) if record.HasField("exit"))
    return int(code)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
