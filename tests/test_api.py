"""The package as a library: ``docs/api.md`` runs as printed, and runs on disk can be opened."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from harness import ROOT, TINY, only_run, train_py
from report_runs import make_run

import mrpo_lab
from mrpo_lab.errors import UserError
from mrpo_lab.runs.naming import RunPath, parse_run_name

pytest_plugins = ("surroundings",)

PAGE = (ROOT / "docs" / "api.md").read_text()
FIXTURE = ROOT / "tests" / "fixtures" / "old_runs"


@pytest.mark.usefixtures("surroundings")
def test_example_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = train_py(*TINY, f"outputs={tmp_path / 'made'}")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "outputs" / "quickstart" / "synthetic" / "tiny" / "mdpo-vaw-tiny7" / "s0"
    folder.parent.mkdir(parents=True)
    only_run(tmp_path / "made").rename(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)  # noqa: S102
    assert names["policy"].sums.grad.abs().sum() > 0  # type: ignore[attr-defined]
    assert names["alpha"].shape == (4, 3)  # type: ignore[attr-defined]
    assert names["scores"].logps().shape == (1, 2)  # type: ignore[attr-defined]
    run = names["run"]
    assert isinstance(run, mrpo_lab.RunView)
    assert run.name == "quickstart/synthetic/tiny/mdpo-vaw-tiny7/s0"
    assert run.result is not None
    assert run.result == json.loads((folder / "result.json").read_text())
    assert run.test_pairs is not None
    assert (run.test_pairs["margin"] > 0).mean() == pytest.approx(run.result["test/accuracy"])
    assert run.alpha is not None
    means = run.alpha.drop(columns="step").mean().to_dict()
    assert means == pytest.approx(
        {slug: r["mean_alpha"] for slug, r in run.result["references"].items()}
    )
    assert run.adapter == Path("outputs") / folder.relative_to(tmp_path / "outputs") / "adapter"
    assert list(run.metrics["step"]) == [0, 1, 2, 3, 4, 5]


def test_table_of_names_is_complete() -> None:
    (table,) = re.findall(r"^\| \| \|\n(.*?)\n\n", PAGE, re.M | re.S)
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(mrpo_lab.__all__)


def test_runs_are_opened_without_torch() -> None:
    run = next((FIXTURE / "outputs" / "finished").rglob("config.yaml")).parent
    script = (
        "import sys, mrpo_lab\n"
        f"assert mrpo_lab.open_run({str(run)!r}).result is not None\n"
        f"assert len(mrpo_lab.open_study({str(FIXTURE / 'outputs')!r}).table) == 4\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


class TestStudy:
    def test_row_per_run_with_choices_and_accuracies(self, tmp_path: Path) -> None:
        done = make_run(tmp_path, weighting="tsw", seed=3)
        make_run(tmp_path, weighting="vaw", seed=4, suffix="b1", loss__beta=1.0)
        make_run(tmp_path, seed=5, status="failed", error="out of memory")
        make_run(tmp_path, seed=6, status="running")
        study = mrpo_lab.open_study(tmp_path)
        table = study.table.set_index("seed").sort_index()
        assert list(table["status"]) == ["finished", "finished", "failed", "unfinished"]
        assert list(table["weighting"]) == ["tsw", "vaw", "vaw", "vaw"]
        assert set(table["loss"]) == {"mdpo"}
        assert set(table["dataset"]) == {"town"}
        assert list(table["loss.beta"]) == ["5.0", "1.0", "5.0", "5.0"]
        result = json.loads((done / "result.json").read_text())
        assert table.loc[3, "test"] == result["test/accuracy"]
        assert np.isnan(table.loc[5, "test"])
        assert [run.result is None for run in study.runs] == [
            status != "finished" for status in study.table["status"]
        ]

    def test_messages(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(UserError, match="nothere: no such folder"):
            mrpo_lab.open_study(tmp_path / "nothere")
        with pytest.raises(UserError, match="no runs; a run is a folder with config"):
            mrpo_lab.open_study(tmp_path)
        with pytest.raises(UserError, match="no run; a run is a folder with config"):
            mrpo_lab.open_run(tmp_path)
        folder = make_run(tmp_path)
        (folder / "result.json").write_text('{"status": "fin')
        make_run(tmp_path, seed=1)
        for said in (r"result.json: damaged", "its config.yaml is not one of this project"):
            caplog.clear()
            assert list(mrpo_lab.open_study(tmp_path).table["status"]) == ["damaged", "finished"]
            (line,) = caplog.messages
            assert line.startswith(str(folder))
            assert said in line
            (folder / "result.json").unlink(missing_ok=True)
            (folder / "config.yaml").write_text("loss: 3\n")


class TestRun:
    def test_run_that_goes_on(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, status="running", steps=7)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "train/lo')  # being written
        run = mrpo_lab.open_run(folder)
        assert (run.result, run.alpha, run.test_pairs, run.adapter) == (None, None, None, None)
        assert run.metrics["step"].max() == 7

    def test_run_of_an_earlier_version(self, tmp_path: Path) -> None:
        shutil.copytree(FIXTURE / "outputs" / "seeds", tmp_path / "seeds")
        study = mrpo_lab.open_study(tmp_path)
        assert list(study.table["seed"]) == [0, 1]
        assert set(study.table["reference"]) == {"small"}
        (first, _) = study.runs
        assert isinstance(first.alpha, pd.DataFrame)
        assert list(first.alpha) == ["step", "small", "other"]


def test_name_of_a_run_is_parsed_where_it_is_composed() -> None:
    parts = RunPath("a/b", "synthetic", "tiny", "mdpo-vaw-tiny7", "s0__loss.beta=1")
    assert parse_run_name("/".join(parts)) == parts
    assert parse_run_name("synthetic/tiny/mdpo-vaw-tiny7/s0") is None
