"""Spooled items equal the items that were written, and a million of them take little memory."""

import gc
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import BYTES, measure
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.lists import ListDataset
from mrpo_lab.data.spool import Items
from mrpo_lab.data.texts import Item
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError

pytest_plugins = ("surroundings",)
TEXTS = st.text(st.characters(codec=None))  # half of a surrogate pair too
ITEMS = st.builds(
    Item,
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXTS}),
        min_size=1,
    ).map(tuple),
    st.lists(TEXTS, min_size=1, max_size=5).map(tuple),
    st.dictionaries(TEXTS, st.tuples(st.floats(allow_nan=False), st.integers())),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pair(number: int, *replies: str) -> Item:
    return Item(({"role": "user", "content": f"q{number}"},), replies or ("yes", "no"))


class TestItems:
    @given(st.lists(ITEMS, max_size=6))
    def test_come_back_as_they_were(self, given: list[Item]) -> None:
        items = Items.from_iterable(iter(given))
        assert list(items) == given
        assert [items[i] for i in range(-len(given), 0)] == given
        np.testing.assert_array_equal(items.ids, reply_ids(given))

    def test_a_missing_rating_stays_missing(self) -> None:
        (item,) = Items.from_iterable([Item(pair(0).prompt, ("a", "b"), {"x": (math.nan, 1.5)})])
        assert math.isnan(item.ratings["x"][0])
        assert item.ratings["x"][1] == 1.5

    def test_aspects_are_kept_in_the_order_of_their_first_appearance(self) -> None:
        prompt = pair(0).prompt
        items = Items.from_iterable(
            Item(prompt, ("a", "b"), dict.fromkeys(aspects, (1.0, 2.0)))
            for aspects in ("", "ba", "cb")
        )
        assert items.aspects == items[:1].aspects == ("b", "a", "c")

    def test_some_of_them(self) -> None:
        given = [pair(i, *"abc"[: 1 + i % 3]) for i in range(9)]
        items = Items.from_iterable(given)
        assert Items.from_iterable(items) is items
        some = items[np.array([7, 2, 2, 5])]
        del items
        assert list(some) == [given[i] for i in (7, 2, 2, 5)]
        assert list(some[1:][::-1]) == [given[i] for i in (5, 2, 2)]
        np.testing.assert_array_equal(some.ids, reply_ids(given)[[7, 2, 2, 5]])
        assert len(set(some.prompts.tolist())) == 3
        with pytest.raises(IndexError):
            some[4]

    def test_more_than_is_written_at_once(self) -> None:
        given = [pair(i, str(i) * 100_000, "no") for i in range(30)]
        assert list(Items.from_iterable(given)) == given

    def test_leave_no_file(self, cache: Path) -> None:
        opened = set(os.listdir("/proc/self/fd"))
        items = Items.from_iterable(pair(i) for i in range(3))
        assert items[2] == pair(2)
        assert not list(cache.iterdir())
        del items
        gc.collect()
        assert set(os.listdir("/proc/self/fd")) <= opened

    def test_a_full_disk_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        full = open("/dev/full", "wb", 0)  # noqa: SIM115  the items close it
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
        with pytest.raises(UserError, match=r"cache .*: No space left on device: set MRPO_LAB_C"):
            Items.from_iterable([pair(0)])


def test_no_list_has_two_replies(tmp_path: Path) -> None:
    file = tmp_path / "lists.jsonl"
    file.write_text('{"prompt": "q", "responses": ["a"], "ratings": {"x": [1]}}\n')
    data = ListDataset(path=str(file), train=None, val=1, test=1)
    anyone = Tokenization("unused", tmp_path)
    with pytest.raises(UserError, match=r"no pairs left .*: rows 1, dropped single reply 1$"):
        data.prepare(data.read(), [anyone], np.random.default_rng(0))


@pytest.mark.usefixtures("surroundings")
def test_a_million_pairs_fit() -> None:
    """Extrapolate the peak memory of the whole process, libraries included, from two sizes.

    ``python -m benchmarks.memory`` measures a million pairs directly.
    """
    few, many = 5_000, 40_000
    small, large = (measure(pairs, "embedded:tiny7/tiny-qwen2") for pairs in (few, many))
    assert large.eligible == many
    each = (large.peak - small.peak) / (many - few)
    assert small.peak + each * (1_000_000 - few) < BYTES
    assert large.peak - large.before < 100e6
