"""A run is a folder, a function of the choices: the same command finds its run again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mrpo_lab.errors import UserError
from mrpo_lab.files import write_parquet, write_whole

logger = logging.getLogger(__name__)

CELL = {
    "loss": "",
    "loss/link": "logistic",
    "loss/clip": "none",
    "weighting": "",
    "lambda": "fixed",
    "reference_set": "",
}
"""Groups that one part of a run's name is made of, with the options that go without saying."""
NAMED = {"dataset", "model", *CELL, "seed", "experiment", "sweep"}
"""Groups with a place in the name; an experiment and a sweep bring a name of their own."""
NO_CHANGE = (
    "outputs",
    "name",
    "threads",
    "tracker",
    "reference_set.gate",
    "reference_set.token_budget",
    "train.micro_batch_tokens",
    "train.token_budget",
    "train.checkpoint_every",
)
"""Configuration that cannot change a number of the run: no part of its identity."""

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "hydra-core")


def run_name(name: str, choices: Mapping[str, str | None], overrides: Sequence[str]) -> str:
    """``name/dataset/model/loss-weighting-references/seed``, with what else was chosen.

    ``choices``: option of each config group. ``overrides``: the command line's, as Hydra has them.
    """
    # A group taken away, as by ~loss, is refused when it is built.
    chosen = defaultdict(str, {group: str(option) for group, option in choices.items() if option})
    cell = "-".join(chosen[g] for g, silent in CELL.items() if chosen[g] not in ("", silent))
    values = {}
    for override in overrides:  # the last word on a key counts
        key, _, value = override.lstrip("+~").partition("=")
        if key not in NAMED and not key.startswith((*NO_CHANGE, "hydra")):
            values[key] = value
    suffix = _file_name(",".join(f"{key}={value}" for key, value in sorted(values.items())))
    seed = f"{chosen['seed']}__{suffix}" if suffix else chosen["seed"]
    return "/".join([name, chosen["dataset"], chosen["model"], cell, seed])


def _file_name(text: str) -> str:
    """``text`` fit for a folder's name: unusual characters and long texts end in a hash."""
    plain = re.sub(r"[^\w.,=+-]+", "-", text)
    if plain == text and len(text) <= 80:
        return text
    return f"{plain[:70]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: theirs -> ours`` for every leaf that can change a number and is not the same."""
    found = []
    for key in sorted({*ours, *theirs}):
        path, a, b = f"{prefix}{key}", ours.get(key), theirs.get(key)
        if path in NO_CHANGE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += difference(a, b, f"{path}.")
        else:
            found.append(f"{path}: {b!r} there, {a!r} here")
    return found


@dataclass
class Run:
    """The folder of one training run, written by one process at a time."""

    folder: Path
    name: str
    config: dict[str, Any]

    @classmethod
    def open(cls, outputs: Path, name: str, config: dict[str, Any]) -> Run:
        """The run that ``config`` asks for; nothing is written yet.

        Raises:
            UserError: it holds another configuration.
        """
        folder = outputs / name
        saved = folder / "config.yaml"
        if saved.exists():
            differing = difference(config, yaml.safe_load(saved.read_text()) or {})
            if differing:
                raise UserError(
                    f"{folder} holds a run with another configuration ({'; '.join(differing)}): "
                    "give this one a name of its own, name=NAME, or delete that folder"
                )
        return cls(folder, name, config)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other process writes the folder meanwhile.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self.folder} is being written by another process") from error
        except OSError as error:
            raise UserError(f"outputs: cannot write {self.folder}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()
            if not (self.folder / "config.yaml").exists():
                self._remove_empty()

    def _remove_empty(self) -> None:
        """A run that was refused before it began leaves no folders behind."""
        (self.folder / ".lock").unlink(missing_ok=True)
        with suppress(OSError):
            for folder in [self.folder, *self.folder.parents][: self.name.count("/") + 1]:
                folder.rmdir()

    @property
    def result(self) -> dict[str, Any] | None:
        """``result.json`` of a finished run; None while there is something left to do."""
        return finished(self.folder)

    def begin(self) -> None:
        """Write what was asked for, and add where it runs this time."""
        config = yaml.safe_dump(self.config, sort_keys=False)
        write_whole(self.folder / "config.yaml", config.encode())
        path = self.folder / "provenance.json"
        sessions = json.loads(path.read_text())["sessions"] if path.exists() else []
        self._write_json(path.name, {"sessions": [*sessions, provenance()]})
        (self.folder / "result.json").unlink(missing_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``; what is not finite becomes null, which JSON can say."""
        line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """All lines so far, whole ones only: a kill may have cut the last."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> list[dict[str, float]]:
        """Forget lines after ``step``, which will be run again; the lines that stay."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.folder / "metrics.jsonl", text.encode())
        return kept

    def write_alpha(self, slugs: Sequence[str]) -> None:
        """``alpha.parquet``: a row a step, a column a reference."""
        import pyarrow as pa

        lines = [line for line in self.metrics() if f"alpha/{slugs[0]}" in line]
        columns = {"step": [int(line["step"]) for line in lines]}
        table = pa.table(columns | {s: [line[f"alpha/{s}"] for line in lines] for s in slugs})
        write_parquet(self.folder / "alpha.parquet", table)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record the outcome; ``status: finished`` is what marks a run as done."""
        self._write_json("result.json", dict(result))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_whole(self.folder / name, (json.dumps(content, indent=2) + "\n").encode())


def finished(folder: Path) -> dict[str, Any] | None:
    """``result.json`` of a run's folder, if it says that the run is finished."""
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("status") == "finished" else None


def provenance() -> dict[str, Any]:
    """Code, libraries and hardware, enough to say later what produced a number."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed": bool(_git("status", "--porcelain")),
        },
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "host": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "job": cluster_job(),
    }


def cluster_job() -> dict[str, str] | None:
    """SLURM's name for this job, where it runs and how often it was started again."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "id": f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"],
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
