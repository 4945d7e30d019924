"""Nothing flows from the test split into training, nor from validation labels where none may.

Runs on the same data but for the labels of one split: their replies change places in a row of the
reference scores and of the policy's tokens, as if chosen and rejected had been exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from harness import experiment, metrics, read_json
from safetensors.torch import load_file

from mrpo_lab.experiment import Experiment
from mrpo_lab.objective.labels import Labels
from mrpo_lab.objective.scores import Scores
from mrpo_lab.training.inputs import Data

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

# weighting: whether alpha may depend on the validation labels, before the first step or after it
WEIGHTINGS = {
    "uniform": "never",
    "single": "never",
    "arwc": "never",
    "swcw": "never",
    "swcw_oh": "never",
    "vdw": "never",  # |d_ik| is the same whichever reply is preferred
    "vaw": "before",
    "rmc": "before",
    "vsw": "before",
    "grid": "before",
    "tsw": "after",
}


@contextmanager
def relabeled(split: str) -> Iterator[None]:
    """Let the other reply of every second pair of a split be the chosen one."""
    real = Experiment.data

    def data(self: Experiment, prepared: Any, refs: Scores, *more: Any) -> Data:
        found = real(self, prepared, refs, *more)
        rows = np.asarray(getattr(found, split))[::2].tolist()
        targets = found.labels.targets.clone()
        targets[rows] = targets[rows].flip(-1)
        labels = Labels(found.labels.aspects, targets, targets)
        return replace(found, labels=labels)

    with mock.patch.object(Experiment, "data", data):
        yield


def trained(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]], list[dict[str, float]]]:
    """Weights; metrics of the steps; and metrics of the evaluations, of val and of test."""
    lines = metrics(folder)
    steps = [
        {k: v for k, v in line.items() if not k.startswith(("val/", "test/"))} for line in lines
    ]
    held_out = [
        {k: v for k, v in line.items() if k.startswith(("val/", "test/"))} for line in lines
    ]
    return load_file(folder / "adapter" / "model.safetensors"), steps, held_out


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(bool((tensor == other[name]).all()) for name, tensor in one.items())


def split_metrics(lines: list[dict[str, float]], split: str) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k.startswith(f"{split}/")} for line in lines]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_labels_reach_what_they_may_reach(tmp_path: Path, weighting: str) -> None:
    how = (f"weighting={weighting}", "loss=mdpo", "optimizer.lr=0.01")
    plain = trained(experiment(tmp_path / "plain", *how))
    with relabeled("test"):
        test = trained(experiment(tmp_path / "test", *how))
    with relabeled("val"):
        val = trained(experiment(tmp_path / "val", *how))

    assert same_weights(plain[0], test[0])
    assert plain[1] == test[1]
    assert split_metrics(plain[2], "val") == split_metrics(test[2], "val")
    assert split_metrics(plain[2], "test") != split_metrics(test[2], "test")

    assert split_metrics(plain[2], "val") != split_metrics(val[2], "val")
    alphas = [
        [{k: v for k, v in line.items() if k.startswith("alpha/")} for line in lines]
        for lines in (plain[1], val[1])
    ]
    when = WEIGHTINGS[weighting]
    if when == "never":
        assert plain[1] == val[1]
        assert same_weights(plain[0], val[0])
        assert split_metrics(plain[2], "test") == split_metrics(val[2], "test")
    elif when == "before":
        assert alphas[0][1] != alphas[1][1]
    else:
        assert alphas[0][1] == alphas[1][1]
        rewards = [
            [line["bandit/probe_before"] for line in lines[1:]] for lines in (plain[1], val[1])
        ]
        assert rewards[0] != rewards[1]


@pytest.mark.parametrize("loss", ["dpo", "mrpo", "geometric"])
@pytest.mark.parametrize("clip", ["none", "ctro"])
def test_no_loss_sees_a_held_out_label(tmp_path: Path, loss: str, clip: str) -> None:
    how = (f"loss={loss}", f"loss/clip={clip}", "weighting=uniform", "optimizer.lr=0.01")
    plain = trained(experiment(tmp_path / "plain", *how))
    for split in ("val", "test"):
        with relabeled(split):
            other = trained(experiment(tmp_path / split, *how))
        assert same_weights(plain[0], other[0])
        assert plain[1] == other[1]


def test_a_training_label_changes_nothing_before_the_first_step(tmp_path: Path) -> None:
    how = ("weighting=vaw", "optimizer.lr=0.01")
    plain = experiment(tmp_path / "plain", *how)
    with relabeled("train"):
        other = experiment(tmp_path / "other", *how)
    before, after = metrics(plain), metrics(other)
    assert before[0] == after[0]  # the evaluation of the base model
    assert {k: v for k, v in before[1].items() if k.startswith("alpha/")} == {
        k: v for k, v in after[1].items() if k.startswith("alpha/")
    }
    assert before[1]["train/loss"] != after[1]["train/loss"]
    assert (
        read_json(plain / "result.json")["references"]
        == read_json(other / "result.json")["references"]
    )
