"""The gate finds a reference that is scored on wrong tokens, and lets a sound one pass."""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.rows import parse_item
from mrpo_lab.data.texts import Item, Replies, TokenRow
from mrpo_lab.embedded.synthetic import synthetic_rows
from mrpo_lab.errors import UserError
from mrpo_lab.models import gate, references
from mrpo_lab.models.gate import OUTLIER, Finding, check_guess, check_outliers
from mrpo_lab.models.references import Reference, ReferenceSet
from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.scoring.padding import Side, collate
from mrpo_lab.scoring.scorer import ReplyScorer
from mrpo_lab.storage.tables import Table

CPU = torch.device("cpu")
SLUGS = ("qwen2", "llama", "mistral", "qwen3", "phi3", "gemma2", "neox")
ROWS = list(synthetic_rows(24, seed=21))
ITEMS = [parse_item(row, "") for row in ROWS[:12]]
UNEVEN = [  # the same replies, to prompts of very different lengths
    Item(
        ({"role": "user", "content": " ".join(row["prompt"] for row in ROWS[i : i + 13])},),
        item.replies,
    )
    if i % 4 == 0
    else item
    for i, item in enumerate(ITEMS)
]
LENGTHS = np.array([[len(reply) for reply in item.replies] for item in ITEMS])
CHARACTERS = int(LENGTHS.sum())


class Padded(ReplyScorer):
    """A scorer that never packs."""

    def __init__(self, model: Any, kernels: str = "auto") -> None:
        super().__init__(model, kernels)
        self.packs = False


class PaddedLeftReadRight(Padded):
    """Erratum 5: rows are padded on the left, and replies read where right padding has them."""

    def padded_logps(self, rows: Sequence[TokenRow], side: Side = "right") -> tuple[Tensor, Tensor]:
        padded, read = collate(rows, CPU, "left"), collate(rows, CPU, "right").is_reply
        logits = self.model(
            input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
        ).logits
        logps = logits.double().log_softmax(-1)[:, :-1]
        found = logps.gather(-1, padded.input_ids[:, 1:, None])[..., 0]
        return (found * read[:, 1:]).sum(-1), read.sum(-1)


class OneTokenLate(Padded):
    """Reads a token in the logits that follow it, alone and in every batch alike."""

    def padded_logps(self, rows: Sequence[TokenRow], side: Side = "right") -> tuple[Tensor, Tensor]:
        sums = []
        for row in rows:
            ids = torch.from_numpy(row.ids[None]).long()
            logps = self.model(input_ids=ids).logits[0].double().log_softmax(-1)
            sums.append(logps.gather(-1, ids[0, :, None])[row.start :].sum())
        return torch.stack(sums), torch.tensor([row.reply_tokens for row in rows])


def reference(tiny7_dir: Path, slug: str, **options: Any) -> Reference:
    return Reference(
        **{"slug": slug, "path": str(tiny7_dir / f"tiny-{slug}"), "dtype": "float32"} | options
    )


def check(reference: Reference, kind: type[ReplyScorer] = ReplyScorer) -> list[Finding]:
    rows = [rows for rows in reference.tokenization.rows(UNEVEN) if rows is not None]
    vocabulary = len(reference.tokenization.format.tokenizer)
    scorer = kind(reference.load(CPU))
    return check_scoring(reference.slug, scorer, rows, vocabulary, reference.dtype)


def check_scoring(
    slug: str, scorer: ReplyScorer, rows: list[Replies], vocabulary: int, dtype: str
) -> list[Finding]:
    pairs = [item[: gate.REPLIES] for item in rows[: gate.SAMPLE]]
    return gate.judge(slug, gate.measure(scorer, pairs, vocabulary), dtype)


