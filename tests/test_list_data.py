"""Lists of rated replies: parsing, what is dropped and counted, and conversion to pairs."""

import json
import math
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrpo_lab.data.dataset import Prepared
from mrpo_lab.data.lists import ListDataset, parse_list
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.errors import UserError

SHARED = Path(os.environ.get("MRPO_LAB_SHARED", Path(__file__).parents[2] / "shared"))
NAN = math.nan
ASK = {"role": "user", "content": "Bread?"}
PLAIN = {
    "prompt": "Bread?",
    "responses": ["Yes.", "No.", "Go left."],
    "ratings": {"kind": [1, 2, None], "honest": [0.5, 0, 1]},
}


def completion(response: str, **ratings: str) -> dict[str, Any]:
    notes = {aspect: {"Rating": rating, "Rationale": "..."} for aspect, rating in ratings.items()}
    return {"model": "m", "principle": "honesty", "response": response, "annotations": notes}


ULTRAFEEDBACK = {  # openbmb/UltraFeedback's columns
    "source": "flan",
    "instruction": "Bread?",
    "models": ["m", "m", "m"],
    "completions": [
        completion("Yes.", kind="1", honest="0.5"),
        completion("No.", kind="2", honest="0"),
        completion("Go left.", kind="N/A", honest="1"),
    ],
    "correct_answers": ["None"],
}


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lists of 2 to 7 replies rated by two aspects, some ratings missing."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(number):
        replies = int(rng.integers(2, 8))
        ratings: dict[str, list[int | None]] = {
            aspect: rng.integers(0, 4, replies).tolist() for aspect in ("kind", "honest")
        }
        if i % 5 == 0:
            ratings["kind"][-1] = None
        if i % 20 == 0:
            ratings["honest"][0] = None
        found.append(
            {
                "prompt": f"Question {i}?",
                "responses": [f"Answer {i} {j} {'x' * j}" for j in range(replies)],
                "ratings": ratings,
            }
        )
    return found


def write(path: Path, lines: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def tokenizers(tiny7_dir: Path) -> list[Tokenization]:
    return [Tokenization(s, tiny7_dir / f"tiny-{s}") for s in ("neox", "qwen3")]


@pytest.fixture(autouse=True)
def cache(tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "lists.jsonl", rows(60))


def dataset(path: str, **options: Any) -> ListDataset:
    return ListDataset(**{"path": path, "train": None, "val": 10, "test": 10} | options)


def prepared(data: ListDataset, tokenizers: list[Tokenization], seed: int = 0) -> Prepared:
    return data.prepare(data.read(), tokenizers, np.random.default_rng(seed))


class TestRows:
    @pytest.mark.parametrize("row", [PLAIN, ULTRAFEEDBACK], ids=["plain", "ultrafeedback"])
    def test_forms(self, row: dict[str, Any]) -> None:
        item = parse_list(row, "here")
        assert item.prompt == (ASK,)
        assert item.replies == ("Yes.", "No.", "Go left.")
        assert list(item.ratings) == ["kind", "honest"]
        assert item.ratings["kind"] == pytest.approx((1, 2, NAN), nan_ok=True)
        assert item.ratings["honest"] == (0.5, 0, 1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"responses": None}, "here: expected prompt, responses"),
            ({"prompt": ""}, None),
            ({"prompt": []}, "here: no prompt"),
            ({"responses": ["Yes.", 2, "No."]}, "here: responses must be texts"),
            ({"ratings": {"kind": [1, 2]}}, "ratings.kind: expected a list of 3 numbers"),
            ({"ratings": {"kind": [1, 2, "good"]}}, "ratings.kind: 'good' is no number"),
            ({"ratings": {"kind": [1, 2, math.inf]}}, "ratings.kind: inf is no number"),
            ({"ratings": {"kind": [1, 2, 10**400]}}, "is no number or too large"),
            ({"completions": "x"}, "completions must be a list of objects"),
        ],
    )
    def test_mistakes_are_named(self, change: dict[str, Any], message: str | None) -> None:
        if message is None:
            assert parse_list(PLAIN | change, "here").prompt[0]["content"] == ""
            return
        with pytest.raises(UserError) as refused:
            parse_list(PLAIN | change, "here")
        assert message in str(refused.value)


def test_local_copy_of_the_hub_s(tmp_path: Path) -> None:
    """A folder in the hub's layout, whose rows are structs in parquet."""
    (tmp_path / "data").mkdir()
    table = pa.Table.from_pylist([ULTRAFEEDBACK, ULTRAFEEDBACK])
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    data = dataset(str(tmp_path), aspects=["honest", "kind"])
    for item in data.read():
        assert item.replies == ("Yes.", "No.", "Go left.")
        assert item.ratings["honest"] == (0.5, 0, 1)


