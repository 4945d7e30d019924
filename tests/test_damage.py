"""A file that is damaged is named in one line or written again; it never gives another number."""

import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch
from harness import TINY, assert_same, compose, experiment, killed, read_json

import mrpo_lab
from launchers.__main__ import main as launchers_main
from launchers.composing import digest
from launchers.job import unchanged
from launchers.sweep import Plan, Record, Sweep
from launchers.tasks import Train
from mrpo_lab.errors import UserError
from mrpo_lab.experiment import run_experiment
from mrpo_lab.report.__main__ import main as report_main
from mrpo_lab.report.reading import read_run
from mrpo_lab.runs.folder import add_described_file
from mrpo_lab.storage import checksums
from mrpo_lab.training import state as training_state
from mrpo_lab.training.state_file import load_state
from mrpo_lab.training.trainer import Trainer

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

LINES = {
    "result.json": ("result", "outcome"),
    "config.yaml": ("config", "name"),
    "provenance.json": ("sessions",),
    "metrics.jsonl": ("metrics",),
    "alpha.parquet": ("alpha",),
    "test_pairs.parquet": ("test_pairs",),
    "adapter/model.safetensors": ("adapter",),
}
"""Files of a finished run, and the attributes of its view that come from them."""
ATTRIBUTES = tuple(name for names in LINES.values() for name in names)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(len(content)).randrange(1, len(content))])


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(len(content)).randrange(len(content))] ^= 4
    path.write_bytes(content)


