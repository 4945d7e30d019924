"""Filters, pool and splits against a naive implementation; unusual replies are counted."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo_lab.data.dataset import Dataset, FileDataset, Prepared, describe, nearest_sum
from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.rows import Row
from mrpo_lab.data.texts import Item
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.embedded.synthetic import synthetic_rows
from mrpo_lab.errors import UserError

Pair = tuple[str, str, str]


class Given(Dataset):
    """A data set of given pairs."""

    given: Sequence[Pair] = ()

    def rows(self) -> Iterator[tuple[str, Row]]:
        for i, (prompt, chosen, rejected) in enumerate(self.given):
            yield f"pair {i}", {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def dataset(pairs: Sequence[Pair], **options: Any) -> Given:
    data = Given(**{"train": None, "val": 1, "test": 1} | options)
    data.given = pairs
    return data


@pytest.fixture(scope="module")
def tokenizers(tiny7_dir: Path) -> list[Tokenization]:
    """Three different tokenizers: nearly byte-level, large pieces, and one that folds and trims."""
    return [Tokenization(s, tiny7_dir / f"tiny-{s}") for s in ("neox", "qwen3", "gemma2")]


@pytest.fixture(autouse=True)
def cache(tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))


def prepare(data: Dataset, tokenizers: Sequence[Tokenization], seed: int = 0) -> Prepared:
    return data.prepare(data.read(), tokenizers, np.random.default_rng(seed))


def some_pairs(number: int) -> list[Pair]:
    """Prompts and replies of many lengths, some the same length as others."""
    rng = np.random.default_rng(7)
    rows = list(synthetic_rows(number, seed=4))
    texts = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]

    def text(words: int) -> str:
        return " ".join(" ".join(rng.choice(texts, 2)).split()[:words])

    sizes = rng.integers(1, 24, (number, 3)).tolist()
    return [
        (f"{i} {text(p)}", f"{text(c)} {i}", f"{text(r)} no") for i, (p, c, r) in enumerate(sizes)
    ]


def lengths(pair: Pair, tokenizers: Sequence[Tokenization]) -> list[tuple[int, int, int]]:
    """Token counts (prompt, chosen, rejected) of one pair under each tokenizer."""
    item = Item(({"role": "user", "content": pair[0]},), pair[1:])
    found = []
    for tokenizer in tokenizers:
        chosen, rejected = tokenizer.rows([item])[0] or ()
        start = chosen.start
        found.append((start, len(chosen.ids) - start, len(rejected.ids) - rejected.start))
    return found


def percentile(values: list[int], share: float) -> float:
    """Percentile by linear interpolation between order statistics, numpy's default."""
    ordered = sorted(values)
    place = share / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def naive_filter(
    pairs: Sequence[Pair], tokenizers: Sequence[Tokenization], share: float, most: int
) -> tuple[list[Pair], list[int]]:
    """Apply the protocol's filters one after the other; also how many pairs each dropped."""
    measured = [(pair, lengths(pair, tokenizers)) for pair in pairs]
    worst = [
        (
            pair,
            max(p for p, _, _ in found),
            max(c for _, c, _ in found),
            max(r for _, _, r in found),
            max(p + max(c, r) for p, c, r in found),
        )
        for pair, found in measured
    ]
    left = [len(worst)]
    floor = percentile([p for _, p, _, _, _ in worst], share)
    worst = [w for w in worst if w[1] > floor]
    left.append(len(worst))
    low_chosen = percentile([c for _, _, c, _, _ in worst], share)
    low_rejected = percentile([r for _, _, _, r, _ in worst], share)
    worst = [w for w in worst if w[2] > low_chosen and w[3] > low_rejected]
    left.append(len(worst))
    worst = [w for w in worst if w[4] <= most]
    left.append(len(worst))
    return [w[0] for w in worst], [a - b for a, b in pairwise(left)]


def pair_of(item: Item) -> Pair:
    chosen, rejected = item.replies
    return item.prompt[-1]["content"], chosen, rejected


def texts(prepared: Prepared) -> list[Pair]:
    return [pair_of(item) for item in prepared.items]


