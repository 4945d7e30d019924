"""Runs from elsewhere: published tables and W&B."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
import wandb_files
from harness import TINY, train_py
from report_runs import make_run

from mrpo_lab.errors import UserError
from mrpo_lab.report.__main__ import main
from mrpo_lab.report.comparisons import alpha_correlations, alphas, comparisons
from mrpo_lab.report.published import read_published
from mrpo_lab.report.reading import read_run
from mrpo_lab.report.study import Study, build_study
from mrpo_lab.report.wandb_runs import read_project, record_of
from mrpo_lab.runs.run_choice import run_choice

pytest_plugins = ("surroundings",)

PUBLISHED = """method,dataset,base,seed,final_test_acc,alpha_yi,alpha_phi,alpha_qwen
dpo,saferlhf,yi,0,0.60,,,
dpo,saferlhf,phi,0,0.62,,,
dpo,saferlhf,qwen,0,0.58,,,
dpo,saferlhf,yi,1,0.61,,,
dpo,saferlhf,phi,1,0.63,,,
dpo,saferlhf,qwen,1,0.57,,,
vaw,saferlhf,mdpo,0,0.64,0.3,0.5,0.2
vaw,saferlhf,mdpo,1,0.66,0.3,0.5,0.2
uniform,saferlhf,mdpo,0,0.62,0.3333,0.3333,0.3333
uniform,saferlhf,mdpo,1,0.63,0.3333,0.3333,0.3333
vaw,saferlhf,mrpo,0,nan,0.3,0.5,0.2
"""


def published(file: Path) -> Study:
    rows = read_published(file)
    return build_study([r for r, _ in rows], {r.source: c for r, c in rows})


class TestPublished:
    def test_same_statistics(self, tmp_path: Path) -> None:
        (tmp_path / "theirs.csv").write_text(PUBLISHED)
        study = published(tmp_path / "theirs.csv")
        assert study.datasets == ["saferlhf (published)"]
        assert study.methods[:3] == ["dpo: yi", "dpo: phi", "dpo: qwen"]
        cells = study.cells().set_index("method")
        assert cells.loc["mdpo · vaw", "test"] == pytest.approx(0.65)
        assert cells.loc["mdpo · vaw", "se"] == pytest.approx(0.01)
        table = comparisons(study)
        against_uniform = table[table["against"] == "uniform weights"].iloc[0]
        assert against_uniform["difference"] == pytest.approx(0.025)
        assert "dpo: phi" in set(table["baseline"])
        tau = alpha_correlations(study, "single").set_index("method").loc["mdpo · vaw"]
        assert tau["tau"] == pytest.approx(1.0)
        assert tau["p_greater"] == pytest.approx(1 / 36)  # 3! matchings in each of two seeds
        assert list(study.runs["status"]).count("failed") == 1

    def test_beside_ones_own(self, tmp_path: Path) -> None:
        make_run(tmp_path / "runs")
        (tmp_path / "theirs.tsv").write_text(PUBLISHED.replace(",", "\t"))
        out = tmp_path / "report"
        arguments = [str(tmp_path / "runs"), "--published", str(tmp_path / "theirs.tsv")]
        assert main([*arguments, "--out", str(out)]) == 0
        table = pd.read_csv(out / "tables" / "accuracy.csv")
        assert set(table["dataset"]) == {"town", "saferlhf (published)"}

    def test_per_cent_and_posteriors(self, tmp_path: Path) -> None:
        rows = "method,dataset,base,seed,final_test_acc,posterior_mean_a,posterior_mean_b\n"
        (tmp_path / "t.csv").write_text(rows + "tsw,uf,mdpo,seed 3,61.5,0.4,0.6\n")
        ((record, choice),) = read_published(tmp_path / "t.csv")
        assert record.result["test/accuracy"] == pytest.approx(0.615)
        assert record.result["references"]["b"] == {"posterior_mean": 0.6}
        assert alphas(record) == {"a": 0.4, "b": 0.6}
        assert (choice.seed, choice.references) == (3, ("a", "b"))

    @pytest.mark.parametrize("posterior_first", [True, False])
    def test_alpha_and_posterior_of_the_same_references(
        self, tmp_path: Path, posterior_first: bool
    ) -> None:
        """Rows of Thompson sampling have posteriors, all others alpha, and one may have both."""
        rows = pd.DataFrame(
            {
                "method": ["vaw", "tsw", "tsw"],
                "dataset": "d",
                "base": ["mdpo", "mdpo", "mrpo"],
                "seed": 0,
                "final_test_acc": 0.6,
                **{f"alpha_{s}": [n, n + 3, np.nan] for n, s in enumerate("abc", start=1)},
                **{f"posterior_{s}": [np.nan, n, n] for n, s in enumerate("abc", start=7)},
                **{f"accuracy_{s}": 0.5 for s in "abc"},
                **{f"reference_accuracy_{s}": np.nan for s in "abc"},
            }
        )
        if posterior_first:
            rows = rows[sorted(rows, key=lambda name: not name.startswith("posterior"))]
        rows.to_csv(tmp_path / "t.csv", index=False)
        records = [record for record, _ in read_published(tmp_path / "t.csv")]
        assert [list(alphas(record).values()) for record in records] == [
            [1, 2, 3],
            [7, 8, 9],
            [7, 8, 9],
        ]
        assert records[1].result["references"]["a"] == {
            "mean_alpha": 4,
            "posterior_mean": 7,
            "test_accuracy": 0.5,
        }

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("method,seed\nvaw,0\n", "no column dataset, final_test_acc; it has method, seed"),
            ("method,dataset,seed,final_test_acc\nvaw,d,none,0.5\n", "seed 'none' is not a number"),
            ("", "t.csv"),
        ],
    )
    def test_what_is_missing_is_said(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_published(tmp_path / "t.csv")


class OfflineRun(SimpleNamespace):
    """``wandb.apis.public.Run`` as far as it is documented, its content what W&B itself wrote: its
    offline file and the files that the tracker gave it."""

    @classmethod
    def of(cls, folder: Path) -> "OfflineRun":
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        state = "finished" if wandb_files.exit_code(path) == 0 else "failed"
        return cls(
            name=wandb_files.run(path).display_name,
            url="https://wandb.example/run",
            state=state,
            config=wandb_files.config(path),
            summary=wandb_files.summary(path),
            heartbeatAt="2026-11-21T08:00:00Z",
            saved=path.parent / "files",
            history=wandb_files.history(path),
        )

    def scan_history(self) -> list[dict[str, Any]]:
        return [{"_step": n, "_timestamp": 1.0, **row} for n, row in enumerate(self.history)]

    def files(self, names: list[str]) -> list[Any]:
        return [
            SimpleNamespace(name=name, download=self.downloader(self.saved / name))
            for name in names
            if (self.saved / name).exists()
        ]

    @staticmethod
    def downloader(source: Path) -> Any:
        def download(root: str, replace: bool) -> Any:
            return open(shutil.copy(source, root))  # as W&B does

        return download


@pytest.mark.usefixtures("surroundings")
class TestWandb:
    def test_record_is_that_of_the_folder(self, tmp_path: Path) -> None:
        wandb.teardown()
        outcome = train_py(*TINY, "tracker=wandb", "weighting=tsw", f"outputs={tmp_path}", "name=a")
        wandb.teardown()
        assert outcome.code == 0, outcome.err
        (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
        ours, theirs = read_run(folder), record_of(OfflineRun.of(folder))
        assert theirs.name == ours.name
        assert theirs.status == "finished"
        assert run_choice(theirs.config, theirs.name) == run_choice(ours.config, ours.name)
        assert theirs.sessions == ours.sessions
        assert {key: theirs.result[key] for key in ours.result} == ours.result
        pd.testing.assert_frame_equal(theirs.metrics[list(ours.metrics)], ours.metrics)
        assert theirs.pairs is not None
        assert ours.pairs is not None
        pd.testing.assert_frame_equal(theirs.pairs, ours.pairs)

    def test_states_and_words_for_what_is_not_finite(self) -> None:
        run = OfflineRun(
            name="n/d/m/c/s0",
            url="u",
            state="crashed",
            config={},
            summary={"_runtime": 3, "step": 4},
            heartbeatAt="2026-11-21T08:00:00Z",
            saved=Path("/nowhere"),
            history=[{"step": 0, "test/accuracy": 0.5}, {"step": 1, "train/loss": "NaN"}],
        )
        record = record_of(run)
        assert (record.status, record.steps, record.pairs) == ("stopped", 1, None)
        assert np.isnan(record.metrics["train/loss"].iloc[1])
        run.state = "running"
        assert record_of(run).status == "running"

    def test_project_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb.teardown()
        with pytest.raises(UserError, match="--from-wandb a/b: no API key"):
            read_project("a/b")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        wandb.teardown()
        with pytest.raises(UserError, match=r"a/b: 127\.0\.0\.1 cannot be reached"):
            read_project("a/b")
        wandb.teardown()
