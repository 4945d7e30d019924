"""Whole runs on lists: every method, resumed, over processes, told lambda and not."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from harness import (
    SLUGS,
    assert_same,
    close,
    compose,
    killed,
    metrics,
    only_run,
    read_json,
    result,
    train_py,
)
from test_list_data import rows, write
from test_processes import launch

from mrpo_lab.data.conditioning import conditioned
from mrpo_lab.experiment import Experiment, run_experiment
from mrpo_lab.merging import __main__ as merging
from mrpo_lab.objective.ranking import RANKINGS
from mrpo_lab.report import __main__ as report
from mrpo_lab.runs.folder import Run
from mrpo_lab.runs.trade_off import curves, hypervolume, hypervolumes
from mrpo_lab.training.trainer import Trainer
from mrpo_lab.training.workers import Workers

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture
def lists(tmp_path: Path) -> tuple[str, ...]:
    """A run of 5 steps on 24 lists of 2 to 7 replies; K = 3, the anchor first."""
    path = write(tmp_path / "lists.jsonl", rows(60))
    return (
        "experiment=quickstart",
        "dataset=jsonl_lists",
        f"dataset.path={path}",
        "dataset.val=8",
        "dataset.test=8",
        "dataset.train=24",
        "dataset.max_tokens=200",
        "loss/link=listwise",
        f"reference_set.use=[{','.join(SLUGS)}]",
        "reference_set.gate=warn",
        "protocol.batch_size=5",
        "protocol.probe_size=5",
        "train.evaluations=2",
        "train.checkpoint_every=2",
    )


def trained(outputs: Path, *overrides: str) -> Path:
    run_experiment(compose(*overrides, f"outputs={outputs}"), "run")
    return outputs / "run"


METHODS = [
    *(("mdpo", weighting) for weighting in ("arwc", "swcw", "tsw", "vaw", "vsw", "grid")),
    *((loss, "vaw") for loss in ("dpo", "mrpo", "geometric")),
]


@pytest.mark.parametrize(("loss", "weighting"), METHODS)
def test_every_method_runs_on_lists(
    tmp_path: Path, lists: tuple[str, ...], loss: str, weighting: str
) -> None:
    run = trained(tmp_path, *lists, f"loss={loss}", f"weighting={weighting}", "train.samples=1")
    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert all(np.isfinite(line["train/loss"]) for line in lines[1:])
    assert {line["lambda/kind"] for line in lines[1:]} == {0.5}
    names = {f"test/{m}{a}" for m in (*RANKINGS, "cross_entropy") for a in ("", "/kind", "/honest")}
    assert names | {"test/accuracy", "val/accuracy"} <= set(lines[0])
    assert result(run)["test/pairwise"] == lines[-1]["test/pairwise"]
    assert set(result(run)["hypervolume"]) == {"base", "trained"}


def test_training_lowers_the_listwise_loss(tmp_path: Path, lists: tuple[str, ...]) -> None:
    """The loss that is logged, and the one of the evaluation on lists that were not trained on."""
    how = ("train.epochs=12", "optimizer.lr=3e-3", "dataset.aspects=[kind]", "weighting=uniform")
    first, *_, last = metrics(trained(tmp_path, *lists, *how))[1:]
    assert last["train/loss"] < first["train/loss"] - 0.05


@pytest.mark.parametrize("sampler", ["dirichlet", "learned", "table"])
def test_killed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, lists: tuple[str, ...], sampler: str
) -> None:
    rows_ = ("lambda.rows=[{kind: 1}, {honest: 1}, {kind: 1, honest: 1}]",)
    how = (*lists, f"lambda={sampler}", *(rows_ if sampler == "table" else ()), "lambda.grid=2")
    whole = trained(tmp_path / "whole", *how)
    for death in ((Trainer, "train_step", 4, "after"), (Run, "log", 1, "after")):
        with killed(*death):
            trained(tmp_path / "cut", *how)
    cut = trained(tmp_path / "cut", *how)
    assert_same(whole, cut)
    tables = [pq.read_table(run / "trade_off.parquet") for run in (whole, cut)]
    assert tables[0].equals(tables[1])
    drawn = [(line["lambda/kind"], line["lambda/honest"]) for line in metrics(cut)[1:]]
    assert len(set(drawn)) > 1
    assert all(sum(pair) == pytest.approx(1) for pair in drawn)


def test_micro_batches_change_nothing(tmp_path: Path, lists: tuple[str, ...]) -> None:
    one = trained(tmp_path / "one", *lists, "train.micro_batch_tokens=1")
    all_ = trained(tmp_path / "all", *lists, "train.micro_batch_tokens=100000")
    assert close(metrics(one), metrics(all_), by=2e-4)


def test_two_processes_are_one(tmp_path: Path, lists: tuple[str, ...]) -> None:
    """lambda is the same on both, learned from what they know together."""
    how = (*lists, "lambda=learned", "model.dtype=float64", "lambda.grid=1")
    both = launch(*how, f"outputs={tmp_path / 'two'}")
    assert both.returncode == 0, both.stderr
    assert train_py(*how, f"outputs={tmp_path / 'one'}").code == 0
    two, one = only_run(tmp_path / "two"), only_run(tmp_path / "one")
    assert [s["processes"] for s in read_json(two / "provenance.json")["sessions"]] == [2]
    assert close(metrics(two), metrics(one), by=1e-9)


class TestToldLambda:
    def test_the_system_message(self) -> None:
        ask = {"role": "user", "content": "Bread?"}
        (system, asked) = conditioned((ask,), ["kind", "honest"], [0.25, 0.75])
        assert asked == ask
        assert system["role"] == "system"
        assert system["content"] == "What matters in the reply: honest 0.75, kind 0.25."
        brief = {"role": "system", "content": "Be brief."}
        (system, asked) = conditioned((brief, ask), ["kind", "honest"], [1.0, 0.0])
        assert asked == ask
        assert system["content"] == "Be brief.\n\nWhat matters in the reply: kind 1.00."

    def test_policy_sees_it_and_references_do_not(
        self, tmp_path: Path, lists: tuple[str, ...]
    ) -> None:
        experiment = Experiment.build(compose(*lists, "lambda=dirichlet"), Workers.start())
        prepared = experiment.prepare()
        refs = experiment.reference_scores(prepared).scores
        data = experiment.data(prepared, refs)
        tokenizer = experiment.model.tokenization.format.tokenizer
        (told,) = data.tokens.rows([3], torch.tensor([0.25, 0.75]).double())
        for row in told:
            text = tokenizer.decode(row.ids)
            assert "honest 0.75, kind 0.25" in text
            assert prepared.items[3].prompt[0]["content"] in text
        unconditioned = Experiment.build(compose(*lists), Workers.start())
        plain_refs = unconditioned.reference_scores(prepared).scores
        plain = unconditioned.data(prepared, plain_refs)
        assert torch.equal(plain.refs.sums, data.refs.sums)
        (untold,) = plain.tokens.rows([3], torch.ones(2))
        assert "kind" not in tokenizer.decode(untold[0].ids)
        replies = [row.ids[row.start :].tolist() for row in told]
        assert replies == [row.ids[row.start :].tolist() for row in untold]

    def test_trade_off_is_what_each_lambda_gives(
        self, tmp_path: Path, lists: tuple[str, ...]
    ) -> None:
        run = trained(tmp_path, *lists, "lambda=dirichlet", "lambda.grid=2", "dataset.test=6")
        rows_ = pq.read_table(run / "trade_off.parquet").to_pylist()
        points = {(row["lambda/kind"], row["lambda/honest"]) for row in rows_}
        assert points == {(0, 1), (0.5, 0.5), (1, 0)}
        assert len(rows_) == 2 * 3 * 2 * (2 * len(RANKINGS) + 1)
        trained_rows = [row for row in rows_ if row["policy"] == "trained"]
        middle = {
            f"test/{row['metric']}/{row['aspect']}": row["value"]
            for row in trained_rows
            if (row["lambda/kind"], row["ranked_by"]) == (0.5, "reward")
        }
        final = result(run)  # whose evaluations are under the mean of the sampler
        assert len(middle) == 2 * (len(RANKINGS) + 1)
        assert middle == pytest.approx({name: final[name] for name in middle}, abs=1e-12)
        values = [row["value"] for row in trained_rows if row["ranked_by"] == "logp"]
        assert len(set(values)) > 5  # lambda is heard
        volumes = hypervolumes(rows_, "pairwise")
        assert final["hypervolume"] == pytest.approx(volumes)


class TestMerging:
    """A policy that was told lambda, beside two of one aspect and their merges."""

    @pytest.fixture
    def runs(self, tmp_path: Path, lists: tuple[str, ...]) -> list[Path]:
        small = "model.lora={r: 2, target_modules: [q_proj, v_proj]}"
        told = trained(tmp_path / "told", *lists, small, "lambda=dirichlet", "lambda.grid=2")
        alone = [
            trained(tmp_path / aspect, *lists, small, f"lambda.weights={{{aspect}: 1}}")
            for aspect in ("kind", "honest")
        ]
        return [told, *alone]

    def test_at_the_corners_merges_are_the_policies_of_one_aspect(
        self, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert merging.main(list(map(str, runs))) == 0
        shown = capsys.readouterr().out
        assert "kind alone" in shown
        found = pq.read_table(runs[0] / "trade_off_compared.parquet").to_pylist()

        def values(policy: str, kind: float | None = None) -> list[float]:
            return [
                row["value"]
                for row in found
                if row["policy"] == policy and row["ranked_by"] == "logp"
                if kind is None or row["lambda/kind"] == kind
            ]

        assert values("merged", 1.0) == pytest.approx(values("kind alone"), abs=1e-9)
        assert values("merged", 0.0) == pytest.approx(values("honest alone"), abs=1e-9)
        assert len(values("merged")) == 3 * len(values("kind alone"))

        assert report.main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
        table = (tmp_path / "report" / "tables" / "trade-off.csv").read_text()
        for policy in ("base", "conditioned", "unconditioned", "merged", "kind alone"):
            assert f",{policy}," in table
        assert "λ dirichlet concentration=1.0, conditioned" in table
        assert len(list((tmp_path / "report" / "figures").glob("*trade-off-*.pdf"))) == 4

    def test_what_does_not_belong_together_is_refused(
        self, runs: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        told, kind, honest = map(str, runs)
        for arguments, message in (
            ([kind, kind, honest], "this policy is not conditioned on lambda"),
            ([told, kind], "no run was given that was trained on honest alone"),
            ([told, told, honest], "not trained on one aspect alone"),
            ([str(Path(told).parent), kind], "no run; a run is a folder with config.yaml"),
        ):
            assert merging.main(arguments) == 2
            assert message in capsys.readouterr().err


class TestHypervolume:
    def test_of_boxes(self) -> None:
        assert hypervolume(np.array([[0.5, 0.4]])) == pytest.approx(0.2)
        assert hypervolume(np.array([[0.5, 0.4], [0.2, 0.8], [0.1, 0.1]])) == pytest.approx(0.28)
        assert hypervolume(np.array([[0.5, -1.0]])) == 0

    @pytest.mark.parametrize("aspects", [2, 3, 4])
    def test_against_sampling(self, aspects: int) -> None:
        rng = np.random.default_rng(aspects)
        points = rng.random((8, aspects))
        samples = rng.random((40_000, aspects))
        inside = np.all(samples[:, None] <= points, axis=-1)
        share = np.any(inside, axis=1).mean()
        assert hypervolume(points) == pytest.approx(share, abs=0.012)
        assert hypervolume(points[::-1]) == pytest.approx(hypervolume(points))

    def test_curves_keep_their_aspects_apart(self) -> None:
        rows_ = [
            {"policy": "p", "lambda/a": x, "aspect": aspect, "ranked_by": "reward", "metric": "m"}
            | {"value": value}
            for x, both in ((0.0, (0.1, 0.9)), (1.0, (0.7, 0.3)))
            for aspect, value in zip("ab", both, strict=True)
        ]
        assert curves(rows_, "m")["p"].tolist() == [[0.1, 0.9], [0.7, 0.3]]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a link for pairs": (
        ["loss/link=logistic"],
        "loss.link: this link is for pairs, not for lists",
    ),
    "an aspect that is not": (
        ["lambda.weights={kindness: 1}"],
        "lambda: no aspect is called 'kindness'; choose from kind, honest",
    ),
    "a table without rows": (["lambda=table"], "lambda.rows: required, give lambda.rows=VALUE"),
    "one aspect alone": (
        ["lambda=dirichlet", "dataset.aspects=[kind]"],
        "lambda.condition: kind is the only aspect",
    ),
    "another data set's form": (["dataset=jsonl"], "which dataset=jsonl_lists reads"),
}


@pytest.mark.parametrize(("more", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_named_in_one_line(
    tmp_path: Path, lists: tuple[str, ...], more: list[str], message: str
) -> None:
    outcome = train_py(*lists, *more, f"outputs={tmp_path}")
    assert outcome.code == 2
    assert message in outcome.error


def test_pairs_are_not_conditioned(tmp_path: Path) -> None:
    outcome = train_py("experiment=quickstart", "lambda=dirichlet", f"outputs={tmp_path}")
    assert outcome.code == 2
    assert "lambda.condition: preference is the only aspect" in outcome.error


def test_lists_may_be_read_as_pairs(tmp_path: Path, lists: tuple[str, ...]) -> None:
    how = ("loss/link=logistic", "dataset.pairs=best_worst", "weighting=arwc")
    run = trained(tmp_path, *lists, *how)
    assert "test/ndcg" not in result(run)
    assert not (run / "trade_off.parquet").exists()
    assert json.loads((run / "result.json").read_text())["pairs"]["test"] <= 8