class TestFilters:
    @pytest.mark.parametrize("share", [2.5, 10.0, 33.3])
    @pytest.mark.parametrize("most", [110, 1024])
    def test_as_the_protocol_says(
        self, tokenizers: list[Tokenization], share: float, most: int
    ) -> None:
        pairs = some_pairs(160)
        prepared = prepare(dataset(pairs, max_tokens=most, min_percentile=share), tokenizers)
        expected, dropped = naive_filter(pairs, tokenizers, share, most)
        assert texts(prepared) == expected
        names = ("short_prompt", "short_reply", "too_long")
        assert [prepared.counts[f"dropped_{name}"] for name in names] == dropped
        assert all(dropped[:2])
        assert (dropped[2] > 0) == (most == 110)
        assert prepared.counts["eligible"] == len(expected)
        if most == 110:  # here the other tokenizers matter
            assert naive_filter(pairs, tokenizers[1:2], share, most)[0] != expected

    def test_without_a_percentile_only_length_decides(self, tokenizers: list[Tokenization]) -> None:
        pairs = some_pairs(60)
        limit = sorted(
            max(p + max(c, r) for p, c, r in lengths(pair, tokenizers)) for pair in pairs
        )[40]
        prepared = prepare(dataset(pairs, max_tokens=limit), tokenizers)
        kept = [
            pair
            for pair in pairs
            if max(p + max(c, r) for p, c, r in lengths(pair, tokenizers)) <= limit
        ]
        assert texts(prepared) == kept
        assert len(kept) > 40  # the pair that is exactly as long as allowed among them

    def test_a_pair_that_one_template_refuses_is_dropped_for_all(
        self, tiny7_dir: Path, tokenizers: list[Tokenization]
    ) -> None:
        strict = Tokenization("mistral", tiny7_dir / "tiny-mistral")
        pairs = some_pairs(12)
        items = list(dataset(pairs).read())
        twice = ({"role": "user", "content": "Hello!"}, *items[3].prompt)
        items[3] = Item(twice, items[3].replies)
        rng = np.random.default_rng(0)
        prepared = dataset(pairs).prepare(items, [*tokenizers, strict], rng)
        assert texts(prepared) == pairs[:3] + pairs[4:]
        assert prepared.counts["dropped_unscorable"] == 1
        assert dataset(pairs).prepare(items, tokenizers, rng).counts["dropped_unscorable"] == 0

    def test_a_template_that_refuses_all_pairs_is_named(
        self, tiny7_dir: Path, tmp_path: Path, tokenizers: list[Tokenization]
    ) -> None:
        file = tmp_path / "refuses.jinja"
        file.write_text("{{ raise_exception('no') }}")
        refusing = Tokenization("strict", tiny7_dir / "tiny-neox", str(file))
        with pytest.raises(UserError, match=r"template of strict renders none of 12 pairs"):
            prepare(dataset(some_pairs(12)), [*tokenizers, refusing])

    def test_what_templates_bend_is_counted(self, tokenizers: list[Tokenization]) -> None:
        pairs = some_pairs(12)
        items = list(dataset(pairs).read())
        system = {"role": "system", "content": "Be brief."}
        items[:5] = [Item((system, *item.prompt), item.replies) for item in items[:5]]
        prepared = dataset(pairs).prepare(items, tokenizers, np.random.default_rng(0))
        assert prepared.counts["system_folded"] == 5  # by gemma2
        assert prepared.counts["prefix_broken"] == 0

    def test_identical_after_truncation(self, tokenizers: list[Tokenization]) -> None:
        """Prompts that are too long alone, replies that differ only late, and others."""
        long, late = "bread " * 200, "at the bakery on Mill Street " * 8
        pairs = [
            *some_pairs(20),
            (long, "Sure, at the bakery.", "No."),
            ("Where?", f"{late} now.", f"{late} then."),
            ("Where?", f"{late} now.", f"{late[:12]} never."),
            ("Where?", f"Sure, {late}.", f"No, {late}."),
            (f"{long[:400]}?", f"{late} now.", f"{late[:90]} or not: {late}"),
        ]
        for most in (100, 130, 160, 230):
            prepared = prepare(dataset(pairs, max_tokens=most), tokenizers)
            expected = 0
            for prompt, *replies in pairs:
                item = Item(({"role": "user", "content": prompt},), tuple(replies))
                every = [rows for t in tokenizers for rows in t.rows([item]) if rows is not None]
                if all(max(len(rows[i].ids) for rows in every) > most for i in (0, 1)):
                    cut = [[row.ids[:most].tolist() for row in rows] for rows in every]
                    expected += any(chosen == rejected for chosen, rejected in cut)
            assert prepared.counts["identical_after_truncation"] == expected > 0


