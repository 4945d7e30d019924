"""Sweeps on a real SLURM. Whatever happens to a run, it ends with the numbers of an undisturbed
run, and no finished run runs twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from harness import ROOT, assert_same, close, metrics, read_json, result
from laboratory import RUN as TWELVE_STEPS
from laboratory import Lab, said, steps, undisturbed, until

from launchers.sweep import Record
from launchers.tasks import read_tasks

pytest_plugins = ("surroundings", "throwaway")


def sessions(run: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = read_json(run / "provenance.json")["sessions"]
    return found


def records(lab: Lab, name: str) -> dict[str, Record | None]:
    return lab.sweep(name).last_records()


@pytest.fixture(scope="module")
def timed(slurm: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A run whose time is up after a minute, long before it is done. The last test looks at it."""
    lab = Lab(tmp_path_factory.mktemp("timed"))
    lab.plants.mkdir()
    lab.plant("s6.slow", "8")
    limits = ("hydra.launcher.train.timeout_min=1", "hydra.launcher.signal_delay_s=30")
    lab.dispatch(*TWELVE_STEPS, *limits, "name=timed", "weighting=swcw", "seed=6")
    return lab


def test_two_stages_and_the_same_command_at_any_time(lab: Lab, timed: Lab) -> None:
    asked = (*TWELVE_STEPS, "name=stages", "weighting=swcw", "seed=0,1")
    first = lab.dispatch(*asked)
    assert first.startswith("stages: 2 runs: 2 submitted")
    submitted = {(job.array, job.index) for job in lab.active()}
    again = lab.dispatch(*asked)
    assert again.endswith("0 submitted")
    assert "2 queued" in again
    assert {(job.array, job.index) for job in lab.active()} <= submitted
    assert lab.wait("stages")
    assert lab.dispatch(*asked) == "stages: 2 runs: 2 finished, 0 submitted"

    done = records(lab, "stages")
    assert {title for title in done if title.startswith("score ")} <= {
        f"score {slug}" for slug in ("tiny-qwen2", "tiny-llama", "tiny-neox")
    }
    assert all(record and record.state == "done" for record in done.values())
    scored = [r.ended or 0 for title, r in done.items() if r and title.startswith("score ")]
    trained = [r.began for title, r in done.items() if r and "/" in title]
    assert max(scored, default=0) <= min(trained)
    ids = {record.job for record in done.values() if record}
    states = dict(
        line.split() for line in said("sacct", "-X", "-n", "-o", "JobID,State").splitlines()
    )
    assert {states[job] for job in ids} == {"COMPLETED"}

    gathered = json.loads((lab.sweep("stages").folder / "summary.json").read_text())
    for seed, row in zip(("s0", "s1"), gathered, strict=True):
        run = lab.run("stages", seed)
        found = result(run)
        assert row["run"] == str(run.relative_to(lab.outputs))
        assert [row["test/accuracy"], row["state"]] == [found["test/accuracy"], "finished"]
        (session,) = sessions(run)
        assert session["job"] == {
            "id": done[row["run"]].job,  # type: ignore[union-attr]
            "node": done[row["run"]].host,  # type: ignore[union-attr]
            "restarts": "0",
            "visible_gpus": "",
        }
        alone = undisturbed(lab.folder / f"alone-{seed}", *asked[:-1], f"seed={seed}")
        assert_same(run, alone)


