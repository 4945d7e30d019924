"""The runs of a sweep, their names, their resources, and sweeps on this machine."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from harness import CONF, ROOT, TINY, Opened, assert_same, compose, read_json, train_py
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from launchers.composing import INDEPENDENT
from launchers.job import answer_signals
from launchers.nodes import Nodes, Resources, minutes, refuse_impossible
from launchers.scores import billions_of_parameters, required_scores
from launchers.slurm import Slurm, grouped
from launchers.sweep import Plan, Record, RunState, Sweep
from launchers.tasks import Score
from launchers.watching import seconds_left, status_lines
from mrpo_lab.errors import UserError
from mrpo_lab.runs.naming import run_name
from mrpo_lab.training.interruption import Interruption
from mrpo_lab.wording import format_duration

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

SUMMARY = "summary.txt, summary.json"
SWEEPS = {path.stem: path for path in sorted((CONF / "sweep").glob("*.yaml"))}


def runs_of(sweep: str, *narrowed: str) -> list[list[str]]:
    return Opened(f"sweep={sweep}").runs(f"sweep={sweep}", *narrowed)


def real_name(overrides: list[str]) -> str:
    """The name of a run that is composed by itself, as ``train.py`` does."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose("config", overrides=overrides, return_hydra_config=True)
    return run_name(cfg.name, cfg.hydra.runtime.choices, cfg.hydra.overrides.task)


@functools.cache
def opened_sweep(sweep: str) -> tuple[Opened, list[list[str]], list[str]]:
    """A sweep's configuration, its runs' overrides, and their names from shared compositions."""
    opened = Opened(f"sweep={sweep}")
    runs = opened.runs(f"sweep={sweep}")
    return opened, runs, [opened.composer.name(run) for run in runs]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_header_states_the_number_of_runs(sweep: str) -> None:
    _, runs, names = opened_sweep(sweep)
    header = [line for line in SWEEPS[sweep].read_text().splitlines() if line.startswith("#")]
    (stated,) = re.findall(r"(\d+) runs", " ".join(header))
    assert [int(stated)] * 2 == [len(runs), len(set(names))]
    page = (ROOT / "docs" / "sweeps.md").read_text()
    assert f"| `{sweep}` | {stated} |" in page