ODD: list[Pair] = [
    ("q1", "yes", "yes"),  # identical
    ("q2", "", ""),  # identical and empty
    ("q3", "yes", ""),  # empty, and so a prefix
    ("q4", " \n", "no"),  # blank
    ("q5", "yes", "yes, sir"),  # a prefix
    ("q6", "no, sir", "no"),  # a prefix
    ("q7", "good", "bad"),
    ("q7", "good", "bad"),  # a duplicate
    ("q7", "bad", "good"),  # swapped, so no duplicate
    ("q8", "good", "bad"),  # another prompt
    ("q1", "yes", "yes"),  # identical and a duplicate
]


class TestOddities:
    def test_are_counted(self, tokenizers: list[Tokenization]) -> None:
        counts = prepare(dataset(ODD), tokenizers).counts
        found = {name: counts[name] for name in ("rows", "empty_replies", "identical_replies")}
        assert found == {"rows": 11, "empty_replies": 3, "identical_replies": 3}
        assert (counts["prefix_replies"], counts["duplicates"]) == (3, 2)

    @pytest.mark.parametrize("identical", [True, False])
    @pytest.mark.parametrize("duplicates", [True, False])
    def test_are_dropped_where_asked(
        self, tokenizers: list[Tokenization], identical: bool, duplicates: bool
    ) -> None:
        data = dataset(ODD, drop_identical=identical, drop_duplicates=duplicates)
        prepared = prepare(data, tokenizers)
        kept = [
            pair
            for i, pair in enumerate(ODD)
            if not (identical and pair[1] == pair[2]) and not (duplicates and pair in ODD[:i])
        ]
        assert texts(prepared) == kept
        assert prepared.counts["dropped_identical_or_duplicate"] == len(ODD) - len(kept)
        np.testing.assert_array_equal(prepared.ids, reply_ids(prepared.items))

    def test_test_prompts_that_are_trained_on(self, tokenizers: list[Tokenization]) -> None:
        pairs = [(f"q{i // 3}", f"good {i}", f"bad {i}") for i in range(60)]
        prepared = prepare(dataset(pairs, val=0.1, test=0.3), tokenizers, seed=3)
        trained = {texts(prepared)[i][0] for i in prepared.splits["train"]}
        tested = [texts(prepared)[i][0] for i in prepared.splits["test"]]
        assert prepared.counts["test_prompts_in_train"] == sum(p in trained for p in tested) > 0
        assert prepared.counts["test_pairs_in_train"] == 0

    def test_test_pairs_that_are_trained_on(self, tokenizers: list[Tokenization]) -> None:
        """One prompt, and a third of the pairs is there twice."""
        pairs = [("q", f"good {i % 40}", f"bad {i % 40}") for i in range(60)]
        data = dataset(pairs, val=0.1, test=0.3, drop_duplicates=False)
        prepared = prepare(data, tokenizers, seed=3)
        trained = {texts(prepared)[i] for i in prepared.splits["train"]}
        tested = [texts(prepared)[i] for i in prepared.splits["test"]]
        shared = sum(pair in trained for pair in tested)
        assert prepared.counts["test_pairs_in_train"] == shared > 0
        assert prepared.counts["test_prompts_in_train"] == len(tested) > shared

    @pytest.mark.parametrize("identical", [True, False])
    def test_replies_that_a_template_makes_the_same(
        self, tokenizers: list[Tokenization], identical: bool
    ) -> None:
        """gemma2's template trims; neox and qwen3 keep all white space."""
        pairs = [
            ("q1", "yes", "yes \n"),
            ("q2", "yes", " no"),
            ("q3", "  ", "\n"),
            ("q4", "yes", "yes"),
        ]
        data = dataset([*pairs, *some_pairs(6)], drop_identical=identical)
        prepared = prepare(data, tokenizers)
        assert prepared.counts["identical_after_template"] == 2
        kept = [pairs[1]] if identical else pairs
        assert texts(prepared) == [*kept, *some_pairs(6)]
        assert prepared.counts.get("dropped_identical_after_template", 0) == 2 * identical
        keeping = prepare(data, tokenizers[:2])
        assert keeping.counts["identical_after_template"] == 0

    def test_splitting_by_prompt_leaks_nothing(self, tokenizers: list[Tokenization]) -> None:
        pairs = [(f"q{i % 20}", f"good {i % 30}", f"bad {i % 30}") for i in range(90)]
        prepared = prepare(dataset(pairs, val=0.1, test=0.3, drop_duplicates=False), tokenizers)
        trained, tested = (
            [texts(prepared)[i] for i in prepared.splits[name]] for name in ("train", "test")
        )
        assert prepared.counts["test_pairs_in_train"] == sum(p in trained for p in tested) > 0
        prompts = {pair[0] for pair in trained}
        assert prepared.counts["test_prompts_in_train"] == sum(p[0] in prompts for p in tested)
        apart = prepare(
            dataset(pairs, val=0.1, test=0.3, drop_duplicates=False, split_by="prompt"), tokenizers
        )
        assert apart.counts["test_prompts_in_train"] == apart.counts["test_pairs_in_train"] == 0

    def test_are_described_without_the_zeros(self) -> None:
        counts = {"rows": 3048, "duplicates": 0, "empty_replies": 5}
        assert describe(counts) == "rows 3,048, empty replies 5"


