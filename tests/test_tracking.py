"""W&B shows what the local files say, offline too, and writes no secret down."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import wandb
import wandb_files
import yaml
from harness import TINY, read_json, train_py

from mrpo_lab.data.dataset import Dataset
from mrpo_lab.runs.tracking import LocalTracker, WandbTracker, wandb_mode

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

KEY = "0123456789abcdef" * 2 + "secret42"


@pytest.fixture(autouse=True)
def fresh_wandb() -> Iterator[None]:
    """W&B reads the environment once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


def offline_file(folder: Path) -> Path:
    """The one file that ``wandb sync`` would send, once W&B's own process has written it."""
    wandb.teardown()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path


def logged(
    folder: Path, lines: list[dict[str, float]], past: Any = (), failed: bool = False
) -> list[dict[str, Any]]:
    """What W&B has of a session that begins with ``past`` and logs ``lines``."""
    tracker = WandbTracker("project", None, "group", ["a", "b"])
    tracker.start(folder, "name/of/run", {"loss": {"beta": 0.1}}, past)
    for line in lines:
        tracker.log(int(line["step"]), {k: v for k, v in line.items() if k != "step"})
    tracker.finish({"status": "over", "references": {"qwen2.5-0.5b": {"alpha": 0.5}}}, failed)
    return wandb_files.history(offline_file(folder))


@pytest.mark.parametrize("mode", [None, "offline"], ids=["no key", "WANDB_MODE=offline"])
def test_offline_run_says_what_the_local_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    outcome = train_py(*TINY, "tracker=wandb", "weighting=tsw", f"outputs={tmp_path}", "name=a/b")
    assert outcome.code == 0
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    name = folder.relative_to(tmp_path).as_posix()
    path = offline_file(folder)

    lines = wandb_files.read_jsonl(folder / "metrics.jsonl")
    assert wandb_files.history(path) == lines
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert wandb_files.config(path) == yaml.safe_load((folder / "config.yaml").read_text())
    finished, summary = read_json(folder / "result.json"), wandb_files.summary(path)
    assert {key: summary[key] for key in finished} == finished
    for kept in ("provenance.json", "test_pairs.parquet"):
        assert (path.parent / "files" / kept).read_bytes() == (folder / kept).read_bytes()
        assert kept in wandb_files.saved(path)
    run = wandb_files.run(path)
    assert (run.project, run.run_group, run.display_name) == ("mrpo-lab", "a/b", name)

    said = [line for line in outcome.out.splitlines() if "W&B" in line or "wandb" in line]
    assert len(said) == 1
    assert f"wandb sync {folder}/wandb/offline-run-*" in said[0]
    assert (mode or "no API key") in said[0]
    assert "wandb" not in outcome.err


def test_numbers_names_and_outcome_are_kept_as_they_are(tmp_path: Path) -> None:
    lines = [
        {
            "step": step,
            "alpha/qwen2.5-0.5b": step / 7,
            "tiny": 1e-300,
            **{f"k{i}": 0.1 * i for i in range(40)},
        }
        for step in range(120)
    ]
    assert logged(tmp_path, lines, failed=True) == lines
    path = offline_file(tmp_path)
    assert path.stat().st_size > 2 * wandb_files.BLOCK  # records across blocks were read
    assert wandb_files.summary(path)["references"] == {"qwen2.5-0.5b": {"alpha": 0.5}}
    assert wandb_files.exit_code(path) == 1
    assert list(wandb_files.run(path).tags) == ["a", "b"]


def test_resumed_run_has_each_step_once_under_the_same_id(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1.0 / (1 + step)} for step in range(6)]
    logged(tmp_path, lines[:5])
    first = wandb_files.run(offline_file(tmp_path))
    # Interrupted after step 4, resumed from the checkpoint of step 2: 3 and 4 are run again.
    assert logged(tmp_path, lines[3:], past=lines[:3]) == lines
    assert wandb_files.run(offline_file(tmp_path)).run_id == first.run_id

    other = WandbTracker()
    other.start(tmp_path, "name/of/another/run", {}, [])
    other.finish({})
    assert wandb_files.run(offline_file(tmp_path)).run_id != first.run_id


def test_what_was_not_finite_stays_so(tmp_path: Path) -> None:
    (past, live) = logged(tmp_path, [{"step": 1, "cv": math.nan}], past=[{"step": 0, "cv": None}])
    assert math.isnan(past["cv"])
    assert math.isnan(live["cv"])


def test_runs_of_one_sweep_share_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep")
    logged(tmp_path, [])
    assert wandb_files.run(offline_file(tmp_path)).run_group == "sweep"


def test_mode_is_what_is_asked_for_or_what_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode() == ("offline", "no API key (wandb login)")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    assert wandb_mode() == ("offline", "127.0.0.1 cannot be reached")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode()[0] == "online"


def test_key_without_a_network_is_kept_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level("INFO"):
        assert logged(tmp_path, [{"step": 0, "loss": 1.0}]) == [{"step": 0, "loss": 1.0}]
    assert "127.0.0.1 cannot be reached, so this run is kept offline" in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "debug.log" for path in files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_trackers_that_keep_nothing_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for tracker in (LocalTracker(), WandbTracker()):
        tracker.start(tmp_path, "run", {}, [{"step": 0, "loss": 1.0}])
        tracker.log(1, {"loss": 0.5})
        tracker.finish({"status": "finished"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")]
)
def test_run_with_wandb_disabled_ends_as_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    outcome = train_py(*TINY, "tracker=wandb", f"outputs={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "result.json" in outcome.out.splitlines()[-1]
    assert not list(tmp_path.rglob("wandb"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WANDB_MODE": "DISABLED"}, "tracker: WANDB_MODE is 'DISABLED': choose from online"),
        ({"WANDB_MODE": "online"}, "tracker: W&B cannot be used: "),
        ({"WANDB_MODE": "run"}, "tracker: W&B cannot be used: "),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "tracker: W&B cannot be used: "),
        ({"WANDB_BASE_URL": "no server"}, "tracker: W&B refuses "),
        ({"WANDB_CONSOLE": "x"}, "tracker: W&B refuses the setting "),
    ],
)
def test_unusable_wandb_is_refused_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with mock.patch.object(Dataset, "read", side_effect=AssertionError):
        outcome = train_py(*TINY, "tracker=wandb", f"outputs={tmp_path}")
    assert outcome.code == 2, outcome
    assert outcome.error.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []
