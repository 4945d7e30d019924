"""Data files that were changed at random: each is read, or refused in one line that names it."""

import copy
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import FORMS, WRITERS

from mrpo_lab.data.dataset import FileDataset
from mrpo_lab.data.lists import ListDataset
from mrpo_lab.data.reading import read_rows
from mrpo_lab.errors import UserError

FILES = 40
"""Number of changed files of each kind; more with a larger number, the first ones the same."""
PAIRS = [row for row, _ in FORMS.values()]
LISTS: list[dict[str, Any]] = [
    {"prompt": "Bread?", "responses": ["a", "b"], "ratings": {"good": [1, 2], "brief": [0, None]}},
    {"prompt": [{"role": "user", "content": "x"}], "responses": ["c"], "ratings": {"good": [3.5]}},
    {
        "instruction": "Bread?",
        "completions": [
            {"response": "a", "annotations": {"good": {"Rating": "5"}, "brief": {"Rating": "N/A"}}},
            {"response": "b", "annotations": {"good": {"Rating": "1"}}},
        ],
    },
]
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, float("nan"), 10**400, "", " ", "\0", "\ud800", "Human: x",
    "\r\n\r\n", [], {}, [None], [[]], {"": None}, ["a", 3], {"role": "user"},
    [{"role": "user", "content": None}], [{"role": ["user"], "content": "x"}], "x" * 100_000,
)  # fmt: skip
BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"\\ud800", b"{", b"]", b",", b"NaN")


def random_place(value: Any, chance: random.Random) -> list[Any]:
    """The keys and indices that lead to some place in nested lists and dicts."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not inner:
        return []
    key = chance.choice(inner)
    deeper = isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.7
    return [key, *(random_place(value[key], chance) if deeper else [])]


def changed_rows(rows: list[Any], chance: random.Random) -> list[Any]:
    """Rows of which one has something else, or nothing, in some place."""
    rows = copy.deepcopy(rows)
    *way, last = random_place(rows, chance)
    holder: Any = rows
    for key in way:
        holder = holder[key]
    if chance.random() < 0.2:
        del holder[last]
    elif chance.random() < 0.1 and isinstance(holder, dict):
        holder[chance.choice(["chosen", "ratings", "", "prompt", "\ud800"])] = holder.pop(last)
    else:
        holder[last] = chance.choice(JUNK)
    return rows


def changed_bytes(content: bytes, chance: random.Random) -> bytes:
    at, to = sorted(chance.choices(range(len(content) + 1), k=2))
    return chance.choice(
        [
            content[:at],
            content[:at] + content[to:],
            content[:to] + content[at:],
            content[:at] + chance.choice(BYTES) * chance.choice([1, 3, 5000]) + content[at:],
            content[:at] + bytes([content[at - 1] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
            content.replace(b"\n", chance.choice([b"\r\n", b"\r", b"\n\n \n", b""])),
            chance.randbytes(50),
        ]
    )


def as_parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


KINDS: dict[str, Callable[[Any], bytes]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": WRITERS["csv"],
    "parquet": as_parquet,
}


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        (kind, of)
        for kind in (*KINDS, "jsonl.gz")
        for of in ("pairs", "lists")
        if (kind, of) != ("csv", "lists")  # its cells are texts
    ],
)
def test_changed_at_random(tmp_path: Path, kind: str, of: str) -> None:
    dataset: Any = ListDataset if of == "lists" else FileDataset
    writer = KINDS[kind.partition(".")[0]]
    outcomes = {"read": 0, "refused": 0}
    for number in range(FILES):
        chance = random.Random(f"{kind} {of} {number}")
        rows = PAIRS if of == "pairs" else LISTS
        if kind in ("csv", "parquet"):  # which have the same columns in all rows
            rows = [chance.choice(rows)] * 3
        try:
            content = writer(changed_rows(rows, chance) if number % 2 else rows)
        except (ValueError, TypeError, AttributeError, pa.ArrowException, OverflowError):
            content = writer(rows)  # no such file can be written
        packed = kind.endswith(".gz")
        if packed and number % 4:
            content = gzip.compress(content)
        if not number % 2:
            content = changed_bytes(content, chance)
        if packed and not number % 4:
            content = gzip.compress(content)
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(content)
        error = outcome(dataset(path=str(path), train=None, val=1, test=1))
        outcomes["refused" if error else "read"] += 1
        if error:
            assert error.startswith(str(path)), (number, error)
            assert "\n" not in error, (number, error)
            assert len(error) < len(str(path)) + 1000, (number, error)
    assert min(outcomes.values()) > 0, outcomes


def outcome(dataset: FileDataset) -> str | None:
    """Read the data, and check that they can be used; what is said if they are refused."""
    try:
        items = dataset.read()
    except UserError as error:
        return str(error)
    for item in items:
        assert item.prompt
        contents = (message["content"] for message in item.prompt)
        "".join([*item.replies, *item.ratings, *contents]).encode()
        assert not np.isinf([rating for given in item.ratings.values() for rating in given]).any()
    return None


def test_two_columns_of_a_name_in_parquet(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns are called 'chosen'"):
        list(read_rows(str(tmp_path / "a.parquet")))