def nearest(sizes: list[int], wanted: int) -> int:
    """The smallest distance to ``wanted`` of any sum of at least one of the sizes."""
    sums = {0}
    for size in sizes:
        sums |= {one + size for one in sums}
    return min(abs(one - wanted) for one in sums - {0})


class TestPoolAndSplits:
    def test_the_pool_is_the_same_for_all_seeds(self, tokenizers: list[Tokenization]) -> None:
        pairs = some_pairs(80)
        drawn = np.random.RandomState(858).choice(80, 50, replace=False)
        sizes = {"pool": 50, "train": 30, "val": 12, "test": 8, "min_percentile": 0.0}
        for seed in range(3):
            prepared = prepare(dataset(pairs, **sizes), tokenizers, seed)
            assert texts(prepared) == [pairs[i] for i in drawn]
            order = np.random.default_rng(seed).permutation(50)
            assert prepared.splits["train"].tolist() == order[:30].tolist()
            assert prepared.splits["val"].tolist() == order[30:42].tolist()
            assert prepared.splits["test"].tolist() == order[42:].tolist()
        other = prepare(dataset(pairs, **sizes, pool_seed=1), tokenizers)
        assert texts(other) == [
            pairs[i] for i in np.random.RandomState(1).choice(80, 50, replace=False)
        ]

    @given(
        st.integers(3, 90),
        st.none() | st.integers(1, 60) | st.floats(0.05, 0.9),
        st.integers(1, 30) | st.floats(0.05, 0.6),
        st.integers(1, 30) | st.floats(0.05, 0.6),
        st.integers(0, 3),
    )
    def test_splits_are_disjoint_and_of_the_size_asked_for(
        self, size: int, train: float | None, val: float, test: float, seed: int
    ) -> None:
        def number(asked: float) -> int:
            return round(asked * size) if asked < 1 else int(asked)

        data = dataset([], train=train, val=val, test=test)
        sizes = [number(val), number(test)]
        sizes.insert(0, size - sum(sizes) if train is None else number(train))
        if min(sizes) < 1 or sum(sizes) > size:
            with pytest.raises(UserError, match=rf"{size} eligible pairs are too few for train="):
                data._split(size, np.random.default_rng(seed))
            return
        splits = data._split(size, np.random.default_rng(seed))
        assert [len(splits[name]) for name in ("train", "val", "test")] == sizes
        together = np.concatenate(list(splits.values()))
        assert len(set(together.tolist())) == len(together)
        assert set(together.tolist()) <= set(range(size))

    def test_fewer_training_pairs_leave_val_and_test_as_they_are(self) -> None:
        few, many = (
            dataset([], train=train, val=5, test=6)._split(40, np.random.default_rng(3))
            for train in (4, 29)
        )
        assert few["val"].tolist() == many["val"].tolist()
        assert few["test"].tolist() == many["test"].tolist()
        assert few["train"].tolist() == many["train"].tolist()[:4]

    @given(
        st.lists(st.integers(1, 6), min_size=3, max_size=40),
        st.none() | st.integers(1, 30),
        st.integers(1, 20),
        st.integers(1, 20),
        st.integers(0, 3),
    )
    def test_split_by_prompt(
        self, groups: list[int], train: int | None, val: int, test: int, seed: int
    ) -> None:
        prompts = np.repeat(np.arange(len(groups)), groups)
        prompts = np.random.default_rng(1).permutation(prompts)
        data = dataset([], train=train, val=val, test=test, split_by="prompt")
        try:
            splits = data._split_prompts(prompts, np.random.default_rng(seed))
        except UserError:
            assert (train or 1) + val + test > len(prompts) - 3 * max(groups)
            return
        again = data._split_prompts(prompts, np.random.default_rng(seed))
        found = {name: set(prompts[indices].tolist()) for name, indices in splits.items()}
        assert not found["train"] & found["test"] | found["train"] & found["val"]
        assert not found["val"] & found["test"]
        for name, indices in splits.items():
            assert indices.tolist() == again[name].tolist()
            assert (
                len(set(indices.tolist()))
                == len(indices)
                == np.isin(prompts, prompts[indices]).sum()
            )
        assert abs(len(splits["test"]) - test) == nearest(groups, test)
        if train is None:
            assert sum(map(len, splits.values())) == len(prompts)
        else:
            more = dataset([], train=None, val=val, test=test, split_by="prompt")
            rest = more._split_prompts(prompts, np.random.default_rng(seed))
            assert rest["test"].tolist() == splits["test"].tolist()
            assert rest["val"].tolist() == splits["val"].tolist()

    def test_sums_of_many(self) -> None:
        sizes = np.random.default_rng(0).integers(1, 5, 30_000).tolist()
        for wanted in (1, 5000, 60_001):
            picked = nearest_sum(sizes, wanted)
            assert len(set(picked)) == len(picked)
            assert sum(sizes[i] for i in picked) == wanted
        assert sorted(nearest_sum([1] * 9000, 6000)) == list(range(6000))

    def test_split_by_prompt_differs_between_seeds_and_has_a_limit(self) -> None:
        prompts = np.arange(60) // 2
        data = dataset([], val=10, test=10, split_by="prompt")
        drawn = [data._split_prompts(prompts, np.random.default_rng(seed)) for seed in range(3)]
        assert len({tuple(splits["test"].tolist()) for splits in drawn}) == 3
        assert all(len(splits["test"]) == 10 for splits in drawn)
        with pytest.raises(UserError, match=r"split_by=prompt leaves nothing for .*only 1 prompts"):
            data._split_prompts(np.zeros(60), np.random.default_rng(0))

    def test_too_few(self, tokenizers: list[Tokenization]) -> None:
        pairs = some_pairs(9)
        with pytest.raises(UserError, match=r"pool is 10, but only 9 pairs .*\(rows 9, eligible 9"):
            prepare(dataset(pairs, pool=10), tokenizers)
        with pytest.raises(UserError, match="9 eligible pairs are too few for train=8"):
            prepare(dataset(pairs, train=8), tokenizers)
        with pytest.raises(UserError, match=r"no pairs left after filtering: rows 9, .*too long 9"):
            prepare(dataset(pairs, max_tokens=2), tokenizers)
        with pytest.raises(UserError, match="no pairs left after filtering: rows 1, identical"):
            prepare(dataset(ODD[:1]), tokenizers)
        with pytest.raises(UserError, match="dataset: no rows"):
            prepare(dataset([]), tokenizers)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"val": 0},
            {"val": -1},
            {"test": 1.5},
            {"train": 0},
            {"pool": 2},
            {"min_percentile": 50.0},
            {"min_percentile": -1.0},
            {"max_tokens": 1},
            {"split_by": "pair"},
        ],
    )
    def test_impossible_values_are_named(self, wrong: dict[str, Any]) -> None:
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"^{name} must be .*{value}"):
            dataset([], **wrong)

    def test_the_fingerprint_is_of_texts_and_splits(self, tokenizers: list[Tokenization]) -> None:
        pairs = some_pairs(20)
        same = [prepare(dataset(pairs, max_tokens=m), tokenizers) for m in (900, 1000)]
        others = [
            prepare(dataset(pairs), tokenizers, seed=1),
            prepare(dataset(pairs, val=2), tokenizers),
            prepare(dataset([*pairs[:-1], (*pairs[-1][:2], "other")]), tokenizers),
        ]
        assert same[0].fingerprint() == same[1].fingerprint()
        assert len({p.fingerprint() for p in [same[0], *others]}) == 4