class TestScoring:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("slug", SLUGS)
    def test_the_seven_pass(self, tiny7_dir: Path, slug: str, dtype: str) -> None:
        assert check(reference(tiny7_dir, slug, dtype=dtype)) == []

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("slug", ["phi3", "llama"])
    def test_the_failure_it_is_for(self, tiny7_dir: Path, slug: str, dtype: str) -> None:
        one = reference(tiny7_dir, slug, dtype=dtype)
        findings = check(one, PaddedLeftReadRight)
        batch = findings[0]
        assert str(batch).startswith(f"reference {slug}: replies scored alone and in")
        assert f"more than {gate.TOLERANCE[dtype]:g} for {dtype}" in batch.problem
        rows = [row for pair in one.tokenization.rows(UNEVEN[:8]) for row in pair or ()]
        scorer = PaddedLeftReadRight(one.load(CPU))
        with torch.no_grad():
            alone = torch.cat([scorer.padded_logps([row])[0] for row in rows])
            together, counts = scorer.padded_logps(rows)
        apart = float((together - alone).abs().sum() / counts.sum())
        (said,) = re.findall(r"differ by (\S+) nats per token", batch.problem)
        assert float(said) == pytest.approx(apart, rel=0.01)
        assert apart > 1

    def test_wrong_tokens_in_every_batch_are_worse_than_a_guess(self, tiny7_dir: Path) -> None:
        one = reference(tiny7_dir, "llama")
        (finding,) = check(one, OneTokenLate)
        said = re.findall(r"-\d+\.\d+", finding.problem)
        vocabulary = len(one.tokenization.format.tokenizer)
        assert float(said[1]) == pytest.approx(-math.log(vocabulary), abs=0.006)
        assert float(said[0]) < float(said[1])
        assert f"{vocabulary} tokens" in finding.problem
        assert finding.slug == "llama"

    @pytest.mark.parametrize("seed", range(4))
    def test_random_weights_do_not_beat_a_guess(self, tiny7_dir: Path, seed: int) -> None:
        one = reference(tiny7_dir, "qwen2")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(one.path)).eval()
        rows = [rows for rows in one.tokenization.rows(ITEMS) if rows is not None]
        vocabulary = len(one.tokenization.format.tokenizer)
        (finding,) = check_scoring("qwen2", ReplyScorer(model), rows, vocabulary, "float32")
        assert "of a uniform guess" in finding.problem

    def test_numbers_that_are_not_finite_do_not_pass(self, tiny7_dir: Path) -> None:
        one = reference(tiny7_dir, "neox")
        model: Any = one.load(CPU)
        model.get_output_embeddings().weight.data[5] = float("nan")
        rows = [rows for rows in one.tokenization.rows(ITEMS) if rows is not None]
        findings = check_scoring("neox", ReplyScorer(model), rows, 320, "float32")
        together, left, guess = (finding.problem for finding in findings)
        assert "in one batch differ by nan" in together
        assert "padded on the left differ by nan" in left
        assert "log-probability is nan" in guess

    def test_how_good_is_good_enough(self) -> None:
        counts = torch.tensor([[10, 30]])
        guess = -math.log(100)
        for advantage, found in ((-1.0, 1), (0.0, 1), (0.4, 1), (0.6, 0), (3.0, 0)):
            sums = counts * (guess + advantage) + torch.tensor([[5.0, -5.0]])
            assert len(check_guess("x", Scores(sums, counts), 100)) == found