class TestLists:
    def test_labels_and_counts(self, file: str, tokenizers: list[Tokenization]) -> None:
        found = prepared(dataset(file), tokenizers)
        assert found.labels.aspects == ["kind", "honest"]
        assert found.counts["lists_without_kind"] == 12
        assert found.counts["lists_without_honest"] == 3
        assert found.counts["dropped_unrated"] == 3
        assert len(found.items) == 57
        by_prompt = {row["prompt"]: row for row in rows(60)}
        for n, item in enumerate(found.items):
            ratings = by_prompt[item.prompt[0]["content"]]["ratings"]
            for a, aspect in enumerate(("kind", "honest")):
                lacks = None in ratings[aspect]
                assert bool(found.labels.rated[n, a]) is not lacks
                got = found.labels.ratings[n, a, : len(item.replies)].tolist()
                assert got == pytest.approx(
                    [NAN] * len(got) if lacks else ratings[aspect], nan_ok=True
                )

    def test_aspects_are_chosen_and_named(self, file: str, tokenizers: list[Tokenization]) -> None:
        found = prepared(dataset(file, aspects=["honest"]), tokenizers)
        assert found.labels.aspects == ["honest"]
        with pytest.raises(UserError, match="no reply is rated by 'truth', but by"):
            dataset(file, aspects=["truth"]).read()

    def test_items_can_be_prepared_by_a_data_set_that_did_not_read_them(
        self, file: str, tokenizers: list[Tokenization]
    ) -> None:
        items, rng = dataset(file).read(), np.random.default_rng(0)
        for options in ({}, {"pairs": "best_worst", "by": {"honest": 1.0}}):
            found = dataset(file, **options).prepare(items, tokenizers, rng)
            again = prepared(dataset(file, **options), tokenizers)
            assert found.counts == again.counts
            assert found.labels.aspects == again.labels.aspects
        with pytest.raises(UserError, match="no reply is rated by 'truth'"):
            dataset(file, aspects=["truth"]).prepare(items, tokenizers, rng)

    def test_items_are_rated_by_the_chosen_aspects_in_their_order(
        self, file: str, tokenizers: list[Tokenization]
    ) -> None:
        found = prepared(dataset(file, aspects=["honest", "kind"]), tokenizers)
        assert found.labels.aspects == ["honest", "kind"]
        for n, item in enumerate(found.items):
            assert list(item.ratings) == ["honest", "kind"]
            for a, ratings in enumerate(item.ratings.values()):
                assert found.labels.ratings[n, a, : len(ratings)].tolist() == pytest.approx(
                    ratings, nan_ok=True
                )

    def test_repeated_replies_are_kept_once(
        self, tmp_path: Path, tokenizers: list[Tokenization]
    ) -> None:
        twice = [
            {
                "prompt": f"q{i}",
                "responses": ["a", "b", "a", f"c{i}"],
                "ratings": {"kind": [1, 2, 3, 4]},
            }
            for i in range(4)
        ]
        same = {"prompt": "one", "responses": ["a", "a"], "ratings": {"kind": [1, 2]}}
        path = write(tmp_path / "twice.jsonl", [*twice, same])
        found = prepared(dataset(path, val=1, test=1), tokenizers)
        assert found.counts["repeated_replies"] == 5
        assert found.counts["dropped_single_reply"] == 1
        assert all(item.replies[:2] == ("a", "b") for item in found.items)
        assert all(item.ratings["kind"] == (1, 2, 4) for item in found.items)

    def test_replies_that_a_template_makes_the_same_are_kept_once(
        self, tmp_path: Path, tiny7_dir: Path, tokenizers: list[Tokenization]
    ) -> None:
        """gemma2's template trims replies, the others keep their white space."""
        path = tmp_path / "lists.jsonl"
        lists = [
            {
                "prompt": f"q{i}?",
                "responses": ["yes", "no", "yes ", "maybe"] if i % 2 else ["yes", " yes"],
                "ratings": {"kind": [1, 2, 3, 4][: 4 if i % 2 else 2]},
            }
            for i in range(8)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in lists))
        trims = Tokenization("gemma2", tiny7_dir / "tiny-gemma2")
        for identical, kept in (
            (True, ("yes", "no", "maybe")),
            (False, ("yes", "no", "yes ", "maybe")),
        ):
            data = ListDataset(path=str(path), train=None, val=1, test=1, drop_identical=identical)
            found = data.prepare(data.read(), [*tokenizers, trims], np.random.default_rng(0))
            assert found.counts["identical_after_template"] == 8
            assert {item.replies for item in found.items if len(item.replies) > 2} == {kept}
            if identical:
                assert found.counts["repeated_replies_after_template"] == 8
                assert found.counts["dropped_identical_after_template"] == 4
                assert {item.ratings["kind"] for item in found.items} == {(1.0, 2.0, 4.0)}
            else:
                assert len(found.items) == 8

    def test_transcripts_that_repeat_the_prompt(self) -> None:
        replies = [f"\n\nHuman: Bread?\n\nAssistant: {reply}" for reply in PLAIN["responses"]]
        for prompt in ("Bread?", "\n\nHuman: Bread?\n\nAssistant:"):
            item = parse_list(PLAIN | {"prompt": prompt, "responses": replies}, "here")
            assert item == parse_list(PLAIN, "here")

    def test_drawn_replies_depend_on_neither_order_nor_seed(
        self, tmp_path: Path, file: str, tokenizers: list[Tokenization]
    ) -> None:
        def drawn(path: str, **options: Any) -> dict[str, set[tuple[str, float]]]:
            found = prepared(dataset(path, max_replies=3, **options), tokenizers, seed=4)
            return {
                item.prompt[0]["content"]: set(
                    zip(item.replies, item.ratings["honest"], strict=True)
                )
                for item in found.items
            }

        turned = [
            {
                **row,
                "responses": row["responses"][::-1],
                "ratings": {a: values[::-1] for a, values in row["ratings"].items()},
            }
            for row in rows(60)[::-1]
        ]
        first = drawn(file)
        again = drawn(write(tmp_path / "turned.jsonl", turned))
        assert {k: {r for r, _ in v} for k, v in first.items()} == {
            k: {r for r, _ in v} for k, v in again.items()
        }
        assert max(map(len, first.values())) == 3
        assert drawn(file, pool_seed=1) != first

    def test_what_cannot_be_meant_is_refused(self) -> None:
        for options, message in (
            ({"temperature": 0.0}, "temperature must be greater than 0"),
            ({"max_replies": 1}, "max_replies must be null or at least 2"),
            ({"pairs": "all"}, "pairs must be null, best_worst or separable, got 'all'"),
            ({"aspects": ["a", "a"]}, "aspects must be null or different names"),
        ):
            with pytest.raises(ValueError, match=message):
                dataset("x", **options)


