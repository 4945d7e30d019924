"""A run that was interrupted anywhere ends as if it had not been: bit for bit."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from harness import (
    TINY,
    assert_same,
    compose,
    experiment,
    killed,
    metrics,
    read_json,
    result,
)

from mrpo_lab.errors import UserError
from mrpo_lab.experiment import run_experiment
from mrpo_lab.models.policy import Policy
from mrpo_lab.runs.folder import Run
from mrpo_lab.training import state_file as checkpoint
from mrpo_lab.training.trainer import Trainer

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

# Everything that has a state: two epochs in orders of their own, warm-up and decay, clipping.
STATEFUL = (
    "train.epochs=2",
    "train.schedule=cosine",
    "train.warmup_steps=3",
    "train.max_grad_norm=0.5",
    "train.accuracy_after_step=true",
    "train.samples=1",
    "train.sample_tokens=4",
)
# (where to die, at which call of a session, before or after it has done its work)
FIRST_SESSION = (Trainer, "train_step", 2, "before")  # there is no checkpoint yet
MID_STEP = (Trainer, "train_step", 4, "after")  # the weights have moved, nothing is logged
MID_SAVE = (checkpoint, "save_file", 2, "after")  # the draft is written and not yet in place
SECOND_EPOCH = (Run, "log", 5, "after")  # a step after a checkpoint
HANDING_OVER = (Policy, "save", 1, "before")  # all is trained
LORA = "model.lora={r: 2, lora_dropout: 0.3, target_modules: [q_proj, v_proj]}"
CASES = {
    "swcw": (
        ["weighting=swcw"],
        [FIRST_SESSION, MID_SAVE, MID_STEP, SECOND_EPOCH, HANDING_OVER],
    ),
    "swcw of three batches": (
        ["weighting=swcw", "weighting.window=3"],
        [MID_STEP, SECOND_EPOCH],
    ),
    "swcw_oh": (["weighting=swcw_oh"], [MID_STEP, SECOND_EPOCH]),
    "tsw": (["weighting=tsw"], [MID_STEP, SECOND_EPOCH]),
    "arwc": (["weighting=arwc"], [MID_SAVE, SECOND_EPOCH]),
    "dropout": (["weighting=swcw", LORA], [MID_STEP]),
}


@pytest.mark.parametrize(("overrides", "deaths"), CASES.values(), ids=CASES.keys())
def test_killed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, overrides: list[str], deaths: list[tuple[Any, str, int, str]]
) -> None:
    whole = experiment(tmp_path / "whole", *STATEFUL, *overrides)
    assert len(metrics(whole)) == 11

    def again() -> Path:
        return experiment(tmp_path / "cut", *STATEFUL, *overrides)

    for death in deaths:
        with killed(*death):
            again()
        with (tmp_path / "cut" / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "train/lo')  # death came while a line was written
    assert_same(whole, again())
    sessions = read_json(tmp_path / "cut" / "run" / "provenance.json")["sessions"]
    assert len(sessions) == len(deaths) + 1


def test_interrupted_at_the_terminal(tmp_path: Path) -> None:
    whole = experiment(tmp_path / "whole")
    step = Trainer.train_step

    def interrupted(trainer: Trainer, pairs: Any) -> dict[str, float]:
        if list(pairs) == list(trainer.batch(3)):
            raise KeyboardInterrupt
        return step(trainer, pairs)

    with mock.patch.object(Trainer, "train_step", interrupted), pytest.raises(KeyboardInterrupt):
        experiment(tmp_path / "cut")
    assert result(tmp_path / "cut" / "run")["status"] == "interrupted"
    assert_same(whole, experiment(tmp_path / "cut"))


def test_finished_run_is_returned_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = experiment(tmp_path)
    first = capsys.readouterr().out
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cfg = compose(*TINY, f"outputs={tmp_path}")
    shown = run_experiment(cfg, "run")
    assert shown == json.loads((folder / "result.json").read_text())
    assert capsys.readouterr().out == first
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_configuration_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = experiment(tmp_path)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError) as refused:
        experiment(tmp_path, "loss.beta=2.0", "weighting=swcw", "train.micro_batch_tokens=1")
    message = str(refused.value)
    assert "loss.beta: 5.0 there, 2.0 here" in message
    assert "weighting._target_" in message
    assert "micro_batch_tokens" not in message  # it changes no number
    assert "name=NAME" in message
    assert str(folder) in message
    assert (folder / "config.yaml").read_bytes() == before


def test_what_changes_no_number_may_change_between_two_sessions(tmp_path: Path) -> None:
    whole = experiment(tmp_path / "whole")
    with killed(Trainer, "train_step", call=4):
        experiment(tmp_path / "cut")
    free = ("train.checkpoint_every=1", "train.token_budget=300", "tracker=local")
    assert_same(whole, experiment(tmp_path / "cut", *free))


def test_damaged_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    with killed(Trainer, "train_step", call=4):
        experiment(tmp_path)
    folder = tmp_path / "run"
    path = folder / "checkpoint" / "state.safetensors"
    whole = path.read_bytes()
    for part in (0, 7, 300, len(whole) - 1):
        path.write_bytes(whole[:part])
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        with pytest.raises(UserError, match="delete it to start this run over") as refused:
            experiment(tmp_path)
        assert str(path) in str(refused.value)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    path.unlink()
    assert len(metrics(experiment(tmp_path))) == 6


def test_other_data_under_a_checkpoint_is_refused(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Shop {i}?", "chosen": f"Walk {i} steps.", "rejected": f"No {i}."}
        for i in range(30)
    ]
    data = tmp_path / "pairs.jsonl"
    tiny = [override for override in TINY if not override.startswith("dataset.")]

    def train() -> Path:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = (f"outputs={tmp_path}", "dataset=jsonl", f"dataset.path={data}", "dataset.val=6")
        run_experiment(compose(*tiny, *chosen), "run")
        return tmp_path / "run"

    with killed(Trainer, "train_step", call=4):
        train()
    rows[0]["rejected"] = "Yes."
    with pytest.raises(UserError, match="other data") as refused:
        train()
    assert str(tmp_path / "run" / "checkpoint") in str(refused.value)
    rows[0]["rejected"] = "No 0."
    assert result(train())["status"] == "finished"