def table(margin: float, nats: float, seed: int) -> Scores:
    """Scores of ITEMS with this mean |margin| and this many nats per character."""
    counts = np.maximum(1, LENGTHS // 4)
    half = margin / 2 * np.random.default_rng(seed).choice([-1, 1], len(ITEMS))
    gap = half[:, None] * [1, -1]
    level = (nats * CHARACTERS + (gap * counts).sum()) / counts.sum()
    return Scores(torch.from_numpy((gap - level) * counts), torch.from_numpy(counts))


class TestOutliers:
    def test_the_seven_pass(self, tiny7_dir: Path) -> None:
        assert check_outliers(self.real(tiny7_dir, SLUGS, ITEMS), CHARACTERS) == []

    def real(
        self, tiny7_dir: Path, slugs: Sequence[str], items: Sequence[Item], wrong: str | None = None
    ) -> dict[str, Scores]:
        tables = {}
        for slug in slugs:
            one = reference(tiny7_dir, slug)
            rows = [rows for rows in one.tokenization.rows(items) if rows is not None]
            kind = PaddedLeftReadRight if slug == wrong else ReplyScorer
            tables[slug] = kind(one.load(CPU)).score(rows, 10**6)
        return tables

    def test_erratum_5_is_seen_in_the_table_too(self, tiny7_dir: Path) -> None:
        slugs = SLUGS[:-1]  # neox was never taught prompts as long as these
        assert check_outliers(self.real(tiny7_dir, slugs, UNEVEN), CHARACTERS) == []
        tables = self.real(tiny7_dir, slugs, UNEVEN, wrong="qwen3")
        findings = check_outliers(tables, CHARACTERS)
        assert {finding.slug for finding in findings} == {"qwen3"}
        nats = {slug: -float(t.sums.sum()) / CHARACTERS for slug, t in tables.items()}
        value = nats.pop("qwen3")
        median = float(np.median(list(nats.values())))
        assert findings[0].problem.startswith(
            f"its nats per character is {value:.3g}, {value / median:.1f} times the median "
            f"{median:.3g} of the other references"
        )

    @given(
        st.sampled_from(SLUGS),
        st.sampled_from(["mean |margin|", "nats per character"]),
        st.floats(0.3, 0.98) | st.floats(1.02, 5.0),
    )
    def test_one_that_is_inflated_is_named(self, slug: str, what: str, factor: float) -> None:
        sizes = {s: {"mean |margin|": 0.2, "nats per character": 0.5} for s in SLUGS}
        sizes[slug][what] *= factor * OUTLIER
        tables = {
            s: table(size["mean |margin|"], size["nats per character"], i)
            for i, (s, size) in enumerate(sizes.items())
        }
        findings = check_outliers(tables, CHARACTERS)
        assert [finding.slug for finding in findings] == [slug] * (factor > 1)
        for finding in findings:
            said = re.findall(r"[\d.]+", finding.problem.removeprefix(f"its {what} is "))
            usual = {"mean |margin|": 0.2, "nats per character": 0.5}[what]
            times = factor * OUTLIER
            assert [float(n) for n in said] == pytest.approx([times * usual, times, usual], 0.02)

    def test_two_are_no_company_to_stand_out_from(self) -> None:
        tables = {"a": table(0.2, 0.5, 0), "b": table(20.0, 0.5, 1)}
        assert check_outliers(tables, CHARACTERS) == []
        (finding,) = check_outliers({**tables, "c": table(0.2, 0.5, 2)}, CHARACTERS)
        assert finding.slug == "b"

    def test_references_that_separate_nothing(self) -> None:
        same = table(0.2, 0.5, 0)
        none = Scores(torch.full_like(same.sums, -100.0), torch.full_like(same.counts, 50))
        (finding,) = check_outliers({"a": none, "b": none, "c": same}, CHARACTERS)
        assert str(finding).startswith("reference c: its mean |margin| is 0.2, inf times")


class TestReferenceSet:
    @pytest.fixture
    def three(
        self, tiny7_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, Any]:
        """Three references, the second scored on wrong tokens, and an empty cache."""
        monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))
        real = ReplyScorer

        def scorer(model: Any, kernels: str) -> ReplyScorer:
            wrong = model.config.model_type == "qwen3"
            return PaddedLeftReadRight(model, kernels) if wrong else real(model, kernels)

        monkeypatch.setattr(references, "ReplyScorer", scorer)
        entries = [
            {"slug": slug, "path": str(tiny7_dir / f"tiny-{slug}")}
            for slug in ("qwen2", "qwen3", "llama")
        ]
        return {"entries": entries, "dtype": "float32"}

    def scores(self, refs: ReferenceSet, items: Sequence[Item] = UNEVEN) -> Scores:
        return refs.scores(items, reply_ids(items), CPU).scores

    def test_stop_names_it_and_keeps_none_of_its_numbers(self, three: dict[str, Any]) -> None:
        refs = ReferenceSet(**three, gate="stop")
        for _ in range(2):  # the second time the first reference comes from the store
            with pytest.raises(UserError, match=r"reference qwen3: .*differ by .*gate=warn"):
                self.scores(refs)
        shards = [len(list(r.table().folder.glob("*.safetensors"))) for r in refs.members]
        assert shards == [1, 0, 0]

    def test_findings_come_with_the_scores(self, three: dict[str, Any]) -> None:
        refs = ReferenceSet(**three, gate="warn")
        first = refs.scores(UNEVEN, reply_ids(UNEVEN), CPU).findings
        assert {finding.slug for finding in first} == {"qwen3"}
        assert "differ by" in first[0].problem
        assert "of the other references" in first[-1].problem
        assert refs.scores(UNEVEN, reply_ids(UNEVEN), CPU).findings == first  # from the store

    def test_warn_says_so_and_goes_on_and_remembers(
        self, three: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="mrpo_lab"):
            scores = self.scores(ReferenceSet(**three, gate="warn"))
        assert scores.sums.shape == (len(ITEMS), 3, 2)
        warned = [record.getMessage() for record in caplog.records]
        assert all(text.startswith("reference qwen3: ") for text in warned)
        assert any("differ by" in text for text in warned)
        assert any("of the other references" in text for text in warned)
        # What the check found stays with the numbers, for whoever finds them in the store.
        with pytest.raises(UserError, match=r"reference qwen3: .*differ by"):
            self.scores(ReferenceSet(**three, gate="stop"))

    def test_a_healthy_set_is_scored_without_a_word(
        self,
        three: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(references, "ReplyScorer", ReplyScorer)
        with caplog.at_level(logging.WARNING, logger="mrpo_lab"):
            scores = self.scores(ReferenceSet(**three))
        assert not caplog.records
        assert isinstance(ReferenceSet(**three).all[0].table(), Table)
        assert scores.accuracy(chosen_first(len(scores))).shape == (3,)
