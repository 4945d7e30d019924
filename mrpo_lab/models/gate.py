"""Checks of a reference before use: is it scored on the right tokens, does it know language?

A reference that is scored at wrong positions gives plausible numbers that decide an experiment
(docs/methods.md, erratum 5). Three checks find that: the scores of a pair depend neither on the
other pairs in its batch nor on the side of the padding; they are better than a uniform guess; and
they are no outlier among the references.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mrpo_lab.data.chat import ChatFormat
from mrpo_lab.data.conformance import check_rows
from mrpo_lab.data.texts import Item, TokenRow
from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.scoring.scorer import ReplyScorer, difference

SAMPLE = 8
"""Number of pairs that are checked."""
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Largest mean difference between two ways of batching, in nats per token, by dtype of the
weights."""
OUTLIER = 5.0
"""Ratio to the median of the other references above which a reference is an outlier. In the
published results Phi-3 had 6 to 13 times the mean weight of the others; the weakest correctly
scored model of tiny7 reaches 4."""
ADVANTAGE = 0.5
"""Nats per token by which any language model is better than a uniform guess."""


@dataclass(frozen=True)
class Finding:
    """A check that a reference failed."""

    slug: str
    problem: str
    """What was measured and what it should be, in one line."""

    def __str__(self) -> str:
        return f"reference {self.slug}: {self.problem}"


def check_scoring(
    slug: str,
    scorer: ReplyScorer,
    rows: Sequence[tuple[TokenRow, ...]],
    vocabulary: int,
    dtype: str,
) -> list[Finding]:
    """Check a reference on the first ``SAMPLE`` pairs of ``rows``.

    Replies are scored one by one, all in one batch as the scorer makes it, and all in one batch
    that is padded on the left. The three must agree, and must be better than a uniform guess.
    """
    pairs = [item[:2] for item in rows[:SAMPLE]]
    flat = [row for pair in pairs for row in pair]
    with torch.no_grad():
        alone = torch.stack([scorer.padded_logps([row])[0][0] for row in flat])
        together, counts = scorer.logps(pairs)
        left, _ = scorer.padded_logps(flat, "left")
    findings = []
    for batching, sums in (("in one batch", together), ("in a batch padded on the left", left)):
        apart = difference(sums, alone, counts)
        if not apart <= TOLERANCE[dtype]:
            findings.append(
                Finding(
                    slug,
                    f"replies scored alone and {batching} differ by {apart:.3g} nats per token, "
                    f"more than {TOLERANCE[dtype]:g} for {dtype}",
                )
            )
    return findings + check_guess(slug, Scores(alone, counts), vocabulary)


def check_guess(slug: str, scores: Scores, vocabulary: int) -> list[Finding]:
    """Check that the mean log-probability per token is better than that of a uniform guess over the
    vocabulary, by ``ADVANTAGE``. A model with random weights is as good as the guess."""
    mean, guess = float(scores.sums.sum() / scores.counts.sum()), -math.log(vocabulary)
    if mean > guess + ADVANTAGE:
        return []
    return [
        Finding(
            slug,
            f"its mean log-probability is {mean:.2f} nats per token, that of a uniform guess over "
            f"its {vocabulary:,} tokens {guess:.2f}: is it scored on the right tokens?",
        )
    ]


def check_outliers(scores: Mapping[str, Scores], characters: int) -> list[Finding]:
    """Check that no reference's mean |margin| or nats per character is more than ``OUTLIER`` times
    the median of the others. Fewer than three references are not compared.

    Args:
        characters: number of characters in all replies. Nats are counted per character since the
            number of tokens depends on the tokenizer.
    """
    if len(scores) < 3:
        return []
    findings = []
    per_character = {s: float(-t.sums.sum()) / characters for s, t in scores.items()}
    margins = {
        slug: float(table.margins(chosen_first(*table.sums.shape)).abs().mean())
        for slug, table in scores.items()
    }
    for what, values in (("nats per character", per_character), ("mean |margin|", margins)):
        for slug, value in values.items():
            median = float(np.median([other for name, other in values.items() if name != slug]))
            if value > OUTLIER * median:
                times = value / median if median else math.inf
                findings.append(
                    Finding(
                        slug,
                        f"its {what} is {value:.3g}, {times:.1f} times the median "
                        f"{median:.3g} of the other references: is it scored on the right tokens?",
                    )
                )
    return findings


def check_tokens(
    slug: str, chat: ChatFormat, items: Sequence[Item], rows: Sequence[tuple[TokenRow, ...]]
) -> list[Finding]:
    """Check the token rows of the first ``SAMPLE`` items; see ``check_rows``."""
    problems = check_rows(chat, items[:SAMPLE], rows[:SAMPLE])
    return [Finding(slug, problem) for problem in problems[:1]]
