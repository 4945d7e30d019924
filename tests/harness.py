"""Small runs of the real command line and of the real experiment, in this process.

A new process spends five seconds on imports.
"""

import io
import json
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from launchers.cluster import Cluster
from launchers.composing import Composer
from launchers.grid import expand
from launchers.profiles import build_cluster
from mrpo_lab.composition import open_hydra, without_hydra
from mrpo_lab.experiment import run_experiment
from mrpo_lab.training import state_file as checkpoint

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SLUGS = ("tiny-qwen2", "tiny-llama", "tiny-neox")
TINY = (
    "experiment=quickstart",
    f"reference_set.use=[{','.join(SLUGS)}]",
    "reference_set.gate=warn",
    "dataset.pairs=40",
    "dataset.val=8",
    "dataset.test=8",
    "protocol.batch_size=5",
    "protocol.probe_size=5",
    "train.evaluations=2",
    "train.checkpoint_every=2",
)
"""24 training pairs in 5 steps, the last of 4 pairs; K = 3, the anchor first."""


class Opened:
    """The configuration folder, as a command line that begins with ``overrides`` sees it."""

    def __init__(self, *overrides: str) -> None:
        hydra = open_hydra(CONF)
        self.loader = hydra.config_loader
        self.master = hydra.compose_config("config", list(overrides), RunMode.RUN)
        self.composer = Composer(self.loader, self.master)

    def runs(self, *arguments: str) -> list[list[str]]:
        return expand(self.master.hydra.sweeper.grids, arguments, self.loader)

    def cluster(self) -> Cluster:
        """The cluster that the chosen launcher dispatches to."""
        settings = OmegaConf.to_container(self.master.hydra.launcher, resolve=True)
        assert isinstance(settings, dict)
        kind = str(settings.pop("_target_")).rpartition(".")[2].removesuffix("Launcher").lower()
        profile = {str(key): value for key, value in settings.items()}
        return build_cluster({"cluster": kind, **profile})


@dataclass(frozen=True)
class Outcome:
    """What somebody at a terminal sees."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr beside bars: no warning or traceback may be there."""
        lines = [line for line in self.err.splitlines() if line and "%|" not in line]
        assert len(lines) == 1, self.err
        return lines[0]


def train_py(*arguments: str) -> Outcome:
    """``python train.py ARGUMENTS``, its logging undone afterwards."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with (
        mock.patch.object(sys, "argv", ["train.py", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
    return Outcome(code, out.getvalue(), err.getvalue())


def said_by(script: str, *arguments: str, **environment: str) -> Any:
    """The last line that a Python ``script`` prints as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compose(*overrides: str) -> DictConfig:
    """The configuration that ``train.py OVERRIDES`` would run."""
    cfg = open_hydra(CONF).compose_config("config", list(overrides), RunMode.RUN)
    return without_hydra(cfg)


def experiment(outputs: Path, *overrides: str) -> Path:
    """The folder of a small run; the same call finds the same run again."""
    run_experiment(compose(*TINY, f"outputs={outputs}", *overrides), "run")
    return outputs / "run"


def only_run(outputs: Path) -> Path:
    (folder,) = (path.parent for path in outputs.rglob("config.yaml"))
    return folder


class Killed(BaseException):
    """No ``except Exception`` sees it: the process is as good as gone."""


@contextmanager
def killed(owner: Any, name: str, call: int, when: str = "before") -> Iterator[None]:
    """Die at the ``call``-th call of ``owner.name``, before or after it has done its work."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            raise Killed
        result = real(*args, **kwargs)
        if calls == call:
            raise Killed
        return result

    with mock.patch.object(owner, name, dying), pytest.raises(Killed):
        yield


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def metrics(folder: Path) -> list[dict[str, float]]:
    """Lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    """``result.json`` without what depends on the clock and the machine, checksums included."""
    costs = ["wall_seconds", "pairs_per_second", "setup_seconds", "peak_memory_gib"]
    costs += ["files", "checksum"]
    return {k: v for k, v in read_json(folder / "result.json").items() if k not in costs}


def equal(one: Any, other: Any) -> bool:
    """Of states: nested dicts and lists with tensors in them."""
    if isinstance(one, Tensor):
        return bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def assert_same(one: Path, other: Path) -> None:
    """All that a run leaves behind and that no clock decides."""
    assert metrics(one) == metrics(other)
    assert result(one) == result(other)
    ours, theirs = (
        {
            path.relative_to(run): path.read_bytes()
            for path in [*run.glob("*.parquet"), *run.glob("adapter/**/*")]
            if path.is_file()
        }
        for run in (one, other)
    )
    assert ours.keys() == theirs.keys()
    assert [path for path in ours if ours[path] != theirs[path]] == []
    left, right = (run / "checkpoint" / "state.safetensors" for run in (one, other))
    states = [checkpoint.load_state(path) for path in (left, right)]
    for key in ("optimizer", "scheduler", "weighting", "lambda", "trainable"):
        assert equal(states[0][key], states[1][key]), key


def close(left: Sequence[dict[str, float]], right: Sequence[dict[str, float]], by: float) -> bool:
    """Whether two runs logged the same keys and, up to ``by``, the same numbers."""
    assert [line.keys() for line in left] == [line.keys() for line in right]
    pairs = ((a[k], b[k]) for a, b in zip(left, right, strict=True) for k in a)
    return all(a == pytest.approx(b, abs=by, rel=by) for a, b in pairs)


def replaced(model: nn.Module) -> list[str]:
    """Names of the layers whose forward pass is this project's own."""
    own = "mrpo_lab.scoring.kernels."
    return [
        n for n, layer in model.named_modules() if type(layer).forward.__module__.startswith(own)
    ]
