"""Parsing: every accepted form of rows and files, and the error messages for others."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo_lab.data.dataset import FileDataset
from mrpo_lab.data.reading import read_rows
from mrpo_lab.data.rows import parse_item
from mrpo_lab.data.texts import Item
from mrpo_lab.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello!"}
HI = {"role": "assistant", "content": "Hi."}
ASK = {"role": "user", "content": "Bread?"}
GOOD = {"role": "assistant", "content": "At the bakery."}
BAD = {"role": "assistant", "content": "No idea."}
REPLIES = ("At the bakery.", "No idea.")
TURNS = (SYSTEM, HELLO, HI, ASK)
HUMAN = "Human: Hello!\n\nAssistant: Hi.\n\nHuman: Bread?\n\nAssistant:"

FORMS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "strings": ({"prompt": "Bread?", "chosen": REPLIES[0], "rejected": REPLIES[1]}, (ASK,)),
    "a string prompt, replies as lists": (
        {"prompt": "Bread?", "chosen": [GOOD], "rejected": [BAD]},
        (ASK,),
    ),
    "a string prompt, whole conversations": (  # ultrafeedback_binarized
        {"prompt": "Bread?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        (ASK,),
    ),
    "a prompt list, replies as lists": (
        {"prompt": list(TURNS), "chosen": [GOOD], "rejected": [BAD]},
        TURNS,
    ),
    "a prompt list, replies as strings": (
        {"prompt": list(TURNS), "chosen": REPLIES[0], "rejected": REPLIES[1]},
        TURNS,
    ),
    "a prompt list, one reply of each kind": (
        {"prompt": list(TURNS), "chosen": REPLIES[0], "rejected": [BAD]},
        TURNS,
    ),
    "a prompt list, whole conversations": (
        {"prompt": list(TURNS), "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
        TURNS,
    ),
    "conversations alone": ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, TURNS),
    "conversations, prompt null": (
        {"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        (ASK,),
    ),
    "PKU": (
        {
            "prompt": "Bread?",
            "response_0": REPLIES[1],
            "response_1": REPLIES[0],
            "better_response_id": 1,
        },
        (ASK,),
    ),
    "PKU from a csv": (
        {
            "prompt": "Bread?",
            "response_0": REPLIES[0],
            "response_1": REPLIES[1],
            "better_response_id": "0",
        },
        (ASK,),
    ),
    "pairs that keep a PKU column": (
        {"prompt": "Bread?", "chosen": [GOOD], "rejected": [BAD], "better_response_id": 1},
        (ASK,),
    ),
    "a transcript prompt": (
        {"prompt": HUMAN, "chosen": REPLIES[0], "rejected": REPLIES[1]},
        (HELLO, HI, ASK),
    ),
    "whole transcripts": (  # Anthropic/hh-rlhf
        {"chosen": f"\n\n{HUMAN} {REPLIES[0]}", "rejected": f"\n\n{HUMAN} {REPLIES[1]}"},
        (HELLO, HI, ASK),
    ),
    "a transcript prompt, whole transcripts": (
        {
            "prompt": HUMAN,
            "chosen": f"\n\n{HUMAN} {REPLIES[0]}",
            "rejected": f"{HUMAN} {REPLIES[1]}",
        },
        (HELLO, HI, ASK),
    ),
    "the last question, whole transcripts": (
        {
            "prompt": "Bread?",
            "chosen": f"{HUMAN} {REPLIES[0]}",
            "rejected": f"{HUMAN} {REPLIES[1]}",
        },
        (HELLO, HI, ASK),
    ),
    "PKU with whole transcripts": (
        {
            "prompt": "Bread?",
            "response_0": f"Human: Bread?\n\nAssistant: {REPLIES[0]}",
            "response_1": f"Human: Bread?\n\nAssistant: {REPLIES[1]}",
            "better_response_id": 0,
        },
        (ASK,),
    ),
    "a prompt list, conversations without its system message": (
        {"prompt": list(TURNS), "chosen": [*TURNS[1:], GOOD], "rejected": [*TURNS[1:], BAD]},
        TURNS,
    ),
    "a prompt list, the last question again": (
        {"prompt": list(TURNS), "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        TURNS,
    ),
    "a system message, then conversations": (
        {"prompt": [SYSTEM], "chosen": [HELLO, HI, ASK, GOOD], "rejected": [HELLO, HI, ASK, BAD]},
        TURNS,
    ),
    "the last question, conversations with a system message": (
        {"prompt": "Bread?", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
        TURNS,
    ),
    "the first turns, then conversations": (
        {"prompt": [SYSTEM, HELLO, HI], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        TURNS,
    ),
    "conversations with other white space": (
        {
            "prompt": [SYSTEM, {"role": "user", "content": "Bread? \r\n"}],
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
        },
        (SYSTEM, {"role": "user", "content": "Bread? \r\n"}),
    ),
    "an empty prompt, whole conversations": (
        {"prompt": "", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        (ASK,),
    ),
    "an empty list, whole conversations": (
        {"prompt": [], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        (ASK,),
    ),
    "a transcript prompt, replies as lists": (
        {"prompt": HUMAN, "chosen": [GOOD], "rejected": [BAD]},
        (HELLO, HI, ASK),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_rows(form: str) -> None:
    row, prompt = FORMS[form]
    assert parse_item(row | {"score": 3}, "here") == Item(prompt, REPLIES)


class TestTranscripts:
    def test_a_final_empty_reply_is_a_reply(self) -> None:
        row = {"chosen": f"\n\n{HUMAN} Yes.", "rejected": f"\n\n{HUMAN}"}
        assert parse_item(row, "") == Item((HELLO, HI, ASK), ("Yes.", ""))
        row = {"prompt": "Bread?", "chosen": "", "rejected": " "}
        assert parse_item(row, "") == Item((ASK,), ("", " "))

    def test_only_at_the_start_and_after_blank_lines(self) -> None:
        text = "Who is Human: you?\n\nAssistant: what?"
        item = parse_item({"prompt": text, "chosen": "a", "rejected": "b"}, "")
        assert item.prompt == ({"role": "user", "content": text},)
        inside = "Human: say\nAssistant: or Human: once\n\n\n  Assistant:  ok "
        item = parse_item({"prompt": inside, "chosen": "a", "rejected": "b"}, "")
        said = {"role": "user", "content": "say\nAssistant: or Human: once"}
        assert item.prompt == (said, {"role": "assistant", "content": "ok"})

    @pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
    def test_line_ends_of_any_system(self, end: str) -> None:
        text = HUMAN.replace("\n", end)
        item = parse_item({"prompt": text, "chosen": "a", "rejected": "b"}, "")
        assert item.prompt == (HELLO, HI, ASK)
        row = {"chosen": f"{end}{end}{text} Yes.{end}", "rejected": f"{text} No."}
        assert parse_item(row, "") == Item((HELLO, HI, ASK), ("Yes.", "No."))
        within = f"Human: say{end}Assistant: or Human: once{end}{end}Assistant:"
        item = parse_item({"prompt": within, "chosen": "a", "rejected": "b"}, "")
        assert item.prompt == ({"role": "user", "content": f"say{end}Assistant: or Human: once"},)

    def test_a_reply_that_is_a_dialogue_stays_one(self) -> None:
        replies = ("Human: Knock!\n\nAssistant: Who is there?", "Human: Hm.\n\nAssistant: Hm?")
        row = {"prompt": "Write a dialogue.", "chosen": replies[0], "rejected": replies[1]}
        assert parse_item(row, "").replies == replies

    @given(
        st.lists(st.text(alphabet="abc .\n", min_size=1).map(str.strip).filter(bool), min_size=1)
    )
    def test_any_turns_come_back(self, contents: list[str]) -> None:
        names, roles = ("Human", "Assistant"), ("user", "assistant")
        turns = contents if len(contents) % 2 else contents[:-1]
        text = "\n\n".join(f"{names[i % 2]}: {turn}" for i, turn in enumerate(turns))
        wanted = tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))
        row = {"chosen": f"{text}\n\nAssistant: yes", "rejected": f"{text}\n\nAssistant: no"}
        assert parse_item(row, "") == Item(wanted, ("yes", "no"))
        row = {"prompt": f"{text}\n\nAssistant:", "chosen": "yes", "rejected": "no"}
        assert parse_item(row, "") == Item(wanted, ("yes", "no"))


WRONG: dict[str, tuple[Any, str]] = {
    "no object": (["a"], "expected an object, got list"),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "no chosen; columns are prompt, rejected"),
    "neither": ({"prompt": "a", "x": 1}, "no chosen and no rejected; columns are prompt, x"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "b"}, "no chosen; columns"),
    "a number": ({"prompt": "a", "chosen": 1, "rejected": "b"}, "chosen must be a string or a"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "no prompt"),
    "an empty prompt list": ({"prompt": [], "chosen": "a", "rejected": "b"}, "no prompt"),
    "a number as prompt": ({"prompt": 1, "chosen": "a", "rejected": "b"}, "prompt must be a str"),
    "a role": (
        {"prompt": [{"role": "bot", "content": "a"}], "chosen": "a", "rejected": "b"},
        "prompt must be .* with roles system, user, assistant",
    ),
    "no content": (
        {"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": [BAD]},
        "chosen must be a string or a list",
    ),
    "a last word of the user": (
        {"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK]},
        r"rejected must end in one assistant reply .*, got \['assistant', 'user'\]",
    ),
    "nothing said": ({"prompt": "a", "chosen": [], "rejected": [BAD]}, "chosen .* got nothing"),
    "different prompts": (
        {"chosen": [HELLO, GOOD], "rejected": [ASK, BAD]},
        r"chosen must end in one .*prompt that both share, got \['user', 'assistant'\]",
    ),
    "a question that the conversations word otherwise": (
        {
            "prompt": [SYSTEM, {"role": "user", "content": "bread?"}],
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
        },
        "the prompt, 'bread.', is not how the conversations begin, 'Bread.': leave one",
    ),
    "another system message": (
        {"prompt": [HELLO, ASK], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        "is not how the conversations begin",
    ),
    "transcripts of another question": (
        {
            "prompt": "Human: Bread, please?\n\nAssistant:",
            "chosen": "Human: Bread?\n\nAssistant: a",
            "rejected": "Human: Bread?\n\nAssistant: b",
        },
        "is not how the conversations begin",
    ),
    "one transcript, one reply": (
        {"prompt": "Bread?", "chosen": "Human: Bread?\n\nAssistant: a", "rejected": "b"},
        "chosen must end in one assistant reply",
    ),
    "which is better": (
        {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 2},
        "better_response_id must be 0 or 1, beside a prompt; got 2",
    ),
    "PKU without a prompt": (
        {"response_0": "b", "response_1": "c", "better_response_id": 0},
        "better_response_id must be 0 or 1, beside a prompt",
    ),
    "PKU without a reply": (
        {"prompt": "a", "response_0": "b", "better_response_id": 0},
        "no response_1 beside better_response_id",
    ),
    "half a character": (
        {"prompt": "a", "chosen": "b", "rejected": "c \ud83d"},
        "not valid Unicode: .*surrogates not allowed",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_malformed_row_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    row, problem = WRONG[case]
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(FORMS['strings'][0])}\n\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=problem) as caught:
        FileDataset(path=str(path), train=None, val=1, test=1).read()
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert "\n" not in str(caught.value)


ROWS = [
    {"prompt": 'a, "b"\r\nc', "chosen": "line\nbreak\u2028\x85", "rejected": "\U0001f600 e\u0301"},
    {"prompt": "two", "chosen": "", "rejected": " "},
    {"prompt": "three", "chosen": "x" * 200_000, "rejected": "y"},
]


def as_csv(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


WRITERS: dict[str, Callable[[Any], bytes]] = {
    "jsonl": lambda rows: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
}


class TestFiles:
    @pytest.mark.parametrize("mark", [b"", "\ufeff".encode()])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("kind", WRITERS)
    def test_text(self, kind: str, packed: bool, mark: bytes, tmp_path: Path) -> None:
        content = mark + WRITERS[kind](ROWS)
        path = tmp_path / (f"pairs.{kind}" + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)
        found = list(read_rows(str(path)))
        assert [row for _, row in found] == ROWS
        assert all(where.startswith(f"{path} ") for where, _ in found)
        assert [parse_item(*pair[::-1]).replies for pair in found] == [
            (row["chosen"], row["rejected"]) for row in ROWS
        ]

    def test_parquet(self, tmp_path: Path) -> None:
        row = FORMS["conversations alone"][0]
        pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "pairs.parquet")
        found = list(read_rows(str(tmp_path / "pairs.parquet")))
        assert [row for _, row in found] == [row, row]
        assert found[1][0] == f"{tmp_path / 'pairs.parquet'} row 1"

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            (
                "a.jsonl",
                b'{"prompt": 1}\n{"prompt": ',
                r"a\.jsonl line 2: not valid JSON: .*line 1",
            ),
            ("a.json", b"[\n{},\n}]", r"a\.json: not valid JSON: .* at line 3 column 1"),
            ("a.json", b'{"prompt": 1}', "expected a list of objects, .* use .jsonl"),
            ("a.json", b'{"prompt": 1}\r\n{"prompt": 2}\r\n', "expected a list .* use .jsonl"),
            ("a.jsonl", b"1" * 5000, r"a\.jsonl line 1: JSON that .*4300 digits"),
            ("a.jsonl", b"{}\n" + b"[" * 99999, r"a\.jsonl line 2: JSON that .*recursion"),
            ("a.jsonl", b'{"prompt": "caf\xe9"}\n', "damaged: 'utf-8' codec"),
            ("a.jsonl.gz", b"no gzip", "damaged: Not a gzipped file"),
            ("a.csv", b'prompt,chosen\r\n"a","b\r\n', "damaged: unexpected end of data"),
            ("a.csv", b"prompt,chosen,rejected\na,b, with a comma,c\n", "line 2: more cells than"),
            ("a.parquet", b"PAR1 and no more", "damaged or no parquet file"),
            ("a.txt", b"a", r"expected \.jsonl, \.json, \.csv, \.parquet"),
            ("a.gz", b"a", r"expected \.jsonl, \.json, \.csv, \.parquet"),
            ("a.csv", b"prompt,chosen,chosen\na,b,c\n", "two columns are called 'chosen'"),
            ("a.csv", b"prompt,chosen,rejected\na,b,c\na,b\n", "line 3: fewer cells than columns"),
            ("a.jsonl", b'{"prompt": "a", "chosen": "b", "chosen": "c"}', "line 1: an object: two"),
            ("a.json", b'[{"a": {"b": 1, "b": 2}}]', "two columns are called 'b'"),
            *(
                (f"a.{kind}", b"", "a.*: no rows|not valid JSON")
                for kind in ("csv", "jsonl", "json")
            ),
            ("a.jsonl", b"\n \r\n\n", "no rows"),
            ("a.json", b"[]", "no rows"),
            ("a.jsonl", b'{"a": 1}\n' * 9000 + b"\xff\n", r"damaged after line \d+: 'utf-8'"),
            (
                "a.jsonl.gz",
                gzip.compress(b'{"a": 1}\n' * 20000)[:-9],
                r"damaged after line \d+: Comp",
            ),
        ],
    )
    def test_what_cannot_be_read(
        self, name: str, content: bytes, problem: str, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=problem) as caught:
            list(read_rows(str(path)))
        assert str(caught.value).startswith(str(path))

    def test_damage_within(self, tmp_path: Path) -> None:
        generator = random.Random(0)
        rows = [{"prompt": str(generator.random()), "chosen": "a", "rejected": "b"}] * 3000
        packed = gzip.compress(WRITERS["jsonl"]([r | {"id": generator.random()} for r in rows]))
        path = tmp_path / "a.jsonl.gz"
        for damaged in (packed[:-200], *(bit_flipped(packed, at) for at in (900, 5000, 20000))):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"^{path}"):
                list(read_rows(str(path)))
        pq.write_table(pa.table({"a": [str(i) * 50 for i in range(9000)]}), tmp_path / "a.parquet")
        content = bytearray((tmp_path / "a.parquet").read_bytes())
        content[200:400] = generator.randbytes(200)
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet: damaged or no parquet file"):
            list(read_rows(str(tmp_path / "a.parquet")))


def bit_flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


class TestFolders:
    @pytest.fixture(autouse=True)
    def hub_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The hub's layout: a file for each split."""
        folder = tmp_path / "copy"
        (folder / "data").mkdir(parents=True)
        for split, rows in (("train_prefs", ROWS), ("test_prefs", ROWS[:1])):
            path = folder / "data" / f"{split}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path)
        return folder

    def test_in_the_hubs_layout(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = list(read_rows(str(folder), "train_prefs"))
        assert [row for _, row in found] == ROWS
        assert found[2][0] == f"{folder}[train_prefs] row 2"
        assert [row for _, row in read_rows(str(folder), "test_prefs")] == ROWS[:1]
        monkeypatch.setenv("HOME", str(folder.parent))
        assert [row for _, row in read_rows("~/copy", "train_prefs")] == ROWS

    def test_saved_to_disk(self, tmp_path: Path) -> None:
        one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[1:])
        one.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
        assert [row for _, row in read_rows(str(tmp_path / "one"))] == ROWS
        assert [row for _, row in read_rows(str(tmp_path / "both"), "test")] == ROWS[1:]
        with pytest.raises(UserError, match="split valid: there is none, choose from train, test"):
            list(read_rows(str(tmp_path / "both"), "valid"))

    def test_what_cannot_be_read(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"copy, split train: .*test_prefs.*train_prefs"):
            list(read_rows(str(folder), "train"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"dataset\.path: .*empty, split train: .*data files"):
            list(read_rows(str(tmp_path / "empty")))
        for path in ("nowhere.jsonl", "./nowhere", "/nowhere", "a/b/c", "a.csv.gz"):
            with pytest.raises(UserError, match=f"there is no file or folder {path}$"):
                list(read_rows(path))

    def test_plain_files_of_which_one_is_damaged_or_different(self, tmp_path: Path) -> None:
        text = WRITERS["jsonl"](ROWS)
        for name, other, problem in (
            ("broken", b"{oops\n", r"b\.jsonl line 1: not valid JSON: "),
            ("packed", b"{oops\n", r"b\.jsonl\.gz line 1: not valid JSON: "),
            (
                "mixed",
                b'{"prompt": "a", "extra": 1}\n',
                r"a\.jsonl and .*b\.jsonl differ in their ",
            ),
            ("list", b"[1]\n", r"b\.jsonl line 1: expected an object, got list"),
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.jsonl").write_bytes(text)
            packed = name == "packed"
            file = tmp_path / name / ("b.jsonl.gz" if packed else "b.jsonl")
            file.write_bytes(gzip.compress(other) if packed else other)
            with pytest.raises(UserError, match=problem) as caught:
                list(read_rows(str(tmp_path / name)))
            assert "\n" not in str(caught.value)

    def test_one_of_several_configurations(self, tmp_path: Path) -> None:
        for name in ("short", "long"):
            (tmp_path / name).mkdir()
            rows = ROWS[:1] if name == "short" else ROWS
            (tmp_path / name / "train.jsonl").write_bytes(WRITERS["jsonl"](rows))
        entries = "".join(
            f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("short", "long")
        )
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
        data: dict[str, Any] = {"path": str(tmp_path), "train": None, "val": 1, "test": 1}
        assert len(FileDataset(**data, config="short").read()) == 1
        assert len(FileDataset(**data, config="long").read()) == 3
        for config in (None, "middle"):
            with pytest.raises(UserError, match=r"dataset\.config, from \['short', 'long'\]"):
                FileDataset(**data, config=config).read()

    def test_damage_within(self, folder: Path) -> None:
        path = folder / "data" / "train_prefs-00000-of-00001.parquet"
        content = bytearray(path.read_bytes())
        content[100:300] = random.Random(0).randbytes(200)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"dataset\.path: .*copy, split train_prefs: "):
            list(read_rows(str(folder), "train_prefs"))
