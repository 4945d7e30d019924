"""Tables of numbers per reply: what is found again, by which process, and what is refused."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrpo_lab.data.dataset import Dataset
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.rows import Row
from mrpo_lab.data.texts import Item
from mrpo_lab.embedded.synthetic import synthetic_rows
from mrpo_lab.errors import UserError
from mrpo_lab.models import references, stored_scores
from mrpo_lab.models.policy import PolicyConfig
from mrpo_lab.models.references import Reference, ReferenceSet
from mrpo_lab.objective.scores import Scores
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.storage.tables import Table

CPU = torch.device("cpu")
COLUMNS = {"sums": "f8", "counts": "i8"}
FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import for seconds


@pytest.fixture(autouse=True)
def cache(tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test; the models are elsewhere."""
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table(**key: Any) -> Table:
    return Table.open("scores", "some", key, COLUMNS)


def named(*names: str) -> np.ndarray:
    return np.array([name.encode().ljust(16, b".") for name in names], dtype="S16")


def numbers(ids: np.ndarray, salt: float = 0.0) -> dict[str, np.ndarray]:
    """Numbers that are a function of the id."""
    values = np.array([int.from_bytes(i[:8], "big") % 9973 for i in ids.ravel()]).reshape(ids.shape)
    return {"sums": -values / 7 - salt, "counts": values}


def ask(text: str, *replies: str) -> Item:
    return Item(({"role": "user", "content": text},), replies)


class TestIds:
    def test_belong_to_one_prompt_and_one_reply(self) -> None:
        a, b, c = reply_ids([ask("p", "x", "y"), ask("p", "x", "z"), ask("q", "x", "y")])
        assert a[0] == b[0]  # pairs that share a reply share its row
        assert len({*a, *b, *c}) == 5

    @given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=2, max_size=9))
    def test_differ_wherever_the_texts_do(self, pairs: list[tuple[str, str]]) -> None:
        items = [ask(prompt, reply) for prompt, reply in pairs]
        items += [Item(({"role": "system", "content": p},), (r,)) for p, r in pairs]
        items += [
            Item(({"role": "user", "content": p}, {"role": "assistant", "content": r}), (r,))
            for p, r in pairs
        ]
        assert len({i.tobytes() for i in reply_ids(items)}) == 3 * len(set(pairs))


class TestTable:
    def test_finds_what_was_added_and_nothing_else(self) -> None:
        kept, absent = named("a", "b", "c", "d").reshape(2, 2), named("e", "f")
        table().append(kept[:1], numbers(kept[:1]))
        table().append(kept[1:], numbers(kept[1:]))
        asked = np.concatenate([kept[::-1], absent.reshape(1, 2), kept[:1]])
        values, found = table().read(asked)
        assert found.tolist() == [[True, True], [True, True], [False, False], [True, True]]
        expected = numbers(asked)
        for name, column in values.items():
            assert column.dtype == COLUMNS[name]
            np.testing.assert_array_equal(column[found], expected[name][found])
            assert (column[~found] == 0).all()

    def test_an_empty_table_and_no_question(self) -> None:
        assert not table().read(named("a"))[1].any()
        table().append(named("a"), numbers(named("a")))
        values, found = table().read(named())
        assert found.shape == values["sums"].shape == (0,)

    def test_ids_that_end_in_zero_bytes(self) -> None:
        ids = np.array([b"a", b"a\0b", b"\0" * 16, b"b" * 15], dtype="S16")
        table().append(ids, numbers(ids))
        values, found = table().read(ids[::-1])
        assert found.all()
        np.testing.assert_array_equal(values["counts"], numbers(ids[::-1])["counts"])
        assert not table().read(np.array([b"a\0c"], dtype="S16"))[1].any()

    def test_a_number_that_was_read_once_never_changes(self) -> None:
        ids = named("a", "b")
        for salt in range(12):  # scored again in other batches: the last digits differ
            table().append(ids, numbers(ids, salt))
            np.testing.assert_array_equal(table().read(ids)[0]["sums"], numbers(ids)["sums"])

    def test_others_may_read_the_shards(self) -> None:
        old = os.umask(0o022)
        try:
            table().append(named("a"), numbers(named("a")))
        finally:
            os.umask(old)
        (shard,) = table().folder.glob("*.safetensors")
        assert stat.S_IMODE(shard.stat().st_mode) == 0o644

    def test_a_cache_that_cannot_be_written_is_named(self, cache: Path) -> None:
        cache.write_text("a file")
        with pytest.raises(UserError, match=r"cannot write to the cache .*: set MRPO_LAB_CACHE"):
            table()


