"""The torture run notices what does not hold; ``make torture`` and CI run the trials themselves."""

import json
from pathlib import Path

import pytest
from torture.driver import KINDS, Session, Tally, share, table
from torture.place import refused, same_runs, succeeded
from torture.process import BrokenError, Finished, short

from mrpo_lab.training.state_file import save_state


def finished(code: int, err: str, out: str = "") -> Finished:
    return Finished(["train.py"], code, out, err, 0.0)


BAD = {
    "success": finished(0, ""),
    "crash": finished(1, "Traceback (most recent call last):\nKeyError: 1\n"),
    "signal": finished(-9, ""),
    "no line": finished(2, ""),
    "two lines": finished(2, "error: a\nerror: b\n"),
    "a warning too": finished(2, "UserWarning: a\nerror: b\n"),
    "another line": finished(2, "usage: a\n"),
    "an escape": finished(2, "error: \x1b[31m\n"),
}


@pytest.mark.parametrize("done", BAD.values(), ids=BAD.keys())
def test_only_one_line_and_exit_code_2_count_as_refused(done: Finished) -> None:
    with pytest.raises(BrokenError):
        refused(done)
    assert refused(finished(2, "training:  20%|##   | 1/5\rerror: lr: give a number\n"))


def test_traceback_is_no_success() -> None:
    with pytest.raises(BrokenError):
        succeeded(finished(0, "Traceback (most recent call last):\n"))


def run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "perf/seconds": 1.0}\n')
    (folder / "result.json").write_text(json.dumps({"accuracy": 0.5, "wall_seconds": 1.0}))
    (folder / "alpha.parquet").write_bytes(b"123")
    keys = ("optimizer", "scheduler", "weighting", "lambda", "trainable")
    save_state(folder / "checkpoint" / "state.safetensors", {key: {"a": 1} for key in keys})
    return folder


@pytest.mark.parametrize(
    ("name", "content", "same"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 0.5, "perf/seconds": 2.0}\n', True),
        ("metrics.jsonl", '{"step": 1, "loss": 0.6, "perf/seconds": 1.0}\n', False),
        ("result.json", '{"accuracy": 0.5, "wall_seconds": 3.0}', True),
        ("result.json", '{"accuracy": 0.6, "wall_seconds": 1.0}', False),
        ("alpha.parquet", "124", False),
        ("more.json", "{}", False),
    ],
)
def test_runs_are_the_same_but_for_times(
    tmp_path: Path, name: str, content: str, same: bool
) -> None:
    one, other = run(tmp_path / "one"), run(tmp_path / "other")
    same_runs(one, other)
    (other / name).write_text(content)
    if same:
        same_runs(one, other)
    else:
        with pytest.raises(BrokenError, match=name):
            same_runs(one, other)


def test_trial_that_did_not_hold_is_counted_and_kept(tmp_path: Path) -> None:
    session = Session(tmp_path, tmp_path / "base", seed=3, short=True)
    tally = Tally()
    for number, verdict in enumerate(({}, {"broken": "a\nb"})):
        session.trial("kill", number).mkdir()
        (session.trial("kill", number) / "verdict.json").write_text(json.dumps(verdict))
        session.judge("kill", number, tally)
    session.judge("kill", 2, tally)  # no verdict: it hung
    assert (tally.tried, tally.held) == (3, 1)
    assert tally.failures[0].startswith("--kinds kill --seed 3 --trial 1\n")
    assert not session.trial("kill", 0).exists()
    assert session.trial("kill", 1).exists()
    assert "| 3 | 1 |" in table({"kill": tally})
    assert share(session, list(KINDS), seconds=0, cores=2)["kill"].tried == 0


def test_common_overrides_are_left_out_of_messages() -> None:
    from harness import TINY

    assert short(["train.py", *TINY, "lr=1"]) == "train.py TINY lr=1"
