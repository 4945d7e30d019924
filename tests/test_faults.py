"""Processes that are killed at any write, and disks that are full from any write on."""

import errno
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import faults
import pytest
import wandb
import wandb_files
from harness import TINY, assert_same, experiment, only_run, read_json, train_py

from launchers.sweep import Sweep
from mrpo_lab.runs.reading import RunView
from mrpo_lab.runs.tracking import LocalTracker, WandbTracker

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

MOMENTS: dict[str, tuple[faults.Moment, ...]] = {
    "arwc": (("*.state.safetensors.*", 1), ("*.alpha.parquet.*", 7), ("*.adapter.tmp", 3)),
    "swcw": (("*.alpha.parquet.*", 1), ("*.adapter.tmp/*", 2)),
    "swcw_oh": (("*.config.yaml.*", 2), ("*.alpha.parquet.*", 5), ("*.test_pairs.parquet.*", 2)),
    "tsw": (("*/metrics.jsonl", 4), ("*.alpha.parquet.*", 2), ("*.result.json.*", 2)),
}
"""Checkpoints that are there but not in place, alpha that lacks an interval, a part of the adapter,
everything but the result."""


@pytest.mark.parametrize(("weighting", "moments"), MOMENTS.items(), ids=MOMENTS.keys())
def test_run_that_is_killed_at_any_write_ends_as_if_it_had_not(
    tmp_path: Path, weighting: str, moments: tuple[faults.Moment, ...]
) -> None:
    rng = random.Random(weighting)
    chance = (rng.randint(1, 20), rng.uniform(1, 3))

    def work(outputs: str) -> Path:
        return experiment(tmp_path / outputs, f"weighting={weighting}", "train.samples=1")

    kills = faults.survives(lambda: work("cut"), tmp_path / "cut", [*moments, *chance])
    assert kills >= len(moments)
    work("whole")
    assert_same(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    RunView(tmp_path / "cut" / "run").check()
    assert not list(tmp_path.rglob("*.tmp"))


# --- W&B ---


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("fresh_wandb")
@pytest.mark.parametrize("when", ["before", "after"])
def test_run_that_is_killed_at_its_end_is_mirrored_when_it_goes_on(
    tmp_path: Path, when: str
) -> None:
    def work() -> None:
        folder = experiment(tmp_path, "tracker=wandb")
        wandb.teardown()  # waits for W&B's own process
        assert folder

    finish = WandbTracker.finish

    def die(tracker: WandbTracker, result: Any, failed: bool = False) -> None:
        if when == "after":
            finish(tracker, result, failed)
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(WandbTracker, "finish", die):
        assert faults.in_child(work)[0] == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert not (folder / "result.json").exists()
    code, said = faults.in_child(work)
    assert code == 0, said
    (mirror,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert wandb_files.history(mirror) == wandb_files.read_jsonl(folder / "metrics.jsonl")
    assert wandb_files.exit_code(mirror) == 0
    summary, result = wandb_files.summary(mirror), read_json(folder / "result.json")
    assert {key: summary[key] for key in result} == result


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("no service\nmore")])
def test_tracker_that_fails_at_the_end_loses_nothing(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with mock.patch.object(LocalTracker, "finish", side_effect=error):
        folder = experiment(tmp_path)
    assert RunView(folder).result is not None
    (line,) = (m for m in caplog.messages if m.startswith("tracker: it lacks the end of this run"))
    assert "\n" not in line


# --- Disks that cannot be written ---


def refusal(work: Any, folder: Path, moment: Any, code: int = errno.ENOSPC) -> str:
    """The one line on stderr of ``work``, which must exit with code 2."""

    def shown() -> None:
        outcome = work()
        print(outcome.err)
        sys.exit(outcome.code)

    status, said = faults.refused(shown, folder, moment, code)
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, said
    return lines[0]


PLACES = (
    *("config.yaml", "provenance.json", "metrics.jsonl", "/metrics.jsonl", "checkpoint"),
    *("state.safetensors", "alpha.parquet", "adapter", "adapter.tmp/", "test_pairs.parquet"),
    "result.json",
)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_folder_of_a_run_that_cannot_be_written_is_named(tmp_path: Path, code: int) -> None:
    outputs = tmp_path / "outputs"

    def work(outputs: Path = outputs) -> Any:
        return train_py(*TINY, "name=x", "weighting=tsw", f"outputs={outputs}")

    for moment in (1, 9, *((f"*{name}*", 1) for name in PLACES)):
        line = refusal(work, tmp_path, moment, code)
        assert line.startswith(f"error: outputs: cannot write {outputs}/x/"), (moment, line)
        assert os.strerror(code) in line
        if code == errno.ENOSPC:
            assert not list(outputs.rglob("*.tmp"))
    assert work().code == 0
    assert work(tmp_path / "whole").code == 0
    assert_same(only_run(outputs), only_run(tmp_path / "whole"))
    assert not list(outputs.rglob("*.tmp"))


def test_folder_of_a_sweep_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    outputs = (tmp_path / "outputs").resolve()
    folder = outputs / "sweeps" / "s"

    def work() -> Any:
        local = ("hydra/launcher=local", "hydra.launcher.parallel=1", f"outputs={outputs}")
        return train_py("-m", *TINY, "name=s", "seed=0", *local)

    places = ["sweeps", "sweeps/.lock", ".tmp/loss/*", "conf/*", ".plan.json.*"]
    places += ["/jobs", "tasks.json*", "/log", ".supervisor", "supervisor.out"]
    for place in places:
        line = refusal(work, outputs, (f"*{place}", 1))
        assert line.startswith(f"error: outputs: cannot write {outputs}/sweeps"), (place, line)
        assert "No space left on device" in line
        assert not list((outputs / "sweeps").rglob("*.tmp"))
    outcome = work()
    assert outcome.code == 0, outcome.err
    assert [run.state for run in Sweep(folder).run_states({}).values()] == ["finished"]


def test_dispatch_that_is_killed_at_any_write_goes_on(tmp_path: Path) -> None:
    outputs = (tmp_path / "outputs").resolve()
    folder = outputs / "sweeps" / "s"

    def work() -> None:
        local = ("hydra/launcher=local", "hydra.launcher.parallel=1", f"outputs={outputs}")
        outcome = train_py("-m", *TINY, "name=s", "seed=0", *local)
        assert outcome.code == 0, outcome

    moments = [(f"*{place}", 1) for place in (".tmp/loss/*", "/jobs", "/log", ".plan.json.*")]
    assert faults.survives(work, outputs, moments) == len(moments)
    assert [run.state for run in Sweep(folder).run_states({}).values()] == ["finished"]
    assert not [p for p in folder.rglob("*.tmp") if p.parent.name == "s"]
    (run,) = (path.parent for path in outputs.rglob("result.json"))
    assert_same(run, experiment(tmp_path / "whole"))