class TestAsPairs:
    @pytest.mark.parametrize("how", ["best_worst", "separable"])
    @pytest.mark.parametrize("by", [{"honest": 1.0}, {"kind": 1.0, "honest": 2.0}])
    def test_against_brute_force(
        self, file: str, tokenizers: list[Tokenization], how: str, by: dict[str, float]
    ) -> None:
        lists = prepared(dataset(file, temperature=2.0), tokenizers)
        pairs = prepared(dataset(file, temperature=2.0, pairs=how, by=by), tokenizers)
        assert pairs.labels.aspects == ["preference"]
        for split in ("train", "val", "test"):
            expected = set()
            for n in lists.splits[split]:
                item = lists.items[n]
                scores = self.scores(item.ratings, by, 2.0)
                order = sorted(range(len(scores)), key=lambda i: -scores[i])
                candidates = list(combinations(order, 2)) if how == "separable" else []
                if how == "best_worst":
                    candidates = [(order[0], scores.index(min(scores)))]
                expected |= {
                    (item.prompt[0]["content"], item.replies[i], item.replies[j])
                    for i, j in candidates
                    if scores[i] > scores[j] + 1e-12
                }
            found = [pairs.items[n] for n in pairs.splits[split]]
            assert {(i.prompt[0]["content"], *i.replies) for i in found} == expected
        assert pairs.counts["test_prompts_in_train"] == 0
        assert not any(item.ratings for item in pairs.items)

    def scores(self, ratings: Any, by: dict[str, float], temperature: float) -> list[float]:
        total = np.zeros(len(ratings["honest"]))
        weight = 0.0
        for aspect, share in by.items():
            values = np.array(ratings[aspect])
            if not np.isnan(values).any():
                p = np.exp(values / temperature)
                total += share * p / p.sum()
                weight += share
        found: list[float] = (total / max(weight, 1e-9)).tolist()
        return found


@pytest.mark.parametrize(
    ("name", "lists", "replies", "aspects"),
    [
        ("truthfulqa_aspects", 817, 42, ["truthful", "informative"]),
        ("qa_feedback_ranked", 500, 4, ["human_wins_of_3"]),
    ],
)
def test_real_lists(
    name: str, lists: int, replies: int, aspects: list[str], tokenizers: list[Tokenization]
) -> None:
    path = SHARED / "data" / f"{name}.jsonl.gz"
    if not path.exists() and "MRPO_LAB_REQUIRE_SHARED" not in os.environ:
        pytest.skip(f"no {path}")
    data = dataset(str(path), max_tokens=100_000)
    assert len(data.read()) == lists
    found = prepared(data, tokenizers)
    assert found.labels.aspects == aspects
    assert max(len(item.replies) for item in found.items) <= replies
    assert found.counts["eligible"] > 0.9 * lists
    assert found.labels.mix(found.labels.targets.new_ones(len(aspects))).sum(-1).numpy() == (
        pytest.approx(1)
    )
