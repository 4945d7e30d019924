"""What a report makes of run folders: which are compared, what is missing, what is said."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import report_runs
from harness import ROOT, TINY, train_py
from report_runs import SLUGS, make_run, make_study
from scipy import stats

from mrpo_lab.data.ids import reply_ids
from mrpo_lab.data.rows import parse_item
from mrpo_lab.report import measures, provenance
from mrpo_lab.report.__main__ import main
from mrpo_lab.report.comparisons import alpha_correlations, comparisons, own_accuracies
from mrpo_lab.report.findings import findings
from mrpo_lab.report.methods import Method
from mrpo_lab.report.reading import RunRecord, read_run
from mrpo_lab.report.statistics import crossed_t, resampled_t
from mrpo_lab.report.study import Study, build_study
from mrpo_lab.report.tables import accuracy, all_tables, comparison
from mrpo_lab.runs.reading import find_runs
from mrpo_lab.runs.test_pairs import pair_names

pytest_plugins = ("surroundings",)


def study(*folders: Path) -> Study:
    return build_study([read_run(folder) for folder in find_runs(folders)])


def said(text: Any) -> str:
    return "\n".join(sentence for sentences in text.values() for sentence in sentences)


@pytest.fixture(scope="module")
def rectangle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rectangle")
    make_study(folder)
    return folder


class TestReading:
    @pytest.mark.usefixtures("surroundings")
    def test_real_run_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        outcome = train_py(*TINY, "weighting=tsw", "seed=1", f"outputs={tmp_path}", "name=a/b")
        assert outcome.code == 0, outcome.err
        (folder,) = find_runs([tmp_path])
        record = read_run(folder)
        assert record.status == "finished"
        (row,) = study(tmp_path).runs.itertuples()
        assert (row.dataset, row.method, row.seed) == ("synthetic", "mdpo · tsw", 1)
        assert (row.steps, row.train_pairs, row.test_pairs, row.k) == (5, 24, 8, 3)
        assert record.pairs is not None
        result = record.result
        assert (record.pairs["margin"] > 0).mean() == pytest.approx(result["test/accuracy"])
        before = (record.pairs["margin_before"] > 0).mean()
        assert before == pytest.approx(result["base/test_accuracy"])
        for slug, reference in result["references"].items():
            margins = record.pairs[f"margin/{slug}"]
            assert (margins > 0).mean() == pytest.approx(reference["test_accuracy"])
            # The logistic link's weight, from its formula: sigmoid(-beta (d_policy - d_k)).
            weight = 1 / (1 + np.exp(5.0 * (record.pairs["margin"] - margins)))
            assert record.pairs[f"weight/{slug}"].to_numpy() == pytest.approx(weight, rel=1e-5)
        posterior = record.metrics.filter(regex="bandit/mean").iloc[-1].to_numpy()
        assert list(comparisons_alphas(record).values()) == pytest.approx(posterior)

    @pytest.mark.usefixtures("surroundings")
    def test_run_writes_the_prompt_of_each_test_pair(self, tmp_path: Path) -> None:
        """Three pairs a prompt, split pair by pair."""
        rows = [
            {"prompt": f"q {i // 3}", "chosen": f"good {i}", "rejected": f"bad {i}"}
            for i in range(40)
        ]
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ("dataset=jsonl", f"dataset.path={file}", "dataset.val=8", "dataset.test=20")
        settings = [x for x in TINY if not x.startswith("dataset.")]
        outcome = train_py(*settings, *data, f"outputs={tmp_path}", "name=a")
        assert outcome.code == 0, outcome.err
        (folder,) = find_runs([tmp_path])
        items = [parse_item(row, "") for row in rows]
        names = dict(
            zip(pair_names(reply_ids(items)), (row["prompt"] for row in rows), strict=True)
        )
        pairs = pd.read_parquet(folder / "test_pairs.parquet")
        by_text = pairs.groupby(pairs["pair"].map(names))["prompt"]
        assert (by_text.nunique() == 1).all()
        assert pairs["prompt"].nunique() == len(by_text) < len(pairs)
        counts = json.loads((folder / "result.json").read_text())["counts"]
        assert counts["test_prompts_in_train"] > counts["test_pairs_in_train"] == 0

    def test_states(self, tmp_path: Path) -> None:
        make_run(tmp_path, seed=0)
        make_run(tmp_path, seed=1, status="failed", error="step 3: the loss is not finite\nmore")
        running = make_run(tmp_path, seed=2, status="running", steps=7)
        with (running / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "train/lo')  # being written
        torn = make_run(tmp_path, seed=3)
        (torn / "result.json").write_text('{"status": "fin')
        records = {r.source: r for r in map(read_run, find_runs([tmp_path]))}
        by_seed = sorted(records.values(), key=lambda r: r.source)
        assert [r.status for r in by_seed] == ["finished", "failed", "running", "unreadable"]
        assert by_seed[1].problem == "step 3: the loss is not finite"
        assert by_seed[2].steps == 7
        later = read_run(running, now=time.time() + 7200)
        assert (later.status, later.problem) == ("stopped", "at step 7, last line 2 h 0 min ago")
        table = study(tmp_path)
        assert [len(table.compared), len(table.unreadable)] == [1, 1]
        assert list(table.missing["why"].str.partition(":")[0]) == ["failed", "running"]

    def test_lines_that_are_not_finite_and_accuracy_that_is_none(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=5)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[3]["train/loss"] = lines[4]["train/grad_norm"] = None
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = json.loads((folder / "result.json").read_text())
        table = measures.instability(study(tmp_path))
        assert list(table["events"]) == ["loss or gradient not finite at 2 steps, first 3"]
        (folder / "result.json").write_text(json.dumps(result | {"test/accuracy": None}))
        assert list(study(tmp_path).runs["reason"]) == ["failed: its test accuracy is not a number"]

    def test_other_folders_are_no_runs(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        copy = folder / "wandb" / "offline-run" / "files"
        copy.mkdir(parents=True)
        (copy / "config.yaml").write_text("a: 1")
        (copy / "provenance.json").write_text("{}")
        assert find_runs([tmp_path, folder]) == [folder]
        strange = tmp_path / "strange"
        strange.mkdir()
        (strange / "config.yaml").write_text("loss: 3\n")
        (strange / "result.json").write_text("{}")
        (record,) = study(tmp_path).unreadable
        assert record.problem.startswith("its config.yaml is not one of this project")


def comparisons_alphas(record: RunRecord) -> dict[str, float]:
    from mrpo_lab.report.comparisons import alphas

    return alphas(record)


class TestStudy:
    def test_methods_are_named_and_ordered_as_in_the_paper(self, rectangle: Path) -> None:
        methods = study(rectangle).methods
        assert methods[:7] == [f"dpo: {slug}" for slug in SLUGS]
        assert methods[7:12] == [f"mdpo · {w}" for w in ("uniform", "arwc", "vdw", "vaw", "swcw")]
        assert methods[12:15] == ["mdpo · swcw_oh", "mdpo · tsw", "mrpo · uniform"]

    def test_parameters_are_named_where_they_differ(self, tmp_path: Path) -> None:
        for prior in (10.0, 5.0):
            weighting = {
                "_target_": "mrpo_lab.TSW",
                "prior": prior,
                "probe_size": 20,
            }
            make_run(tmp_path, weighting="tsw", suffix=f"p{prior}", weighting__prior=prior)
            assert weighting["prior"] == prior
        assert study(tmp_path).methods == ["mdpo · tsw prior=5.0", "mdpo · tsw prior=10.0"]

    def test_reference_alone_is_one_method_under_any_loss_or_set(self, tmp_path: Path) -> None:
        make_run(tmp_path, loss="mdpo", weighting="uniform", seed=5)
        make_run(tmp_path, loss="mrpo", weighting="uniform", seed=5)
        make_run(tmp_path, loss="dpo", weighting="single", slug=SLUGS[2])
        make_run(tmp_path, loss="mrpo", weighting="vaw", seed=1, reference_set__use=[SLUGS[2]])
        runs = study(tmp_path).runs
        alone = runs[runs["kind"] == "single"]
        assert set(alone["method"]) == {f"dpo: {SLUGS[2]}"}
        assert list(alone["role"]) == ["compared", "compared"]

    def test_other_settings_are_kept_apart_and_named(self, tmp_path: Path) -> None:
        for seed in range(3):
            make_run(tmp_path, seed=seed)
            make_run(tmp_path, weighting="uniform", seed=seed)
            make_run(tmp_path, seed=seed, suffix="b1", loss__beta=1.0, gain=0.2)
            make_run(tmp_path, seed=seed, suffix="k2", reference_set__use=list(SLUGS[:2]))
        table = study(tmp_path)
        assert len(table.compared) == 6
        other = table.runs[table.runs["role"] == "other setting"]
        assert sorted(set(other["reason"])) == ["loss.beta=1.0", "references=ref-a, ref-b"]
        beta = measures.swept(table, "loss.beta")
        assert sorted(set(beta["x"])) == [1.0, 5.0]
        assert set(beta["method"]) == {"mdpo · vaw"}
        assert sorted(set(measures.swept(table, "references")["x"])) == [2.0, 7.0]
        assert "6 finished runs differ in loss.beta, references" in said(findings(table, {}))

    def test_missing_cells_are_named(self, rectangle: Path, tmp_path: Path) -> None:
        make_study(tmp_path, seeds=1)
        make_run(tmp_path, seed=1)
        make_run(tmp_path, "village")
        missing = study(tmp_path).missing
        town = missing[missing["dataset"] == "town"]
        assert len(town) == 18
        assert set(town["seed"]) == {1}
        assert "mdpo · vaw" not in set(town["method"])
        assert len(missing[missing["dataset"] == "village"]) == 18
        assert study(rectangle).missing.empty

    def test_newer_of_two_equal_runs_counts(self, tmp_path: Path) -> None:
        old, new = make_run(tmp_path / "one", seed=0), make_run(tmp_path / "two", seed=0)
        sessions = json.loads((new / "provenance.json").read_text())["sessions"]
        sessions[0]["started"] = "2026-11-20T10:00:00+0000"
        (new / "provenance.json").write_text(json.dumps({"sessions": sessions}))
        table = study(tmp_path)
        assert list(table.compared["source"]) == [str(new)]
        assert table.runs.loc[str(old), "reason"].startswith("a newer run of the same cell")

    def test_cells_are_means_and_standard_errors(self, rectangle: Path) -> None:
        table = study(rectangle)
        (cell,) = (row for row in table.cells().itertuples() if row.method == "mrpo · swcw")
        values = [
            json.loads(path.read_text())["test/accuracy"]
            for path in rectangle.glob("study/town/tiny/mrpo-swcw-tiny7/*/result.json")
        ]
        assert cell.seeds == 3
        assert cell.test == pytest.approx(np.mean(values))
        assert cell.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))

    def test_best_single_reference_is_chosen_on_validation(self, tmp_path: Path) -> None:
        for seed in range(2):
            lucky = make_run(tmp_path, "town", "dpo", "single", seed, SLUGS[0], gain=0.3)
            make_run(tmp_path, "town", "dpo", "single", seed, SLUGS[1], gain=0.0)
            result = json.loads((lucky / "result.json").read_text())
            (lucky / "result.json").write_text(json.dumps(result | {"val/accuracy": 0.1}))
        assert study(tmp_path).best_single("town") == Method.single(SLUGS[1])
        assert study(tmp_path).best_single("nowhere") is None


class TestComparisons:
    def test_rows_are_what_they_say(self, rectangle: Path) -> None:
        table = study(rectangle)
        rows = comparisons(table, resamples=500)
        assert len(rows) == 12 + 10
        row = rows[(rows["method"] == "mdpo · vaw") & (rows["against"] == "uniform weights")].iloc[
            0
        ]
        means = table.cells().set_index("method")["test"]
        assert row["baseline"] == "mdpo · uniform"
        assert row["difference"] == pytest.approx(means["mdpo · vaw"] - means["mdpo · uniform"])
        assert row["low"] < row["difference"] < row["high"]
        pairs = set()
        for source in table.compared.loc[table.compared["method"] == "mdpo · vaw", "source"]:
            pairs |= set(pd.read_parquet(Path(source) / "test_pairs.parquet")["pair"])
        assert row["pairs"] == len(pairs) < 3 * report_runs.TEST  # the seeds' pairs overlap
        assert row["p_pairs_holm"] >= row["p_pairs"]
        shown = comparison(rows).shown()
        assert shown.loc[0, "difference"] == f"{100 * rows.loc[0, 'difference']:+.1f}"

    def test_clear_difference_is_called_so_and_none_is_not(self, tmp_path: Path) -> None:
        for seed in range(3):
            make_run(tmp_path, "town", "dpo", "single", seed, SLUGS[0])
            make_run(tmp_path, weighting="uniform", seed=seed)
            make_run(tmp_path, weighting="vaw", seed=seed, gain=0.35)
        table = study(tmp_path)
        compared = comparisons(table, resamples=500)
        assert (compared.loc[compared["method"] == "mdpo · vaw", "low"] > 0.1).all()
        tables = all_tables(table, compared, [])
        text = said(findings(table, {t.key: t.frame for t in tables}))
        assert "Against the best single reference (dpo: ref-a), 2 methods" in text
        assert "better: mdpo · vaw." in text
        assert "could have shown differences of" in text

    def test_one_seed_one_method_and_nothing(self, tmp_path: Path) -> None:
        make_run(tmp_path, weighting="uniform")
        assert comparisons(study(tmp_path)).empty
        make_run(tmp_path, weighting="vaw", gain=0.1)
        (row,) = comparisons(study(tmp_path), resamples=300).itertuples()
        assert (row.seeds, math.isnan(row.p_seeds), math.isnan(row.p_pairs)) == (1, True, False)
        assert main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0

    @pytest.mark.parametrize("seeds", [1, 3])
    @pytest.mark.parametrize("new", [True, False])
    def test_pair_that_a_test_set_holds_twice(self, tmp_path: Path, seeds: int, new: bool) -> None:
        """Both copies are in all runs of a seed; old runs do not know prompts."""
        for seed in range(seeds):
            for weighting in ("uniform", "vaw"):
                folder = make_run(tmp_path, weighting=weighting, seed=seed, gain=0.1)
                pairs = pd.read_parquet(folder / "test_pairs.parquet")
                pairs = pd.concat([pairs, pairs.iloc[[0, 0, 5]]], ignore_index=True)
                if new:
                    pairs["prompt"] = pairs["pair"].str[:-1]  # ten pairs of the pool share one
                pairs.to_parquet(folder / "test_pairs.parquet")
        table = study(tmp_path)
        (row,) = comparisons(table, resamples=300).itertuples()
        assert row.pairs == len(
            {
                pair
                for record in table.records.values()
                if record.pairs is not None
                for pair in record.pairs["pair"]
            }
        )
        assert row.prompts < row.pairs if new else row.prompts == row.pairs
        assert 0 < row.p_pairs <= 1
        assert main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0

    def test_prompt_is_one_observation(self, tmp_path: Path) -> None:
        """Four pairs of one prompt that say the same are worth no more than one of them."""
        for seed in range(3):
            for weighting in ("uniform", "vaw"):
                for repeats, name in ((1, "one"), (4, "four")):
                    folder = make_run(tmp_path / name, weighting=weighting, seed=seed, gain=0.1)
                    pairs = pd.read_parquet(folder / "test_pairs.parquet")
                    pairs["prompt"] = pairs["pair"]
                    parts = [pairs.assign(pair=pairs["pair"] + "abcd"[i]) for i in range(repeats)]
                    pd.concat(parts).to_parquet(folder / "test_pairs.parquet")
        (one,), (four,) = (
            comparisons(study(tmp_path / name), resamples=300).itertuples()
            for name in ("one", "four")
        )
        assert four.pairs == 4 * one.pairs
        for column in ("prompts", "low", "high", "p", "p_pairs", "low_pairs", "detectable"):
            assert getattr(four, column) == pytest.approx(getattr(one, column), abs=1e-6), column

    def test_pairs_that_one_method_alone_tests_do_not_enter(self, tmp_path: Path) -> None:
        for seed in range(2):
            make_run(tmp_path, weighting="uniform", seed=seed)
            folder = make_run(tmp_path, weighting="vaw", seed=seed, gain=0.1)
            pairs = pd.read_parquet(folder / "test_pairs.parquet")
            pairs.loc[0, "pair"] = "another"
            pairs.to_parquet(folder / "test_pairs.parquet")
        (row,) = comparisons(study(tmp_path), resamples=300).itertuples()
        paths = tmp_path.glob("study/*/*/mdpo-vaw*/*/test_pairs.parquet")
        named = set().union(*(pd.read_parquet(path)["pair"] for path in paths))
        assert row.pairs == len(named - {"another"})

    def test_interval_and_p_are_of_one_test_and_detectable_is_beyond_it(
        self, rectangle: Path
    ) -> None:
        table = study(rectangle)
        rows = comparisons(table, resamples=500)
        row = rows[(rows["method"] == "mdpo · vaw") & (rows["against"] == "uniform weights")].iloc[
            0
        ]
        compared = table.compared[table.compared["loss"] == "mdpo"].set_index(["weighting", "seed"])
        columns = {}
        for seed in range(3):
            right = []
            for weighting in ("vaw", "uniform"):
                pairs = table.records[compared.loc[(weighting, seed), "source"]].pairs
                assert pairs is not None
                right.append((pairs.set_index("pair")["margin"] > 0).astype(float))
            columns[seed] = right[0] - right[1]
        test = crossed_t(pd.DataFrame(columns).to_numpy())
        assert (row["p"], row["low"], row["high"]) == pytest.approx((test.p, *test.interval()))
        assert row["p"] != row["p_seeds"]
        excluded = (rows["low"] > 0) | (rows["high"] < 0)
        assert list(excluded) == list(rows["p"] < 0.05)
        assert (rows["high"] - rows["low"] > 0.8 * (rows["high_pairs"] - rows["low_pairs"])).any()
        assert (rows["detectable"] > (rows["high_pairs"] - rows["low_pairs"]) / 2).all()
        assert (rows["p_holm"] >= rows["p"]).all()

    def test_seeds_share_only_what_the_pool_makes_them_share(self, tmp_path: Path) -> None:
        """With little training, test / train is far more than test / (pool - test)."""
        for seed in range(3):
            for weighting in ("uniform", "vaw"):
                make_run(tmp_path, weighting=weighting, seed=seed, gain=0.1, dataset__train=20)
        table = study(tmp_path)
        runs = table.compared.set_index(["weighting", "seed"])["test"]
        by_seed = runs["vaw"] - runs["uniform"]
        (row,) = comparisons(table, resamples=300).itertuples()
        for pool in (220, 700):
            for path in tmp_path.rglob("result.json"):
                result = json.loads(path.read_text())
                result["counts"] |= {"eligible": 700} if pool == 700 else {}
                path.write_text(json.dumps(result))
            (row,) = comparisons(study(tmp_path), resamples=300).itertuples()
            assert row.p_seeds == resampled_t(by_seed.tolist(), 100 / (pool - 100)).p

    def test_one_seed_says_nothing_of_another(self, tmp_path: Path) -> None:
        make_run(tmp_path, weighting="uniform")
        make_run(tmp_path, weighting="vaw", gain=0.35)
        table = study(tmp_path)
        compared = comparisons(table, resamples=300)
        (row,) = compared.itertuples()
        assert math.isnan(row.p)
        assert math.isnan(row.low)
        assert row.low_pairs > 0.1
        text = said(findings(table, {"comparisons": compared}))
        assert "another seed cannot be judged" in text
        assert "these trained models alone: better: mdpo · vaw." in text

    @pytest.mark.parametrize(
        ("counts", "expected"),
        [
            ([{}], None),
            ([{"test_prompts_in_train": 0}], "did not count how many are in train themselves"),
            (
                [{"test_prompts_in_train": 1, "test_pairs_in_train": 0}],
                "1.0 % of the test pairs have a prompt that is also in train; 0.0 % are in train",
            ),
            (
                [{"test_prompts_in_train": 2, "test_pairs_in_train": 0}],
                "Warning, leakage: 2.0 % of the test pairs",
            ),
            (
                [
                    {"test_prompts_in_train": 0, "test_pairs_in_train": 0},
                    {"test_prompts_in_train": 5, "test_pairs_in_train": 3},
                ],
                "Warning, leakage: 0.0 to 5.0 % of the test pairs have a prompt that is also in "
                "train; 0.0 to 3.0 % are in train themselves.",
            ),
        ],
    )
    def test_leakage_is_stated(
        self, tmp_path: Path, counts: list[dict[str, int]], expected: str | None
    ) -> None:
        for seed, found in enumerate(counts):
            path = make_run(tmp_path, seed=seed) / "result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"counts": found}))
        text = said(findings(study(tmp_path), {}))
        if expected is None:
            assert "in train" not in text
        else:
            assert expected in text
            assert ("Warning" in text) == expected.startswith("Warning")

    def test_rewards_of_arms_are_counted_over_seeds(self, tmp_path: Path) -> None:
        counts = np.zeros((len(SLUGS), 2))
        for seed in range(3):
            folder = make_run(tmp_path, weighting="tsw", seed=seed, steps=60)
            for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
                if "bandit/arm" in line:
                    reward = line["bandit/probe_after"] > line["bandit/probe_before"]
                    counts[int(line["bandit/arm"]), int(reward)] += 1
        make_run(tmp_path, weighting="vaw")
        (row,) = measures.bandit_rewards(study(tmp_path)).itertuples()
        expected = stats.chi2_contingency(counts, correction=False)
        assert (row.method, row.steps, row.arms) == ("mdpo · tsw", 180, 7)
        assert (row.chi_square, row.degrees, row.p) == pytest.approx(
            (expected.statistic, expected.dof, expected.pvalue)
        )
        assert row.rewarded == pytest.approx(counts[:, 1].sum() / 180)

    def test_runs_without_pairs_are_compared_by_seed(self, tmp_path: Path) -> None:
        for seed in range(3):
            for weighting in ("uniform", "vaw"):
                folder = make_run(tmp_path, weighting=weighting, seed=seed, gain=0.1)
                (folder / "test_pairs.parquet").unlink()
        (row,) = comparisons(study(tmp_path)).itertuples()
        assert math.isnan(row.p_pairs)
        assert not math.isnan(row.p_seeds)
        assert row.p == row.p_seeds
        assert row.low < row.difference < row.high

    def test_alpha_against_accuracy(self, rectangle: Path) -> None:
        """References rise in accuracy by their place, and so does the weight of all but uniform."""
        table = alpha_correlations(study(rectangle), "own").set_index("method")
        assert math.isnan(table.loc["mdpo · uniform", "tau"])
        assert table.loc["mdpo · uniform", "why"] == "all weights or all accuracies are equal"
        row = table.loc["mdpo · vaw"]
        assert row["tau"] > 0.6
        linear = [
            stats.pearsonr(list(x.values()), list(y.values())).statistic
            for x, y in (
                (comparisons_alphas(record), own_accuracies(record))
                for record in study(rectangle).records.values()
                if "/mdpo-vaw-" in record.name
            )
        ]
        assert row["pearson"] == pytest.approx(np.mean(linear))
        assert row["pearson_se"] == pytest.approx(stats.sem(linear))
        assert row["p_greater"] < row["p_two_sided"] < row["p_one_matching"] < 0.05


class TestTables:
    def test_latex_and_csv(self, rectangle: Path) -> None:
        table = accuracy(study(rectangle))
        latex = table.latex()
        assert r"\toprule" in latex
        assert r"mdpo $\cdot$ swcw\_oh" in latex
        assert latex.count(r"\\") == 1 + len(table.frame)
        frame = pd.read_csv(pd.io.common.StringIO(table.csv()))
        assert frame["test"].to_numpy() == pytest.approx(table.frame["test"].to_numpy())

    def test_cost_counts_gpus(self, tmp_path: Path) -> None:
        make_run(tmp_path, seed=0)
        make_run(tmp_path, seed=1, status="failed", error="out of memory", steps=10)
        _, cost, origins, _ = provenance.tables(study(tmp_path))
        by_status = cost.frame.set_index("status")
        assert by_status.loc["finished", ["hours", "gpu_hours"]].tolist() == [0.5, 1.0]
        seconds = 10 * 32 / 50.0  # ten steps of 32 pairs, 50 a second
        assert by_status.loc["failed", "gpu_hours"] == pytest.approx(2 * seconds / 3600)
        assert origins.frame.loc[0, "hardware"] == "2 x H200"
        assert origins.frame.loc[0, "starts"] == 2

    def test_length_bias(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        pairs = pd.read_parquet(folder / "test_pairs.parquet")
        pairs["margin/ref-a"] = pairs["tokens/ref-a"] / 10
        pairs.to_parquet(folder / "test_pairs.parquet")
        row = measures.references(study(tmp_path)).set_index("reference").loc["ref-a"]
        assert row["prefers_longer"] == 1.0
        assert row["length_correlation"] == pytest.approx(1.0)
        unequal = pairs["tokens/ref-a"] != 0
        assert row["chosen_longer"] == (pairs["tokens/ref-a"] > 0)[unequal].mean()


class TestCommand:
    def test_messages(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_run(tmp_path / "runs")
        runs = str(tmp_path / "runs")
        for arguments, message in (
            ([str(tmp_path / "nothere")], "nothere: no such folder"),
            (
                [str(tmp_path / "runs" / "study"), "--where", "loss.beta=7"],
                "no runs with loss.beta=7",
            ),
            ([runs, "--where", "loss.beta"], "give KEY=VALUE"),
            ([runs, "--watch", "0"], "give at least 1 second"),
            ([runs, "--out", "/proc/report"], "/proc/report: cannot be written"),
            ([runs, "--published", str(tmp_path / "x.csv")], "x.csv"),
            (["compare", str(tmp_path / "nothere")], "nothere: no such folder"),
        ):
            assert main(arguments) == 2, arguments
            error = capsys.readouterr().err.splitlines()
            assert len([line for line in error if "figure" not in line]) == 1, error
            assert message in error[0]

    def test_compare(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one = make_run(tmp_path, weighting="vaw")
        two = make_run(tmp_path, weighting="tsw", suffix="b1", loss__beta=1.0)
        assert main(["compare", str(one), str(two)]) == 0
        out = capsys.readouterr().out
        rows = {line[:14].strip(): line[14:].split() for line in out.splitlines()}
        accuracy = json.loads((one / "result.json").read_text())["test/accuracy"]
        assert rows["test accuracy"][0] == f"{accuracy:.4f}"
        assert rows["loss.beta"] == ["1.0"]
        assert rows["α ref-g"][0] == "0.250"

    def test_where_chooses_runs(self, tmp_path: Path) -> None:
        make_run(tmp_path)
        make_run(tmp_path, suffix="b1", loss__beta=1.0)
        out = tmp_path / "report"
        assert main([str(tmp_path), "--where", "loss.beta=1", "--out", str(out)]) == 0
        assert len(pd.read_csv(out / "tables" / "runs.csv")) == 1

    def test_the_whole_study_in_a_minute_without_torch(self, tmp_path: Path) -> None:
        """266 runs of 200 steps with 1,000 test pairs each."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report_runs, "POOL", 7000)
            patch.setattr(report_runs, "TEST", 1000)
            make_study(tmp_path, seeds=7, steps=200, datasets=("town", "village"))
        script = (
            "import re, sys, time; from mrpo_lab.report.__main__ import main\n"
            f"code = main([{str(tmp_path)!r}, '--out', {str(tmp_path / 'report')!r}])\n"
            "most = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())\n"
            "print(time.process_time(), most.group(1))\n"
            "sys.exit(code or 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "266 finished" in done.stdout
        # Its own, not what it inherits from the process that starts it.
        seconds, kibibytes = map(float, done.stdout.splitlines()[-1].split())
        assert seconds < 60  # of the processor; a busy machine takes longer
        assert kibibytes < 1.5 * 2**20
        assert (tmp_path / "report" / "index.html").stat().st_size < 15e6