@pytest.mark.parametrize("sweep", SWEEPS)
def test_names_from_shared_compositions_are_those_of_the_single_command(sweep: str) -> None:
    opened, runs, shared = opened_sweep(sweep)
    few = runs[:: max(1, len(runs) // 4)]
    assert [shared[runs.index(run)] for run in few] == [real_name(run) for run in few]
    sections = [opened.composer.sections(run) for run in few]
    for run, found in zip(few, sections, strict=True):
        whole = opened.composer.full_config(run)
        assert found == {key: whole[key] for key in found}


def test_paper_is_its_parts_and_the_protocol() -> None:
    def cells(sweep: str) -> set[frozenset[str]]:
        return {frozenset(run) - {f"sweep={sweep}"} for run in runs_of(sweep)}

    parts = ("baselines", "methods", "one_hot", "thompson")
    assert cells("paper") == set().union(*map(cells, parts))
    assert sum(len(cells(part)) for part in parts) == 144
    for dataset, seeds in (("saferlhf", 5), ("ultrafeedback", 3)):  # METHODS: seeds per data set
        found = {o for run in runs_of("paper", f"dataset={dataset}") for o in run if "seed" in o}
        assert found == {f"seed=s{number}" for number in range(seeds)}
    quick = Opened("sweep=quick")
    assert len(quick.runs("sweep=quick")) == 18 * 3  # the paper's 18 methods


def test_command_line_narrows_and_sets() -> None:
    assert len(runs_of("paper", "dataset=saferlhf", "loss=mdpo,mrpo", "weighting=vaw")) == 10
    assert len(runs_of("paper", "seed=s0", "reference_set=solo_yi1_5_9b")) == 2
    assert len(runs_of("paper", "seed=s4")) == 18  # UltraFeedback has none
    every = runs_of("one_hot", "model=smollm2", "loss.beta=1,2")
    assert len(every) == 16
    assert all("model=smollm2" in run for run in every)
    assert len(Opened().runs("loss=mdpo,mrpo", "seed=s0,s1,s1")) == 4


REFUSED = {
    "unknown": (["seed=s7"], "seed=s7: no run of the sweep has it: choose from s0, s1, s2, s3, s4"),
    "together": (
        ["dataset=ultrafeedback", "seed=s3"],
        "has dataset=ultrafeedback seed=s3 together",
    ),
    "elsewhere": (["loss=dpo", "weighting=vaw"], "has loss=dpo weighting=vaw together"),
    "two": (["sweep=paper,quick"], "sweep: one at a time"),
    "glob": (["reference_set=glob(solo_x*)"], "matches no option"),
}


@pytest.mark.parametrize(("narrowed", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_run_has_is_refused(narrowed: list[str], why: str) -> None:
    with pytest.raises(UserError) as refused:
        runs_of("paper", *narrowed)
    assert why in str(refused.value)


def test_mistyped_option_of_a_sweep_is_one_line(tmp_path: Path) -> None:
    local = ("hydra/launcher=local", f"outputs={tmp_path}")
    for arguments, why in (
        (["loss=mdpo,mrop"], "loss=mrop: no such option, did you mean mrpo?"),
        (["weighting=vaw,vav"], "weighting=vav: no such option, did you mean vaw?"),
        (["seed=s0,s_7"], "seed=s_7: no such option, did you mean s7?"),
        (["loss.btea=1,2"], "loss.btea: no such key, did you mean beta?"),
        (["seed=0,1", "hydra.launcher.parallel=0"], "hydra.launcher.parallel: Input should be gre"),
        (["seed=0,1", "hydra.launcher.paralel=1"], "no such key, did you mean parallel?"),
        (["dataset=jsonl", "seed=0,1"], "dataset.path: required, give dataset.path=VALUE"),
    ):
        outcome = train_py("-m", TINY[0], *arguments, *local)
        assert outcome.code == 2
        assert why in outcome.error
    assert not list(tmp_path.rglob("tasks.json"))


def test_files_that_jobs_would_not_find_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    command = ("-m", f"--config-dir={tmp_path}/mine", TINY[0], "seed=0,1", "hydra/launcher=local")
    outcome = train_py(*command, f"outputs={tmp_path}/outputs")
    assert outcome.code == 2
    assert f"{tmp_path}/mine would not be there for jobs" in outcome.error


def test_key_of_scores_depends_on_what_decides_them() -> None:
    opened = Opened()

    def keys(*overrides: str) -> dict[str, str]:
        sections = opened.composer.sections([*TINY[:1], *overrides])
        return {scores.slug: scores.key for scores in required_scores(sections)}

    plain = keys()
    assert len(plain) == 7
    assert keys("seed=s3", "loss=mrpo", "weighting=tsw") == plain  # the pool is the same
    assert keys("reference_set.gate=warn", "reference_set.token_budget=9") == plain
    assert keys("reference_set.use=[tiny-neox]") == {"tiny-neox": plain["tiny-neox"]}
    for change in (
        "dataset.pairs=50",
        "reference_set.dtype=float64",
        "model.template=chatml",
        "kernels=off",
    ):
        assert not set(keys(change).values()) & set(plain.values()), change
    assert keys("kernels=auto") == plain  # composed anew, after the other value of the key


@pytest.mark.parametrize("file", [f for g in INDEPENDENT for f in (CONF / g).glob("*.yaml")])
def test_independent_groups_choose_for_no_other_group(file: Path) -> None:
    content = yaml.safe_load(file.read_text()) or {}
    assert not any(isinstance(default, dict) for default in content.get("defaults", ()))
    assert "_global_" not in file.read_text()


def test_runs_that_differ_in_independent_groups_and_values_share_a_composition() -> None:
    """Hydra takes 0.1 s for each, and 144 runs are to be dispatched in seconds."""
    opened = Opened("sweep=paper")
    with mock.patch.object(opened.composer, "_load", wraps=opened.composer._load) as load:
        names = {opened.composer.name(run) for run in opened.runs("sweep=paper")}
    assert (len(names), load.call_count) == (144, 22)


def test_data_that_changed_is_scored_again(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    sections: dict[str, Any] = {
        "dataset": {"path": str(file)},
        "model": {"path": "a/b"},
        "reference_set": {"entries": [{"slug": "a", "path": "a/b"}]},
    }
    (before,) = required_scores(sections)
    file.write_text("{}\n{}\n")
    (after,) = required_scores(sections)
    assert before.key != after.key


@pytest.mark.parametrize(
    ("slug", "path", "size"),
    [
        ("a", "Qwen/Qwen2.5-0.5B-Instruct", 0.5),
        ("a", "Qwen/Qwen3-4B-Instruct-2507", 4),
        ("a", "mistralai/Mistral-7B-Instruct-v0.3", 7),
        ("a", "meta-llama/Meta-Llama-3.1-8B-Instruct", 8),
        ("a", "01-ai/Yi-1.5-9B-Chat", 9),
        ("a", "microsoft/Phi-3-medium-128k-instruct", float("inf")),
        ("phi3-medium", "microsoft/Phi-3-medium-128k-instruct", 14),
        ("a", "embedded:tiny7/tiny-qwen2", 0.2),
    ],
)
def test_size_of_a_model(slug: str, path: str, size: float) -> None:
    assert billions_of_parameters(slug, path, {"phi3-medium": 14}) == size


def profile(*overrides: str) -> Slurm:
    cluster = Opened("hydra/launcher=slurm", *overrides).cluster()
    assert isinstance(cluster, Slurm)
    return cluster


def test_large_models_are_scored_with_more() -> None:
    slurm = profile()
    entries = compose().reference_set.entries
    asked = {
        entry.slug: slurm._resources(Score("s", entry.slug, entry.path, {})).mem_gb
        for entry in entries
    }
    assert asked["qwen2.5-0.5b"] == asked["qwen3-4b"] == 32
    assert asked["mistral-7b"] == asked["yi1.5-9b"] == 64
    assert asked["phi3-medium"] == 96


def test_profiles_ask_sbatch_for_what_they_say() -> None:
    slurm = profile("hydra.launcher.partition=gpu", "hydra.launcher.gpu_type=a100")
    asked = slurm._sbatch(slurm.train)
    assert asked == {
        "partition": "gpu",
        "time": 240,
        "mem": "32768M",
        "cpus_per_task": 8,
        "ntasks_per_node": 1,
        "gpus_per_node": "a100:1",
    }
    assert "gpus_per_node" not in slurm._sbatch(slurm.gather)


def node(**values: Any) -> Nodes:
    like = Nodes("gpu", True, 32, 128.0, {"a100": 4}, 600.0)
    return Nodes(**{**vars(like), **values})


def test_no_node_may_have_all_that_some_nodes_have_each() -> None:
    wanted = Resources(timeout_min=60, cpus=16, mem_gb=64, gpus=1)
    refuse_impossible("train", wanted, [node()])
    apart = [node(cpus=8), node(gpus={})]
    with pytest.raises(UserError, match="but no node has all of them"):
        refuse_impossible("train", wanted, apart)
    with pytest.raises(UserError, match="the cluster has no default, give"):
        refuse_impossible("train", wanted, [node(is_default=False)])


@pytest.mark.parametrize(
    ("limit", "length"),
    [
        ("infinite", float("inf")),
        ("1:00:00", 60),
        ("30:00", 30),
        ("2-00:00:00", 2880),
        ("1-12", 2160),
    ],
)
def test_time_limits_as_slurm_writes_them(limit: str, length: float) -> None:
    assert minutes(limit) == length


def test_tasks_are_grouped_in_the_order_they_came() -> None:
    assert grouped([3, 1, 4, 1, 5], lambda n: n % 2) == [(1, [3, 1, 1, 5]), (0, [4])]


def test_time_left_is_estimated_from_finished_runs(tmp_path: Path) -> None:
    def record(state: str, began: float, ended: float | None) -> Record:
        return Record("t", state, "1", "h", "", 0, began, "", ended)

    now = time.time()
    states = {
        "a": RunState("finished", record("done", 0, 100)),
        "b": RunState("running", record("running", now - 40, None)),
        "c": RunState("running", record("running", now - 70, None)),
        "d": RunState("queued"),
        "e": RunState("queued"),
    }
    assert seconds_left(states) == pytest.approx((200 + 60 + 30) / 2, abs=1)
    assert seconds_left({"a": RunState("queued")}) is None
    sweep = Sweep(tmp_path / "sweeps" / "s")
    sweep.folder.mkdir(parents=True)
    sweep.write_plan(Plan())
    assert status_lines(sweep, states, [])[0] == (
        "s: 5 runs: 1 finished, 2 running, 2 queued; about 2 min left"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "5 s"), (150, "2 min"), (3600, "1 h 0 min"), (8000, "2 h 13 min"), (100000, "1 d 3 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_forked_children_do_not_answer_the_cluster(tmp_path: Path) -> None:
    """SLURM signals every process of a job; only the run itself may save and requeue."""
    program = (
        "import os, signal, sys, time\n"
        "from launchers.job import PREEMPTED, answer_signals\n"
        "from mrpo_lab.training.interruption import Interruption\n"
        "run = Interruption()\n"
        "answer_signals(run, lambda: print('left', os.getpid() == parent, flush=True))\n"
        "parent = os.getpid()\n"
        "children = []\n"
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "    children.append(child)\n"
        "time.sleep(0.2)\n"
        "os.killpg(0, PREEMPTED)\n"
        "time.sleep(0.5)\n"
        "for child in children:\n"
        "    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # ignored\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    assert os.waitpid(child, 0)[1] == signal.SIGTERM  # and not by this one\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "left True\n"


def test_signal_waits_for_the_step_and_is_answered_once() -> None:
    left: list[int] = []
    run = Interruption()
    with run.training():
        run.ask(lambda: left.append(1))
        assert run.asked
        assert not left
        run.answer()
        assert not run.asked
    assert left == [1]
    run.answer()
    run.ask(lambda: left.append(2))  # nothing is trained: at once
    assert left == [1, 2]
    assert answer_signals  # what a job installs is run in the tests on a cluster


def local(outputs: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", "-m", *TINY, *arguments, f"outputs={outputs}"]
    launcher = ("hydra/launcher=local", "hydra.launcher.parallel=2")
    # A shell's background job, as these tests may be, ignores Ctrl-C, and so would its children.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen(
        [*command, *launcher],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, former)
    return started


def test_sweep_on_this_machine_survives_what_happens_to_a_run_and_to_itself(tmp_path: Path) -> None:
    """A run is killed, then Ctrl-C stops all runs; the same command again finishes the sweep, and
    each run has the numbers of the single command."""
    outputs = tmp_path.resolve() / "outputs"
    # Long enough to be met in the middle, on a fast machine too.
    steps = ("protocol.batch_size=1", "train.epochs=8", "train.checkpoint_every=5")
    one = ("name=here", "weighting=swcw", "train.token_budget=64", *steps)
    asked = (*one, "seed=0,1,2")
    first = local(outputs, *asked)
    sweep = Sweep(outputs / "sweeps" / "here")

    def training(seed: str) -> list[int]:
        """Process ids of running runs with this seed that have logged a step."""
        return [
            int(record.job)
            for title, record in sweep.last_records().items()
            if record and f"/{seed}__" in title and record.state == "running"
            if alive(int(record.job)) and (outputs / title / "metrics.jsonl").exists()
        ]

    until(lambda: bool(training("s0")))
    os.kill(training("s0")[0], signal.SIGKILL)
    until(lambda: bool(training("s2")))
    os.kill(first.pid, signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert "stopping: runs save themselves, and the same command goes on" in out
    assert err.splitlines()[-1].startswith("error: interrupted")
    assert not training("s2")
    states = {Path(n).name[:2]: each.state for n, each in sweep.run_states({}).items()}
    assert states["s0"] == states["s2"] == "dead"
    left = [record and record.state for record in sweep.last_records().values()]
    assert left[-2] == "left"  # saved; the last task is gathering

    out, err = local(outputs, *asked).communicate(timeout=200)
    assert "submitted (" in out
    assert out.splitlines()[-2:] == ["here: 3 runs: 3 finished", f"{sweep.folder}/: {SUMMARY}"]
    assert not err
    again, _ = local(outputs, *asked).communicate(timeout=60)
    assert again.splitlines()[0] == "here: 3 runs: 3 finished, 0 submitted"
    rows = read_json(sweep.folder / "summary.json")
    assert [row["state"] for row in rows] == ["finished"] * 3  # type: ignore[index]
    for seed, name in zip(("0", "1", "2"), sweep.plan.runs, strict=True):
        alone = train_py(*TINY, *one, f"seed={seed}", f"outputs={tmp_path}/alone")
        assert alone.code == 0
        assert_same(outputs / name, tmp_path / "alone" / name)


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def until(done: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)