DEFAULT = Path(__file__).parents[2] / "shared"
SHARED = Path(os.environ.get("MRPO_LAB_SHARED", DEFAULT)) / "data"
STATED = {  # counts that the data's documentation gives
    "hh_rlhf_short": {"rows": 3048, "identical_replies": 6, "empty_replies": 5},
    "truthfulqa_short": {"rows": 4481, "prefix_replies": 9},
    "ultrafeedback_long": {"rows": 1200, "identical_replies": 5, "empty_replies": 2},
    "qa_feedback_long_prompt": {"rows": 2616, "prefix_replies": 33},
    "chat_messages_long": {"rows": 584, "duplicates": 8},
}


def shared(name: str) -> FileDataset:
    path = SHARED / f"{name}.jsonl.gz"
    if not path.is_file():
        assert os.environ.get("MRPO_LAB_REQUIRE_SHARED") != "1", f"there is no {path}"
        pytest.skip(f"real data are not there: {path}")
    return FileDataset(path=str(path), train=None, val=0.1, test=0.1)


class TestRealData:
    @pytest.mark.parametrize("name", STATED)
    def test_the_oddities_that_are_known_are_found(self, name: str) -> None:
        data = shared(name)
        items = data.read()
        counts = Counter(rows=len(items))
        kept = data._distinct(items, counts)
        assert {key: counts[key] for key in STATED[name]} == STATED[name]
        assert len(kept) == len(kept.ids) == len(items) - counts["dropped_identical_or_duplicate"]
        assert len({row.tobytes() for row in kept.ids}) == len(kept)

    def test_transcripts_and_message_lists(self) -> None:
        talks = [item.prompt for item in shared("hh_rlhf_short").read()]
        roles = ["".join(message["role"][0] for message in talk) for talk in talks]
        assert sum("aa" in each for each in roles) == 6  # the data have such turns
        assert sum(each.endswith("a") for each in roles) == 2
        assert all(each.startswith("u") and "uu" not in each for each in roles)
        assert not any("\n\nHuman:" in message["content"] for talk in talks for message in talk)
        chats = [item.prompt for item in shared("chat_messages_long").read()]
        assert sum(prompt[0]["role"] == "system" for prompt in chats) == 364
        assert sum(sum(m["role"] == "user" for m in prompt) > 1 for prompt in chats) == 106
        long = shared("ultrafeedback_long").read()
        assert sum(max(map(len, item.replies)) > 4000 for item in long) == 33

    def test_real_pairs_through_the_filters(self, tokenizers: list[Tokenization]) -> None:
        items = shared("truthfulqa_short").read()[:400]
        pairs = [pair_of(item) for item in items]
        data = dataset(pairs, max_tokens=120, min_percentile=2.5)
        prepared = data.prepare(items, tokenizers, np.random.default_rng(0))
        assert texts(prepared) == naive_filter(pairs, tokenizers, 2.5, 120)[0]

    @pytest.mark.parametrize("name", ["truthfulqa_aspects", "qa_feedback_ranked"])
    def test_several_rated_replies_are_no_pair(self, name: str) -> None:
        with pytest.raises(
            UserError, match=rf"{name}\.jsonl\.gz line 1: .* dataset=jsonl_lists reads"
        ):
            shared(name).read()
