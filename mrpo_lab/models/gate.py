"""Checks of a reference before use: is it scored on the right tokens, does it know language?

A reference that is scored at wrong positions gives plausible numbers that decide an experiment
(docs/methods.md, erratum 5). These checks find that: the scores of a pair depend neither on the
other pairs in its batch nor on the side of the padding; a model that is loaded again gives the same
scores; they are better than a uniform guess; and they are no outlier among the references.

What is measured is kept per reply, so that data are judged by their own rows and by no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrpo_lab.data.conformance import first_problem
from mrpo_lab.data.texts import Item, Replies
from mrpo_lab.data.tokenization import Tokenization
from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.scoring.agreement import difference
from mrpo_lab.scoring.memory import PassSize, fitting
from mrpo_lab.scoring.scorer import ReplyScorer

SAMPLE = 8
"""Number of items that are checked."""
REPLIES = 2
"""Number of replies of each that are checked, the first ones."""
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


COLUMNS = dict.fromkeys(("alone", "together", "left", "again"), "f8") | {
    "counts": "i8",
    "vocabulary": "i8",
}
"""Columns of the table that keeps what was measured: see ``Measured``."""


class Measured(NamedTuple):
    """Log-probabilities of the same n replies in nats, computed in ways that must agree."""

    alone: Float[np.ndarray, " n"]
    """One row at a time."""
    together: Float[np.ndarray, " n"]
    """All in one batch as the scorer makes it."""
    left: Float[np.ndarray, " n"]
    """All in one batch that is padded on the left."""
    again: Float[np.ndarray, " n"]
    """Scores by a model that was loaded a second time, for the first item; ``alone`` elsewhere."""
    counts: Int[np.ndarray, " n"]
    """Number of tokens of each reply."""
    vocabulary: Int[np.ndarray, " n"]
    """Number of tokens of the tokenizer, repeated."""

    def joined(self, other: Measured) -> Measured:
        """Both, one after the other."""
        return Measured(*map(np.concatenate, zip(self, other, strict=True)))


def measure(
    scorer: ReplyScorer,
    rows: Sequence[Replies],
    vocabulary: int,
    reload: Callable[[], ReplyScorer] | None = None,
) -> Measured:
    """Score the replies of some items in all the ways that must agree.

    Args:
        rows: a few items; with their replies they are one batch.
        vocabulary: number of tokens of the tokenizer.
        reload: loads the model again; None where that costs too much.
    """
    flat = [row for item in rows for row in item]
    one_by_one = [(row,) for row in flat]
    with torch.no_grad(), fitting("a reply with its prompt", "lower dataset.max_tokens"):
        alone = torch.stack([scorer.padded_logps([row])[0][0] for row in flat])
        together, counts = _in_one_pass(scorer.logps, rows, scorer.costs(rows))
        left, _ = _in_one_pass(
            lambda items: scorer.padded_logps([row for (row,) in items], "left"),
            one_by_one,
            [len(row.ids) for row in flat],
        )
        again = alone
        if reload is not None:
            other = reload()
            first = [other.padded_logps([row])[0][0] for row in rows[0]]
            again = torch.cat([torch.stack(first), alone[len(first) :]])
    alone_, together_, left_, again_ = (
        sums.double().cpu().numpy() for sums in (alone, together, left, again)
    )
    tokens = counts.cpu().numpy()
    return Measured(alone_, together_, left_, again_, tokens, np.full_like(tokens, vocabulary))


def _in_one_pass(
    compute: Callable[[Sequence[Replies]], tuple[Tensor, Tensor]],
    items: Sequence[Replies],
    costs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Sums and counts of all replies by one pass, or by a few where it does not fit into memory."""
    replies = torch.arange(sum(map(len, items))).split([len(item) for item in items])
    sums = torch.zeros(sum(map(len, items)), dtype=torch.float64)
    counts = torch.zeros_like(sums, dtype=torch.int64)

    def part(indices: list[int]) -> None:
        chosen = sorted(indices)
        places = torch.cat([replies[i] for i in chosen])
        found = compute([items[i] for i in chosen])
        sums[places], counts[places] = (values.cpu() for values in found)

    PassSize(sum(costs), "dataset.max_tokens").run(costs, part)
    return sums, counts


def judge(slug: str, measured: Measured, dtype: str) -> list[Finding]:
    """The checks that a reference fails by what was ``measured``: the scores must agree, and be
    better than a uniform guess."""
    scores = Scores(torch.from_numpy(measured.alone), torch.from_numpy(measured.counts))
    return [
        *disagreements(slug, measured, dtype),
        *check_guess(slug, scores, int(measured.vocabulary[0])),
    ]


def disagreements(slug: str, measured: Measured, dtype: str) -> list[Finding]:
    """The ways of scoring that do not agree with scoring each reply alone."""
    findings = []
    alone, counts = (torch.from_numpy(values) for values in (measured.alone, measured.counts))
    for batching, sums in (
        ("in one batch", measured.together),
        ("in a batch padded on the left", measured.left),
        ("by the model loaded again", measured.again),
    ):
        if sums is measured.again and np.array_equal(sums, measured.alone, equal_nan=True):
            continue  # most often it was not loaded again
        apart = difference(torch.from_numpy(sums), alone, counts)
        if not apart <= TOLERANCE[dtype]:
            findings.append(
                Finding(
                    slug,
                    f"replies scored alone and {batching} differ by {apart:.3g} nats per token, "
                    f"more than {TOLERANCE[dtype]:g} for {dtype}",
                )
            )
    return findings


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
    slug: str, tokenization: Tokenization, items: Sequence[Item], ids: np.ndarray
) -> list[Finding]:
    """Check the token rows of the first ``SAMPLE`` items; see ``data.conformance.check_rows``."""
    sample = [items[i] for i in range(min(SAMPLE, len(items)))]
    problem = first_problem(tokenization, sample, ids[: len(sample)])
    return [Finding(slug, problem)] if problem else []
