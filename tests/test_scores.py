"""Scores: sums and counts of replies, read per token or per reply."""

import pytest
import torch
from jaxtyping import TypeCheckError

from mrpo_lab.objective.scores import Scores, chosen_first

TWO_BY_TWO = Scores(
    sums=torch.tensor([[[-2.0, -3.0], [-8.0, -4.0]], [[-6.0, -6.0], [-1.0, -9.0]]]),
    counts=torch.tensor([[[1, 3], [4, 1]], [[2, 3], [1, 9]]]),
)
"""Two pairs under two references, of different token counts."""
CHOSEN = chosen_first(2)


def test_margins_are_per_token_unless_asked_for_per_reply() -> None:
    assert TWO_BY_TWO.margins(CHOSEN).tolist() == [[-1.0, 2.0], [-1.0, 0.0]]
    assert TWO_BY_TWO.margins(CHOSEN, length_normalized=False).tolist() == [[1.0, -4.0], [0.0, 8.0]]


def test_accuracy_is_per_token_of_each_model_and_a_tie_is_wrong() -> None:
    assert TWO_BY_TWO.accuracy(CHOSEN).tolist() == [0.0, 0.5]


def test_rows_are_taken_from_sums_and_counts_alike() -> None:
    assert TWO_BY_TWO[1:].margins(CHOSEN[1:]).tolist() == [[-1.0, 0.0]]
    assert TWO_BY_TWO[torch.tensor([1, 0])].margins(CHOSEN).tolist() == [[-1.0, 0.0], [-1.0, 2.0]]


def test_stack_puts_references_on_the_second_axis() -> None:
    tables = [Scores(TWO_BY_TWO.sums[:, k], TWO_BY_TWO.counts[:, k]) for k in range(2)]
    stacked = Scores.stack(tables)
    assert torch.equal(stacked.sums, TWO_BY_TWO.sums)
    assert torch.equal(stacked.counts, TWO_BY_TWO.counts)
    assert len(stacked) == len(tables[0]) == 2


def test_there_is_a_count_for_every_sum() -> None:
    with pytest.raises(TypeCheckError, match="typechecking parameter 'counts'"):
        Scores(TWO_BY_TWO.sums[:1], TWO_BY_TWO.counts)