def put_a_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def swap(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def delete(path: Path, other: Path) -> None:
    path.unlink()


DAMAGES = (empty, cut, flip, put_a_folder, swap, delete)
Damage = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def trained(tiny7_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of two finished runs of one sweep: ``run``, and ``other`` with another seed."""
    outputs = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        (cache / "models").symlink_to(tiny7_dir.parent)
        patch.setenv("MRPO_LAB_CACHE", str(cache))
        experiment(outputs)
        run_experiment(compose(*TINY, "seed=s1", f"outputs={outputs}"), "other")
    sweep = Sweep(outputs / "sweeps" / "both")
    sweep.folder.mkdir(parents=True)
    runs: dict[str, dict[str, Any]] = {
        name: {"overrides": [], "conf": "conf/x", "scores": []} for name in ("run", "other")
    }
    sweep.write_plan(Plan(runs=runs))
    array = sweep.new_array([Train(str(sweep.folder), n, **run) for n, run in runs.items()], "x")
    for index, name in enumerate(runs):
        record = Record(name, "done", "1", "here", "", 0, 0.0, "", 9.0)
        record.write(array / f"{index}.json")
    shutil.copytree(sweep.folder, outputs / "sweeps" / "second")
    Sweep(outputs / "sweeps" / "second").write_plan(sweep.plan)
    return outputs


@pytest.fixture
def outputs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "outputs"))


def launchers(outputs: Path, *arguments: str) -> tuple[int, str]:
    said = io.StringIO()
    command = ["launchers", f"--outputs={outputs}", *arguments]
    with mock.patch.object(sys, "argv", command), redirect_stdout(said), redirect_stderr(said):
        code = launchers_main()
    assert "Traceback" not in said.getvalue()
    return code, said.getvalue()


def same(one: Any, other: Any) -> bool:
    return bool(one.equals(other)) if isinstance(one, pd.DataFrame) else bool(one == other)


def is_unfinished(name: str, damage: Damage) -> bool:
    """An empty result is what a power loss may leave: the run counts as not finished."""
    return name == "result.json" and damage in (empty, delete)


every_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
every_file = pytest.mark.parametrize("name", LINES)


@every_damage
@every_file
def test_view_of_a_damaged_run(trained: Path, outputs: Path, name: str, damage: Damage) -> None:
    """Each attribute is what it was, or an error that names the file."""
    folder = outputs / "run"
    damage(folder / name, outputs / "other" / name)
    before, view = mrpo_lab.RunView(trained / "run"), mrpo_lab.RunView(folder)
    refused = {}
    for attribute in ATTRIBUTES:
        try:
            found = getattr(view, attribute)
        except UserError as error:
            refused[attribute] = str(error)
            continue
        if attribute == "adapter":
            assert found == folder / "adapter"
        elif not is_unfinished(name, damage):
            assert same(found, getattr(before, attribute)), attribute
    assert all(said.startswith(f"{folder}/") and ": damaged (" in said for said in refused.values())
    if is_unfinished(name, damage):
        assert not refused
        assert view.result is None
    else:
        assert refused.keys() >= set(LINES[name])


@every_damage
@every_file
def test_tables_of_runs_one_of_which_is_damaged(
    trained: Path, outputs: Path, name: str, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are there; this one is not shown as good, unless the file is not read."""
    folder, before = outputs / "run", mrpo_lab.RunView(trained / "run")
    length = (folder / name).stat().st_size
    damage(folder / name, outputs / "other" / name)
    kept = (folder / name).is_file() and (folder / name).stat().st_size == length
    record = read_run(folder)
    assert read_run(outputs / "other").status == "finished"
    if is_unfinished(name, damage):
        assert record.status == "running"
    elif kept and name in ("alpha.parquet", "adapter/model.safetensors"):
        assert record.result == before.result
    else:
        assert record.status == "unreadable"
        assert record.problem.startswith(f"{folder}/")
    table = mrpo_lab.open_study(outputs).table.set_index("folder")
    assert table.loc[(outputs / "other").resolve(), "status"] == "finished"
    row = table.loc[folder.resolve()]
    if row["status"] == "finished":
        assert row["test"] == before.outcome["test/accuracy"]
    elif not is_unfinished(name, damage):
        assert row["status"] == "damaged"
        assert [line for line in caplog.messages if line.startswith(f"{folder.resolve()}/")]


@every_damage
@every_file
def test_sweep_one_of_whose_runs_is_damaged(outputs: Path, name: str, damage: Damage) -> None:
    file = outputs / "run" / name
    length = file.stat().st_size
    damage(file, outputs / "other" / name)
    kept = file.is_file() and file.stat().st_size == length
    code, _ = launchers(outputs, "gather", "both")
    rows: Any = read_json(outputs / "sweeps" / "both" / "summary.json")
    state, other = (row["state"] for row in rows)
    assert (code, other) == (0, "finished")
    if is_unfinished(name, damage):
        assert state == "dead"
    elif kept and name not in ("result.json", "config.yaml"):
        assert state == "finished"  # lengths are what is looked at
    else:
        assert state == "damaged"
        code, said = launchers(outputs, "status", "both")
        assert code == 0
        assert f"1 x {outputs / 'run'}/" in said


def test_report_and_comparison_go_on_with_the_others(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (outputs / "run" / "adapter" / "model.safetensors").unlink()
    assert report_main(["compare", str(outputs)]) == 0
    assert report_main([str(outputs), "--out", str(outputs / "report")]) == 0
    said = capsys.readouterr().out
    assert "1 finished, 1 unreadable (" in said
    assert said.count("adapter/model.safetensors: damaged (it is missing): its train.py") == 2


SWEEP_FILES = ("plan.json", "jobs/*/tasks.json", "jobs/*/0.json")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", SWEEP_FILES)
def test_damaged_file_of_a_sweep(
    outputs: Path, name: str, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = outputs / "sweeps" / "both"
    (file,) = sweep.glob(name)
    other = outputs / "sweeps" / "second" / "plan.json"
    damage(file, file.with_name("1.json") if file.name == "0.json" else other)
    code, said = launchers(outputs, "status")
    assert "second: 2 runs: 2 finished" in said
    if name == "plan.json" and damage is delete:
        assert code == 0  # it is no sweep any more
    elif name == "plan.json":
        assert code == 2
        assert f"error: {file}: damaged (" in said
        with pytest.raises(UserError, match="delete it and give the sweep's command again"):
            _ = Sweep(sweep).plan
    else:
        assert "both: 2 runs: 2 finished" in said
        if file.name == "tasks.json" and damage is not delete:
            assert [m for m in caplog.messages if m.startswith(f"{file}: damaged (")]
    if file.name == "0.json" and damage is not delete:
        code, said = launchers(outputs, "logs", "run")
        assert code == 0
        (outputs / "run" / "result.json").unlink()
        assert f"dead: record {file}: damaged (" in launchers(outputs, "status")[1]


def test_configuration_of_a_job_that_has_changed(tmp_path: Path) -> None:
    (tmp_path / "draft" / "loss").mkdir(parents=True)
    file = tmp_path / "draft" / "loss" / "mdpo.yaml"
    file.write_text("beta: 5.0\n")
    conf = (tmp_path / "draft").rename(tmp_path / digest(tmp_path / "draft"))
    assert unchanged(conf) == conf
    flip(conf / "loss" / "mdpo.yaml", conf)
    with pytest.raises(UserError, match="its files have changed since the sweep was dispatched"):
        unchanged(conf)


# The command that trained the run: it shows the result, mends it, or refuses it in one line.
MENDED = (
    ("result.json", empty),
    ("result.json", cut),
    ("result.json", swap),
    ("config.yaml", delete),
    ("provenance.json", delete),
    ("alpha.parquet", flip),
    ("test_pairs.parquet", cut),
    ("adapter/model.safetensors", flip),
)
REFUSED = (
    ("config.yaml", empty),
    ("config.yaml", put_a_folder),
    ("provenance.json", cut),
    ("metrics.jsonl", flip),
    ("metrics.jsonl", delete),
)


@pytest.mark.parametrize(("name", "damage"), MENDED)
def test_same_command_mends_a_finished_run(
    trained: Path, outputs: Path, name: str, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    damage(outputs / "run" / name, outputs / "other" / name)
    with mock.patch.object(Trainer, "train_step", side_effect=AssertionError):
        experiment(outputs)
    assert_same(trained / "run", outputs / "run")
    mrpo_lab.RunView(outputs / "run").check()
    if damage is not empty:
        assert [m for m in caplog.messages if name in m or "result.json" in name]


@pytest.mark.parametrize(("name", "damage"), REFUSED)
def test_same_command_refuses_what_it_cannot_mend(outputs: Path, name: str, damage: Damage) -> None:
    damage(outputs / "run" / name, outputs / "other" / name)
    before = {p: p.read_bytes() for p in outputs.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="delete") as refused:
        experiment(outputs)
    assert str(refused.value).startswith(f"{outputs / 'run' / name}: damaged (")
    assert {p: p.read_bytes() for p in outputs.rglob("*") if p.is_file()} == before


def test_without_a_checkpoint_nothing_is_trained_again_unasked(outputs: Path) -> None:
    shutil.rmtree(outputs / "run" / "checkpoint")
    experiment(outputs)
    (outputs / "run" / "alpha.parquet").unlink()
    with pytest.raises(UserError, match=r"alpha\.parquet: damaged \(it is missing\): delete "):
        experiment(outputs)


def test_table_that_was_added_later_is_verified_too(outputs: Path) -> None:
    folder, name = outputs / "run", "trade_off_compared.parquet"
    shutil.copyfile(folder / "alpha.parquet", folder / name)
    with pytest.raises(UserError, match="no record of it"):
        _ = mrpo_lab.RunView(folder).trade_off
    add_described_file(folder, name)
    mrpo_lab.RunView(folder).check()
    assert mrpo_lab.RunView(folder).trade_off is not None
    flip(folder / name, folder)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        _ = mrpo_lab.RunView(folder).trade_off


# --- A checkpoint that is not the run's own ---


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss=mrpo", "loss.combine._target_"),
        ("loss.beta=2.0", "loss.beta: 2.0 there, 5.0 here"),
        ("weighting=swcw", "weighting._target_"),
        ("optimizer.lr=0.5", "optimizer.lr: 0.5 there"),
        ("seed=s1", "seed.root: 1 there, 0 here"),
        ("model.path=embedded:tiny7/tiny-llama", "model.path"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path: Path, override: str, said: str) -> None:
    for outputs, overrides in ((tmp_path / "a", ()), (tmp_path / "b", (override,))):
        with killed(Trainer, "train_step", call=4):
            experiment(outputs, *overrides)
    ours, theirs = (tmp_path / x / "run/checkpoint/state.safetensors" for x in "ab")
    theirs.replace(ours)
    with pytest.raises(UserError) as refused:
        experiment(tmp_path / "a")
    assert str(refused.value).startswith(f"{ours}: it is of another run ({said}")
    assert str(refused.value).endswith("delete it to start this run over")


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        state["loop"][key] = value

    return apply


def spoil_weight(state: dict[str, Any]) -> None:
    next(iter(state["trainable"].values()))[0] = torch.nan


def lose_weight(state: dict[str, Any]) -> None:
    state["trainable"].popitem()


def lose_state(state: dict[str, Any]) -> None:
    del state["loop"]


def lose_data(state: dict[str, Any]) -> None:
    del state["data"]


STATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "it is of step 6 of 5": change("step", 6),
    "it is of step -1 of 5": change("step", -1),
    "damaged (": change("step", "2"),
    "a number is out of range": change("seconds", float("nan")),
    "a number is out of range ": change("alpha_sum", [1.0]),
    "a weight is not finite": spoil_weight,
    "it holds other weights": lose_weight,
    "damaged (KeyError('loop')": lose_state,
    "damaged (KeyError('data')": lose_data,
}


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with killed(Trainer, "train_step", call=4):
        experiment(tmp_path)
    path = tmp_path / "run" / "checkpoint" / "state.safetensors"
    for said, spoil in STATES.items():
        state = load_state(path)
        spoil(state)
        found = mock.patch.object(training_state, "load_state", return_value=state)
        with found, pytest.raises(UserError) as refused:
            experiment(tmp_path)
        assert str(refused.value).startswith(f"{path}: {said.strip()}")


def test_metrics_that_are_not_those_of_the_checkpoint(tmp_path: Path) -> None:
    whole = experiment(tmp_path / "whole")
    with killed(Trainer, "train_step", call=4):
        experiment(tmp_path / "cut")
    file = tmp_path / "cut" / "run" / "metrics.jsonl"
    lines = file.read_bytes()
    file.write_bytes(lines[:300] + bytes([lines[300] ^ 1]) + lines[301:])
    with pytest.raises(UserError, match="not that of the checkpoint after step 2") as refused:
        experiment(tmp_path / "cut")
    assert str(refused.value).startswith(f"{file}: damaged")
    file.write_bytes(lines + b"foreign")  # behind what the checkpoint knows
    assert_same(whole, experiment(tmp_path / "cut"))


# --- Files of earlier versions ---


def test_unverified_is_said_once(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = outputs / "run" / "result.json"
    old = {k: v for k, v in read_json(file).items() if k not in ("files", "checksum")}
    file.write_text(json.dumps(old))
    (outputs / "run" / "alpha.parquet").unlink()
    with caplog.at_level("INFO"):
        experiment(outputs)
    assert len([m for m in caplog.messages if "unverified" in m]) == 1


def test_json_counts_only_in_its_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    checksums.write_json(tmp_path / "a" / "x.json", {"k": [1, float("nan"), "é"]}, bound=True)
    assert checksums.read_json(tmp_path / "a" / "x.json", bound=True)["k"][0] == 1
    for copy in ("a/y.json", "b/x.json"):
        shutil.copyfile(tmp_path / "a" / "x.json", tmp_path / copy)
        with pytest.raises(UserError, match="its checksum differs"):
            checksums.read_json(tmp_path / copy, bound=True)