def start(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def write_many(worker: int) -> None:
    for turn in range(15):
        ids = named(*(f"{name}-{turn}" for name in ("all", f"w{worker}", f"v{worker}")))
        table().append(ids, numbers(ids))


def die_while_writing() -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    table().append(named("a"), numbers(named("a")))


def fill(inside: Event, go_on: Event) -> None:
    with table().filling():
        inside.set()
        go_on.wait(20)
        table().append(named("a"), numbers(named("a")))


class TestManyProcesses:
    def test_lose_and_tear_nothing(self) -> None:
        processes = [start(write_many, worker) for worker in range(4)]
        names = [f"{name}{worker}" for name in "wv" for worker in range(4)]
        ids = named(*(f"{name}-{turn}" for name in ("all", *names) for turn in range(15)))
        seen, reads = 0, 0
        while any(process.is_alive() for process in processes):
            values, found = table().read(ids)  # never half a shard, never fewer rows than before
            np.testing.assert_array_equal(values["counts"][found], numbers(ids)["counts"][found])
            assert found.sum() >= seen
            seen, reads = int(found.sum()), reads + 1
        assert [process.exitcode for process in processes] == [0] * 4
        values, found = table().read(ids)
        assert found.all()
        np.testing.assert_array_equal(values["sums"], numbers(ids)["sums"])
        assert len(list(table().folder.glob("*.safetensors"))) == 60
        assert reads > 1

    def test_an_interrupted_write_leaves_nothing_to_see(self) -> None:
        table().append(named("b"), numbers(named("b")))
        process = start(die_while_writing)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert table().read(named("a", "b"))[1].tolist() == [False, True]
        table().append(named("a"), numbers(named("a")))
        assert table().read(named("a", "b"))[1].all()

    def test_one_fills_the_others_wait_and_read(self, caplog: pytest.LogCaptureFixture) -> None:
        inside, go_on = FORK.Event(), FORK.Event()
        process = start(fill, inside, go_on)
        assert inside.wait(20)
        with caplog.at_level(logging.INFO, logger="mrpo_lab"):
            threading.Timer(0.3, go_on.set).start()
            with table().filling():
                assert table().read(named("a"))[1].all()
        assert "another process is computing it, waiting" in caplog.text
        process.join()
        caplog.clear()
        with table().filling():
            assert not caplog.text


class Given(Dataset):
    """A data set of given rows."""

    given: Sequence[Row] = ()

    def rows(self) -> Iterator[tuple[str, Row]]:
        return ((f"row {i}", row) for i, row in enumerate(self.given))


def pairs(first: int, last: int) -> list[Item]:
    rows = list(synthetic_rows(last, seed=3))[first:]
    return [ask(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


@pytest.fixture
def two(tiny7_dir: Path) -> ReferenceSet:
    entries = [{"slug": s, "path": str(tiny7_dir / f"tiny-{s}")} for s in ("neox", "mistral")]
    return ReferenceSet(entries=entries, dtype="float32")


def scores(refs: ReferenceSet, items: list[Item]) -> Scores:
    return refs.scores(items, reply_ids(items), CPU).scores


def no_model(*_: Any) -> None:
    raise AssertionError("a model was loaded")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of replies in each call of the scorer."""
    calls: list[int] = []
    real = ReplyScorer.score

    def counting(self: ReplyScorer, rows: Any, *rest: Any) -> Scores:
        calls.append(sum(map(len, rows)))
        return real(self, rows, *rest)

    monkeypatch.setattr(ReplyScorer, "score", counting)
    return calls


class TestReferences:
    def test_each_reply_is_scored_once(
        self, two: ReferenceSet, scored: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = scores(two, pairs(0, 6))
        assert scored == [12, 12]
        overlapping = scores(two, pairs(4, 9))
        assert scored == [12, 12, 6, 6]
        assert torch.equal(overlapping.sums[:2], first.sums[4:])
        monkeypatch.setattr(Reference, "load", no_model)
        again = scores(two, pairs(0, 9)[::-1])
        assert torch.equal(again.sums[-6:], first.sums.flip(0))
        assert torch.equal(again.counts[:5], overlapping.counts.flip(0))
        assert (again.sums < 0).all()
        with pytest.raises(AssertionError, match="a model was loaded"):
            scores(two, pairs(0, 10))

    def test_what_decides_which_pairs_does_not_decide_their_numbers(
        self, two: ReferenceSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = list(synthetic_rows(12, seed=3))
        tokenizers = [reference.tokenization for reference in two.all]
        kinds: list[dict[str, Any]] = [
            {"val": 0.2, "test": 0.2, "max_tokens": 200},
            {"val": 3, "test": 2, "max_tokens": 150, "pool": 9, "pool_seed": 1},
        ]
        for seed, sizes in enumerate(kinds):
            dataset: Any = Given(train=None, **sizes)
            dataset.given = rows
            data = dataset.prepare(dataset.read(), tokenizers, np.random.default_rng(seed))
            two.scores(data.items, data.ids, CPU)
            monkeypatch.setattr(Reference, "load", no_model)  # from now on
            two.use, two.token_budget, two.gate = ["mistral"], 17, "warn"
            vars(two).pop("members")

    def test_sound_scores_of_format_1_are_taken_over(
        self, two: ReferenceSet, scored: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Not those with a system message, with other numbers of tokens, or of a checkpoint that is
        quantized by itself."""
        items = pairs(0, 4)
        system = {"role": "system", "content": "Be brief."}
        items[1] = Item((system, *items[1].prompt), items[1].replies)
        ids = reply_ids(items)
        for reference in two.members:
            counts = reference.tokenization.lengths(items, ids).reply.astype(np.int64)
            counts[2, 1] += 1
            key = {**reference.fingerprint(), "text": reference.tokenization.fingerprint}
            former = Table.open("scores", "x", {**key, "format": 1}, {"sums": "f8", "counts": "i8"})
            former.append(ids, {"sums": np.full(ids.shape, -7.25), "counts": counts})
        with caplog.at_level(logging.INFO, logger="mrpo_lab"):
            found = scores(two, items)
        assert scored == [4, 4]  # two items of each
        assert (found.sums[[0, 3]] == -7.25).all()
        assert not (found.sums[[1, 2]] == -7.25).any()
        lines = [line for line in caplog.messages if "computed again" in line]
        assert len(lines) == 2
        assert "scores of 2 items are computed again" in lines[0]

    def test_an_interrupted_filling_goes_on(
        self, two: ReferenceSet, scored: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(references, "SHARD_ROWS", 2)
        real = Table.append

        def interrupted(self: Table, *arguments: Any) -> None:
            if len(scored) == 3:
                raise KeyboardInterrupt
            real(self, *arguments)

        monkeypatch.setattr(Table, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scores(two, pairs(0, 6))
        monkeypatch.setattr(Table, "append", real)
        scored.clear()
        assert scores(two, pairs(0, 6)).sums.shape == (6, 2, 2)
        assert scored == [4, 4, 4, 4]  # the last two pairs of one, all six of the other


class TestKey:
    @pytest.fixture
    def folder(self, tiny7_dir: Path, tmp_path: Path) -> Path:
        return shutil.copytree(tiny7_dir / "tiny-neox", tmp_path / "model")

    def key(self, folder: Path, **options: Any) -> Path:
        return Reference(slug="one", path=str(folder), **options).table().folder

    def test_changes_with_all_that_changes_the_numbers(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lora = {"r": 2, "target_modules": ["query_key_value"]}
        for seed in (0, 1):
            policy = PolicyConfig(path=str(folder), dtype="float32", lora=lora).build(CPU, seed)
            policy.save(tmp_path / f"adapter{seed}")
        keys = [
            self.key(folder),
            self.key(folder, dtype="float32"),
            self.key(folder, quantization="int8"),
            self.key(folder, quantization="nf4"),
            self.key(folder, template="plain"),
            self.key(folder, template="chatml"),
            self.key(folder, adapter=str(tmp_path / "adapter0")),
            self.key(folder, adapter=str(tmp_path / "adapter1")),
        ]
        for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
            content = bytearray((folder / name).read_bytes())
            content[-1] ^= 1
            (folder / name).write_bytes(content)
            keys.append(self.key(folder))
        monkeypatch.setattr(stored_scores, "FORMAT", stored_scores.FORMAT + 1)
        keys.append(self.key(folder))
        assert len(set(keys)) == len(keys) == 13

    def test_names_kernels_only_where_they_are_off(self, folder: Path) -> None:
        """So that scores from before the setting are found."""
        assert self.key(folder, kernels="auto") == self.key(folder)
        assert "kernels" not in json.loads((self.key(folder) / "key.json").read_text())
        assert self.key(folder, kernels="off") != self.key(folder)

    def test_changes_with_nothing_else(self, folder: Path, tmp_path: Path) -> None:
        before = self.key(folder)
        moved = folder.rename(tmp_path / "moved")
        (moved / "README.md").write_text("new")
        os.utime(moved / "model.safetensors", (1, 1))
        other = Reference(slug="other", path=str(moved), revision="main").table()
        assert other.folder == before

    def test_says_what_it_is(self, folder: Path) -> None:
        found = json.loads((self.key(folder, template="plain") / "key.json").read_text())
        assert found["first_opened_as"] == "one"
        assert (found["dtype"], found["quantization"]) == ("bfloat16", None)
        assert found["columns"] == COLUMNS
        assert len(found["weights"]) == len(found["text"]) == 64
