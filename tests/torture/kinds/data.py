"""Malformed data files: read correctly, or refused in one line that names the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from harness import TINY

from mrpo_lab.experiment import Experiment
from torture.place import Place, refused, succeeded
from torture.process import BrokenError

NUMBER = 20
TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[31mred",
    "\ud800",
    "\u202e",
    "a" * 100_000,
    "\r\n",
    "{{ x }}",
    "<s>",
)
VALUES: tuple[Any, ...] = (None, True, 0, 10**400, float("nan"), [], {}, [[]], [None], [""], *TEXTS)
JUNK = (b"", b"\n\n", b"\x00" * 64, b"\xff\xfe", b"[" * 5000, b"[]", b"{}", b"null\n", b"PAR1PAR1")


def trial(place: Place, random: Random) -> None:
    rows = [row(number, messages=random.random() < 0.4) for number in range(NUMBER)]
    name = random.choice(["pairs.jsonl", "pairs.json", "pairs.csv", "pairs.parquet"])
    for _ in range(random.choice([0, 1, 1, 2])):
        damage_row(rows, random)
    content = written(name, rows)
    if random.random() < 0.4:
        content = damage_bytes(content, random)
    if random.random() < 0.2 and not name.endswith("parquet"):
        name, content = f"{name}.gz", gzip.compress(content)
        content = damage_bytes(content, random) if random.random() < 0.5 else content
    (place.work / name).write_bytes(content)
    tiny = [each for each in TINY if not each.startswith("dataset.")]
    sizes = ("dataset.val=2", "dataset.test=2", "protocol.probe_size=2", "protocol.batch_size=5")
    whole = random.random() < 0.1
    done = place.start(
        *("train.py", *tiny, *sizes, "dataset=jsonl", f"dataset.path={name}"),
        before=None if whole else until_prepared,
    ).wait()
    if done.code == 0:
        succeeded(done)
    elif name not in (message := refused(done)) and "dataset" not in message:
        raise BrokenError(f"the message does not name the file: {message}")


def until_prepared() -> None:
    """End with code 0 where references would be scored."""
    Experiment.reference_scores = _end  # type: ignore[assignment]


def _end(*_: Any) -> None:
    os._exit(0)


def row(number: int, messages: bool) -> dict[str, Any]:
    prompt, chosen, rejected = f"Shop {number}?", f"Walk {number} steps.", f"No {number}."
    if not messages:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    begun = [{"role": "user", "content": prompt}]
    return {
        side: [*begun, {"role": "assistant", "content": text}]
        for side, text in (("chosen", chosen), ("rejected", rejected))
    }


def damage_row(rows: list[Any], random: Random) -> None:
    number = random.randrange(len(rows))
    row, value = rows[number], random.choice(VALUES)
    key = random.choice(list(row)) if isinstance(row, dict) and row else None
    action = random.choice(["value", "lost", "extra", "row", "message", "twice"])
    if action == "row" or key is None:
        rows[number] = value
    elif action == "lost":
        del row[key]
    elif action == "extra":
        row[random.choice(["id", "response_0", "better_response_id", "messages"])] = value
    elif action == "message" and isinstance(row[key], list) and row[key]:
        message = row[key][random.randrange(len(row[key]))]
        if isinstance(message, dict):
            message[random.choice(["role", "content", "name"])] = value
    elif action == "twice":
        rows.append(row)
    else:
        row[key] = value


def written(name: str, rows: list[Any]) -> bytes:
    if name.endswith("parquet"):
        return as_parquet(rows)
    if name.endswith("csv"):
        return as_csv(rows)
    lines = [json.dumps(each) for each in rows]
    return ("[" + ",\n".join(lines) + "]" if name.endswith("json") else "\n".join(lines)).encode()


def as_csv(rows: list[Any]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    columns = list(dict.fromkeys(key for each in rows if isinstance(each, dict) for key in each))
    writer.writerow(columns)
    for each in rows:
        writer.writerow([each.get(c, "") for c in columns] if isinstance(each, dict) else [each])
    return file.getvalue().encode(errors="surrogatepass")


def as_parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    try:
        pq.write_table(
            pa.Table.from_pylist([each for each in rows if isinstance(each, dict)]), file
        )
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):  # no parquet can hold it
        pq.write_table(pa.table({"prompt": [1, 2]}), file)
    return file.getvalue()


def damage_bytes(content: bytes, random: Random) -> bytes:
    """Cut, flip, insert or replace."""
    place = random.randrange(len(content) + 1)
    junk = random.choice(JUNK)
    return random.choice(
        [
            content[:place],
            content[:place] + junk + content[place:],
            content[:place] + bytes([random.randrange(256)]) + content[place + 1 :],
            b"\xef\xbb\xbf" + content,
            content.replace(b"\n", b"\r\n"),
            content.replace(b'"', b"'", 3),
            junk,
        ]
    )
