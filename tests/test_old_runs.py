"""Runs, scores and sweeps on disk outlive the code that wrote them.

``fixtures/old_runs`` was written by a commit whose modules had other places and names;
``fixtures/make_old_runs.sh`` says how. Its models compute in float64: what another processor rounds
otherwise stays far below the tolerance.
"""

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
from harness import metrics, read_json, result, train_py
from safetensors.numpy import load_file

from launchers.__main__ import main as launchers
from mrpo_lab.models.references import ReferenceSet
from mrpo_lab.report.__main__ import main as report

pytest_plugins = ("surroundings",)

FIXTURE = Path(__file__).parent / "fixtures" / "old_runs"
STEP_LEFT_BY_THE_CHECKPOINT = 2
NEW_COUNTS = ("identical_after_template", "test_pairs_in_train")
NEW_COLUMNS = ("prompt",)
"""What runs have written since: counts of ``result.json``, columns of ``test_pairs.parquet``."""
SETTINGS = (
    *("dataset=jsonl", "dataset.path=pairs.jsonl", "dataset.val=6", "dataset.test=6"),
    *("protocol.batch_size=3", "protocol.probe_size=4"),
    *("model=tiny", "model.path=models/small", "model.dtype=float64"),
    *("reference_set=custom", "reference_set.dtype=float64", "reference_set.gate=warn"),
    "reference_set.entries=[{slug:small,path:models/small},{slug:other,path:models/other}]",
    *("train=small", "train.evaluations=2", "train.checkpoint_every=2"),
    *("tracker=local", "optimizer.lr=0.003", "loss.beta=1.0", "threads=1"),
)
LORA = "model.lora={r:2,lora_alpha:4,target_modules:[q_proj,v_proj]}"
FINISHED = (*SETTINGS, "name=finished", "loss=mdpo", "weighting=vaw")
INTERRUPTED = (*SETTINGS, LORA, "name=interrupted", "loss=mrpo", "weighting=tsw")
SWEEP = ("-m", *SETTINGS, LORA, "name=seeds", "loss=dpo", "seed=s0,s1", "hydra/launcher=local")


@pytest.fixture
def study(tmp_path: Path, surroundings: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture as the working directory; reference scores are there, so that no
    reply may be scored again. (The gate measures a few, by today's checks.)"""
    folder = tmp_path / "study"
    shutil.copytree(FIXTURE, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MRPO_LAB_CACHE", "cache")

    real = ReferenceSet._score_missing

    def score(self: ReferenceSet, *given: Any) -> None:
        *_, missing, _, slug = given
        assert not missing, f"{slug} is scored although its scores are stored"
        real(self, *given)

    monkeypatch.setattr(ReferenceSet, "_score_missing", score)
    return folder


def run_in(folder: Path) -> Path:
    (config,) = folder.rglob("config.yaml")
    return config.parent


def result_as_then(folder: Path) -> dict[str, Any]:
    """The result of a run without the counts that are new, which it must have."""
    found = result(folder)
    for name in NEW_COUNTS:
        found["counts"].pop(name)
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    """Of a run's folder, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


def assert_close(one: Any, other: Any, where: str = "") -> None:
    """Equal but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_close(left, right, f"{where}/{number}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9), where
    else:
        assert one == other, where


def test_finished_run_is_found_and_not_trained_again(study: Path) -> None:
    folder = run_in(study / "outputs" / "finished")
    before = contents(folder)
    done = train_py(*FINISHED)
    assert done.code == 0, done.err
    assert str(folder.relative_to(study)) in done.out
    assert contents(folder) == before
    assert len(list((study / "outputs" / "finished").rglob("config.yaml"))) == 1


def test_another_setting_is_still_another_run(study: Path) -> None:
    folder = run_in(study / "outputs" / "finished")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.003", "lr: 0.004"))
    done = train_py(*FINISHED)
    assert done.code == 2
    assert "optimizer.lr: 0.004 there, 0.003 here" in done.error


def test_interrupted_run_goes_on_and_ends_as_its_uninterrupted_twin(study: Path) -> None:
    twin, folder = (run_in(study / f) for f in ("uninterrupted", "outputs/interrupted"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [x for x in lines if json.loads(x)["step"] <= STEP_LEFT_BY_THE_CHECKPOINT]
    assert len(kept) < len(lines), "the step after the checkpoint is run again"
    done = train_py(*INTERRUPTED)
    assert done.code == 0, done.err
    # Times are among the numbers of these lines: they were kept rather than computed again.
    assert (folder / "metrics.jsonl").read_text().splitlines()[: len(kept)] == kept
    assert len(read_json(folder / "provenance.json")["sessions"]) == 2
    assert_close(metrics(folder), metrics(twin))
    assert_close(result_as_then(folder), result(twin))
    for table, new in (("alpha.parquet", ()), ("test_pairs.parquet", NEW_COLUMNS)):
        left, right = (pd.read_parquet(run / table) for run in (folder, twin))
        assert_close(left.drop(columns=list(new)).to_dict("list"), right.to_dict("list"), table)
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, twin)]
    ours, theirs = ({name: w.tolist() for name, w in each.items()} for each in weights)
    assert_close(ours, theirs, "adapter")


def test_run_from_the_beginning_has_the_numbers_it_had_then(study: Path) -> None:
    done = train_py(*INTERRUPTED, "outputs=again")
    assert done.code == 0, done.err
    again, then = (run_in(study / f) for f in ("again", "uninterrupted"))
    assert_close(metrics(again), metrics(then))
    assert_close(result_as_then(again), result(then))


def test_report_reads_them(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["outputs"]) == 0
    said = capsys.readouterr().out
    assert "3 finished" in said
    assert "unreadable" not in said
    runs = pd.read_csv(study / "report" / "tables" / "runs.csv")
    assert len(runs) == 4
    assert report(["compare", "outputs/finished", "outputs/seeds"]) == 0
    assert "1.0000" in capsys.readouterr().out  # the finished run's test accuracy


def launchers_say(*arguments: str) -> str:
    with (
        mock.patch.object(sys, "argv", ["launchers", *arguments]),
        redirect_stdout(io.StringIO()) as out,
    ):
        assert launchers() == 0
    return out.getvalue()


def test_sweep_is_read_and_gathered(study: Path) -> None:
    sweep = study / "outputs" / "sweeps" / "seeds"
    summary = (sweep / "summary.json").read_text()
    assert "seeds: 2 runs: 2 finished" in launchers_say("status")
    launchers_say("gather")
    assert (sweep / "summary.json").read_text() == summary


def test_sweep_asked_for_again_submits_nothing(study: Path) -> None:
    jobs = sorted((study / "outputs" / "sweeps" / "seeds" / "jobs").iterdir())
    done = train_py(*SWEEP)
    assert done.code == 0, done.err
    assert "seeds: 2 runs: 2 finished, 0 submitted" in done.out
    assert sorted((study / "outputs" / "sweeps" / "seeds" / "jobs").iterdir()) == jobs