def test_every_disturbance_ends_like_an_undisturbed_run(
    lab: Lab, timed: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (*TWELVE_STEPS, "name=disturbed", "weighting=swcw")
    for seed in ("s2", "s3", "s4"):
        lab.plant(f"{seed}.slow", "1")
    lab.plant("s0.8.raise")
    lab.plant("s1.8.kill")
    lab.dispatch(*asked, "hydra.launcher.partition=cheap", "seed=3")
    lab.dispatch(*asked, "hydra.launcher.partition=fragile", "seed=4")
    lab.dispatch(*asked, "seed=0,1,2")
    s2, s3, s4 = (lab.run("disturbed", seed) for seed in ("s2", "s3", "s4"))

    until(lambda: steps(s3) > 3)
    urgent = ("sbatch", "-p", "urgent", "-c", "4", "-o", "/dev/null", "--wrap", "sleep 1")
    said(*urgent)  # takes the whole node of `cheap`
    until(lambda: steps(s2) > 3)
    said("scontrol", "requeue", lab.run_states("disturbed")["s2"].job)
    until(lambda: steps(s4) > 6)
    lab.fail_node("n4", lab.run_states("disturbed")["s4"].job)
    assert not lab.wait("disturbed")

    states = {seed: run.state for seed, run in lab.run_states("disturbed").items()}
    assert states == {"s0": "failed", "s1": "dead", **dict.fromkeys(("s2", "s3", "s4"), "finished")}
    failed = records(lab, "disturbed")[str(lab.run("disturbed", "s0").relative_to(lab.outputs))]
    assert failed is not None
    assert said("sacct", "-X", "-n", "-j", failed.job, "-o", "State").split() == ["FAILED"]
    capsys.readouterr()
    assert lab.verb("status") == 0
    shown = capsys.readouterr().out
    assert "failed: planted" in shown
    assert "dead: killed on" in shown
    assert lab.verb("logs", "/s0__") == 0
    assert 'raise RuntimeError("planted")' in capsys.readouterr().out

    ended = {name: r.ended for name, r in records(lab, "disturbed").items() if r and "/" in name}
    assert lab.dispatch(*asked, "seed=0,1,2,3,4") == (
        "disturbed: 5 runs: 3 finished, 2 submitted (1 failed, 1 dead before)"
    )
    assert lab.wait("disturbed")
    for name, record in records(lab, "disturbed").items():
        if record and "/" in name and not any(f"/{seed}__" in name for seed in ("s0", "s1")):
            assert record.ended == ended[name]  # what had finished has not run again
    counts = {"s0": 2, "s1": 2, "s2": 2, "s3": 2, "s4": 2}
    for seed, count in counts.items():
        run = lab.run("disturbed", seed)
        assert len(sessions(run)) == count
        assert_same(run, undisturbed(lab.folder / f"alone-{seed}", *asked, f"seed={seed}"))
    restarts = [session["job"]["restarts"] for session in sessions(s3)]  # type: ignore[index]
    assert restarts == ["0", "1"]  # one job, started again
    saved_at = [line for line in log_of(lab, "disturbed", s3) if "resuming after step" in line]
    assert len(saved_at) == 1
    assert int(saved_at[0].split()[4]) % 5  # saved on the signal, not by the clock


def log_of(lab: Lab, name: str, run: Path) -> list[str]:
    record = records(lab, name)[str(run.relative_to(lab.outputs))]
    assert record is not None
    return Path(record.log).read_text().splitlines()


def test_two_processes_of_a_node_train_one_run_and_resume(lab: Lab) -> None:
    """One process per GPU; here without GPUs, over gloo."""
    asked = (*TWELVE_STEPS, "name=gpus", "model.dtype=float64", "seed=5")
    two = "hydra.launcher.train={timeout_min: 20, cpus: 1, mem_gb: 1, gpus: 2, tasks: 2}"
    lab.plant("s5.slow", "1")
    lab.dispatch(*asked, two)
    run = lab.run("gpus", "s5")
    until(lambda: steps(run) > 3)
    said("scancel", "--signal=USR2", lab.run_states("gpus")["s5"].job)
    assert lab.wait("gpus")
    assert [s["processes"] for s in sessions(run)] == [2, 2]
    assert [s["job"]["visible_gpus"] for s in sessions(run)] == ["0,1", "0,1"]  # type: ignore[index]
    alone = undisturbed(lab.folder / "alone", *asked)
    assert close(metrics(run), metrics(alone), by=1e-9)


def test_failed_scoring_stops_its_dependents_alone(
    lab: Lab, tiny7_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = lab.folder / "broken"
    shutil.copytree(tiny7_dir / "tiny-llama", broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    entries = f"[{{slug: base, path: 'embedded:tiny7/tiny-qwen2'}}, {{slug: torn, path: {broken}}}]"
    custom = [o for o in TWELVE_STEPS if not o.startswith("reference_set.use")]
    asked = (
        *custom,
        "reference_set=custom",
        "reference_set.dtype=float32",
        f"reference_set.entries={entries}",
        "name=torn",
        "reference_set.use=[base],[base,torn]",
        "seed=0",
    )
    lab.dispatch(*asked)
    lab.wait("torn")
    alone, both = lab.sweep("torn").plan.runs
    states = {name: s.state for name, s in lab.sweep("torn").run_states({}).items()}
    assert states == {alone: "finished", both: "dead"}
    capsys.readouterr()
    lab.verb("status", "torn")
    shown = capsys.readouterr().out
    assert "failed   score torn: " in shown
    assert "1 x dead: scoring torn failed" in shown
    weights.write_bytes(whole)
    assert lab.verb("retry", "torn") == 0
    said_now = capsys.readouterr().out.strip()
    assert said_now == (
        "torn: 2 runs: 1 finished, 1 submitted (1 dead before), after 1 reference to score"
    )
    assert lab.wait("torn")
    assert len(sessions(lab.outputs / alone)) == len(sessions(lab.outputs / both)) == 1


MANY = (
    "name=many",
    "weighting=vaw,vdw,arwc,swcw,uniform",
    "loss.beta=1,2,3,4,5",
    "seed=" + ",".join(map(str, range(10))),
    "hydra.launcher.options=[--hold]",
)


def driver(lab: Lab, *more: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "train.py", "-m", *lab.overrides(*TWELVE_STEPS, *MANY, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def active_runs(lab: Lab) -> Counter[str]:
    """How many active jobs each run has."""
    return Counter(
        output
        for job in lab.active()
        for output in read_tasks(job.array / "tasks.json")[job.index].outputs
        if output.startswith("run ")
    )


def test_250_runs_are_dispatched_in_seconds_and_in_chunks(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    out, err = driver(lab).communicate()
    first = time.monotonic() - began
    assert not err
    assert "250 runs: 250 submitted" in out
    began = time.monotonic()
    out, err = driver(lab).communicate()
    second = time.monotonic() - began
    assert not err
    assert out.strip() == "many: 250 runs: 250 queued, 0 submitted"
    active = active_runs(lab)
    assert len(active) == 250
    assert set(active.values()) == {1}
    arrays = [len(read_tasks(folder / "tasks.json")) for folder in lab.sweep("many").arrays]
    assert max(arrays) == 100  # the cluster's MaxArraySize
    at_once = [
        int(line.partition("%")[2].rstrip("]"))
        for line in said("squeue", "-h", "-o", "%i").splitlines()
        if "%" in line
    ]
    assert sum(at_once) <= 64 + 3
    capsys.readouterr()
    assert lab.verb("status", "many") == 0
    assert " jobs on hold (JobHeldUser), to release: scontrol release " in capsys.readouterr().out
    assert lab.verb("cancel", "many") == 0
    assert not lab.active()
    print(f"\n250 runs: {first:.1f} s, again: {second:.1f} s")
    assert first < 5
    assert second < 3


def test_two_drivers_at_once_submit_every_run_once(lab: Lab) -> None:
    both = [driver(lab), driver(lab)]
    said_both = sorted(process.communicate()[0].strip().split(", after")[0] for process in both)
    assert said_both == [
        "many: 250 runs: 250 queued, 0 submitted",
        "many: 250 runs: 250 submitted",
    ]
    assert set(active_runs(lab).values()) == {1}
    lab.verb("cancel", "many")


def test_two_sweeps_share_the_runs_and_scores_that_both_ask_for(lab: Lab) -> None:
    """Sweeps of the paper. No test has its models and data, so the jobs stay on hold."""
    asked = ("tracker=local", "hydra.launcher.options=[--hold]", "dataset=saferlhf", "seed=0,1")
    assert lab.dispatch("sweep=methods", *asked) == (
        "methods: 16 runs: 16 submitted, after 7 references to score"
    )
    assert lab.dispatch("sweep=paper", *asked) == "paper: 36 runs: 16 queued, 20 submitted"
    active = active_runs(lab)
    assert len(active) == 36
    assert set(active.values()) == {1}
    waiting = said("squeue", "-h", "-o", "%E").split()
    assert any(each.startswith("afterok:") for each in waiting)  # on the other sweep's scoring
    assert lab.verb("cancel", "paper") == 0
    assert len(active_runs(lab)) == 16
    lab.verb("cancel", "methods")


def test_killed_driver_has_left_nothing_that_is_submitted_twice(lab: Lab) -> None:
    first = driver(lab)
    until(lambda: bool(active_runs(lab)))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = len(active_runs(lab))
    assert before > 0
    out, err = driver(lab).communicate()
    assert not err
    if before < 250:  # it died between two arrays
        assert f"{250 - before} submitted" in out
    active = active_runs(lab)
    assert len(active) == 250
    assert set(active.values()) == {1}
    lab.verb("cancel", "many")


IMPOSSIBLE = {
    "partition": (["hydra.launcher.partition=mian"], "did you mean main?"),
    "cores": (["hydra.launcher.train.cpus=64"], "asks for 64 cores (cpus x tasks), but no node of"),
    "memory": (["hydra.launcher.train.mem_gb=999"], "asks for 999 GB (mem_gb), but no node"),
    "gpus": (
        ["hydra.launcher.train.gpus=3"],
        "asks for 3 GPUs (gpus), but no node of partition main",
    ),
    "type": (
        ["hydra.launcher.gpu_type=a100", "hydra.launcher.train.gpus=1"],
        "asks for 1 GPUs of type a100",
    ),
    "time": (["hydra.launcher.train.timeout_min=999"], "asks for 999 minutes (timeout_min), but"),
    "by itself": (["hydra.launcher.options=['--constraint=nope']"], "sbatch refused 1 job: "),
}


@pytest.mark.parametrize(("asked", "why"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_the_cluster_cannot_start_is_refused(lab: Lab, asked: list[str], why: str) -> None:
    assert why in lab.refused(*TWELVE_STEPS, "name=impossible", "seed=9", *asked)
    assert not lab.active()


def test_time_that_is_up_is_followed_by_more(timed: Lab) -> None:
    """Started by the first test."""
    run = timed.run("timed", "s6")
    until(lambda: (run / "provenance.json").exists() and len(sessions(run)) > 1, 600)
    # A slow machine may need more than a session's half minute to its first step.
    until(lambda: timed.grant_minutes(timed.run_states("timed")["s6"].job, 20))
    (timed.plants / "s6.slow").unlink()
    assert timed.wait("timed")
    asked = (*TWELVE_STEPS, "name=timed", "weighting=swcw", "seed=6")
    alone = undisturbed(timed.folder / "alone", *asked)
    assert_same(run, alone)
    assert "this job is timed-out" in "\n".join(log_of(timed, "timed", run))
