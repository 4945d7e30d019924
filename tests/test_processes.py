"""Processes of their own: two that train together, one that is killed, one without a hub."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
import wandb_files
from harness import ROOT, TINY, close, metrics, only_run, read_json, result, train_py

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

CPUS = str(ROOT / "launchers" / "accelerate" / "cpu.yaml")
DEADLINE = 240


def environment(**more: str) -> dict[str, str]:
    """One thread and no GPU, so that a number does not depend on where a process runs."""
    hidden = ("HF_HUB_OFFLINE", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
    """The documented command for two processes, on a port that is free."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", CPUS)
    command = [sys.executable, *launcher, "--main_process_port", "0", "train.py", *overrides]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        start_new_session=True,  # what a launcher does to its process group stays there
    )


def test_two_processes_are_one(tmp_path: Path) -> None:
    """An odd batch, so that they have different numbers of pairs and of micro-batches."""
    how = (
        *TINY,
        "loss=mrpo",
        "weighting=tsw",
        "train.micro_batch_tokens=150",
        "train.accuracy_after_step=true",
        "train.max_grad_norm=1.0",
        "optimizer.eps=1.0",
        "optimizer.lr=0.1",
    )
    both = launch(*how, f"outputs={tmp_path / 'two'}")
    assert both.returncode == 0, both.stderr
    assert train_py(*how, f"outputs={tmp_path / 'one'}").code == 0
    two, one = only_run(tmp_path / "two"), only_run(tmp_path / "one")
    assert [s["processes"] for s in read_json(two / "provenance.json")["sessions"]] == [2]
    assert close(metrics(two), metrics(one), by=1e-6)
    assert result(two) == result(one)
    assert both.stdout.count("mean alpha") == 1  # the summary, printed once
    assert not [line for line in both.stderr.splitlines() if line.strip() and "%|" not in line]
    logged = [line.split("] ", 1)[1] for line in both.stdout.splitlines() if line[:1] == "["]
    kinds = [line.split()[0] for line in logged if "built by an earlier version" not in line]
    assert kinds.count("data:") == kinds.count("cpu:") == 1  # the latter: what it computes with
    assert set(kinds) <= {"data:", "cpu:", "reference"}  # what the gate found in tiny models


def test_two_processes_fail_as_one(tmp_path: Path) -> None:
    """An infinite gradient, of whichever process: one line, and all files are closed before."""
    how = (*TINY, "loss/link=ipo", "loss.beta=1e-7", "model.dtype=float16", "tracker=wandb")
    failed = launch(*how, f"outputs={tmp_path}")
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, failed.stderr
    assert "step 1: the gradient of pair " in errors[0]
    outcome = result(only_run(tmp_path))
    assert outcome["status"] == "failed"
    assert errors[0] == f"error: {outcome['error']}"
    (mirror,) = tmp_path.rglob("offline-run-*/*.wandb")
    assert wandb_files.exit_code(mirror) == 1


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], tuple[str, ...]]]:
    """A run that tracks to W&B with a key and no server, stopped after some step past 4."""
    command = (
        *TINY,
        "weighting=swcw",
        "tracker=wandb",
        "train.epochs=3",
        "train.checkpoint_every=3",
        f"outputs={tmp_path}",
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command],
        env=environment(WANDB_API_KEY="f" * 40, WANDB_BASE_URL="http://127.0.0.1:9"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + DEADLINE
    while sum(p.read_text().count("\n") for p in tmp_path.rglob("metrics.jsonl")) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    yield process, command
    process.kill()
    process.wait()


def test_killed_process_is_continued_by_the_same_command(
    stopped: tuple[subprocess.Popen[str], tuple[str, ...]], tmp_path: Path
) -> None:
    process, command = stopped
    folder = only_run(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = train_py(*command)
    assert refused.code == 2
    assert refused.error == f"error: {folder} is being written by another process"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    process.kill()
    said, _ = process.communicate()
    assert "W&B: 127.0.0.1 cannot be reached, so this run is kept offline" in said
    done = len(metrics(folder))
    assert 6 <= done < 16, "killed before its end"
    assert train_py(*command).code == 0
    wandb.teardown()

    whole = train_py(*command, f"outputs={tmp_path / 'whole'}", "tracker=local")
    assert whole.code == 0
    uninterrupted = only_run(tmp_path / "whole")
    assert metrics(folder) == metrics(uninterrupted)
    assert result(folder) == result(uninterrupted)
    weights = "adapter/model.safetensors"
    assert (folder / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    (mirror,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert wandb_files.history(mirror) == wandb_files.read_jsonl(folder / "metrics.jsonl")
    assert read_json(folder / "provenance.json")["sessions"][0].keys() >= {"git", "versions"}
    secret = b"f" * 40
    assert not [p for p in folder.rglob("*") if p.is_file() and secret in p.read_bytes()]


def test_unreachable_hub_is_said_in_seconds_with_all_that_is_missing(tmp_path: Path) -> None:
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "dataset=saferlhf", f"outputs={tmp_path / 'o'}"],
        env=environment(HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert time.monotonic() - began < 30
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    for text in (
        "RLHFlow/PKU-SafeRLHF-30K-standard",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "microsoft/Phi-3-medium-128k-instruct",
        "cannot be reached",
        "dataset.path=",
        "MRPO_LAB_MODELS=",
    ):
        assert text in line
    assert not list((tmp_path / "o").rglob("*"))
