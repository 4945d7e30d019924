"""A sweep's folder: what it asks for, what was submitted, and how far each of its runs is.

    OUTPUTS/sweeps/NAME/
        plan.json            the runs, the scores they need, the launcher's profile
        conf/DIGEST/         the configuration files they were asked for with
        jobs/UID/tasks.json  what was submitted together, in the order of the array
        jobs/UID/0.json      what became of the first of them
        jobs/UID/log/        what they printed
        summary.json, .txt   the results, gathered

Runs are in their own folders, as ever. Whether one is finished, its ``result.json`` says; whether
a job is alive, the cluster; what it died of, the record beside its task.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from launchers.tasks import Task, read_tasks
from mrpo_lab.errors import UserError
from mrpo_lab.runs.reading import finished
from mrpo_lab.storage.files import write_whole

STATES = ("finished", "running", "queued", "failed", "dead", "new")
"""``failed`` ended with an error; ``dead`` was killed or cancelled; ``new`` was never submitted."""
UNFINISHED = ("failed", "dead", "new")


@dataclass(frozen=True)
class Live:
    """A task that a cluster still holds."""

    array: Path
    index: int
    job: str
    state: str
    """queued, running or ending."""
    held: str = ""
    """Why it stays queued until someone releases it."""


@dataclass
class Record:
    """What became of one task the last time it was started."""

    title: str
    state: str
    """running, done, failed, cancelled, or left: saved, to go on later."""
    job: str
    host: str
    gpus: str
    restarts: int
    began: float
    log: str
    ended: float | None = None
    error: str = ""
    """One line."""
    traceback: str = ""

    def write(self, file: Path) -> None:
        write_whole(file, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, file: Path) -> Record | None:
        return cls(**json.loads(file.read_text())) if file.exists() else None


@dataclass
class Plan:
    """What a sweep asks for, over all commands that dispatched it."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name to its overrides, ``conf`` and keys of ``scores``."""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Key to slug, path, and the overrides and ``conf`` of a run that needs them."""
    profile: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """How far a run is."""

    state: str
    record: Record | None = None
    job: str = ""


@dataclass(frozen=True)
class Sweep:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def outputs(self) -> Path:
        return self.folder.parent.parent

    def submitted(self, job: Live) -> bool:
        """Whether it was this sweep, and no other that asks for the same, that submitted it."""
        return job.array.parent.parent == self.folder

    @property
    def plan(self) -> Plan:
        file = self.folder / "plan.json"
        return Plan(**json.loads(file.read_text())) if file.exists() else Plan()

    def keep(self, plan: Plan) -> None:
        write_whole(self.folder / "plan.json", json.dumps(asdict(plan), indent=1).encode())

    @property
    def arrays(self) -> list[Path]:
        """Folders of what was submitted, the latest last."""
        folders = [file.parent for file in self.folder.glob("jobs/*/tasks.json")]
        return sorted(folders, key=lambda folder: folder.name.rpartition("-")[2])

    def new_array(self, tasks: Sequence[Task], cluster: str) -> Path:
        """Written before it is submitted: its name in the queue then says what it is."""
        uid = f"{cluster}-{time.time_ns() // 1000:x}{secrets.token_hex(2)}"
        folder = self.folder / "jobs" / uid
        folder.mkdir(parents=True)
        content = {"tasks": [task.as_json() for task in tasks]}
        write_whole(folder / "tasks.json", json.dumps(content, indent=1).encode())
        return folder

    def last_records(self) -> dict[str, Record | None]:
        """Title of each task that was ever submitted to what became of it the last time."""
        records: dict[str, Record | None] = {}
        for array in self.arrays:
            for index, task in enumerate(read_tasks(array / "tasks.json")):
                records[task.title] = Record.read(array / f"{index}.json")
        return records

    def standings(self, live: Mapping[str, Live]) -> dict[str, Standing]:
        """Of every run of the plan. ``live``: by what the task gives, read before this is called,
        so that a run that ends meanwhile is seen as finished."""
        records = self.last_records()
        return {
            name: self._standing(name, live.get(f"run {name}"), records) for name in self.plan.runs
        }

    def _standing(
        self, name: str, live: Live | None, records: Mapping[str, Record | None]
    ) -> Standing:
        record = records.get(name)
        if finished(self.outputs / name):
            return Standing("finished", record)
        if live:
            begun = Record.read(live.array / f"{live.index}.json")
            if live.state != "ending" or begun is None or begun.state == "running":
                state = "queued" if live.state == "queued" else "running"
                return Standing(state, begun, live.job)
        if is_locked(self.outputs / name / ".lock"):
            return Standing("running", None, "started by hand")
        if record is not None:
            return Standing("failed" if record.state == "failed" else "dead", record)
        return Standing("dead" if name in records else "new")


@contextmanager
def dispatching(outputs: Path) -> Iterator[None]:
    """One process at a time decides what is missing."""
    folder = outputs / "sweeps"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"outputs: cannot write {folder}: {error.strerror}") from error
    with FileLock(folder / ".lock"):
        yield


def sweeps(outputs: Path) -> list[Sweep]:
    """All of a folder's, the one that was dispatched last at the end."""
    files = sorted(outputs.glob("sweeps/*/plan.json"), key=lambda file: file.stat().st_mtime)
    return [Sweep(file.parent) for file in files]


def by_gift(live: Iterable[Live]) -> dict[str, Live]:
    """What each live task gives, to the task."""
    tasks: dict[Path, list[Task]] = {}
    found = {}
    for job in live:
        if job.array not in tasks:
            tasks[job.array] = read_tasks(job.array / "tasks.json")
        found.update(dict.fromkeys(tasks[job.array][job.index].gives, job))
    return found


def is_locked(file: Path) -> bool:
    """Whether a process that this machine knows of holds the lock."""
    if not file.exists():
        return False
    descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
