"""The folder of a sweep: its runs, the jobs that were submitted, and the state of each run.

    OUTPUTS/sweeps/NAME/
        plan.json            the runs, the scores they need, the launcher's profile
        conf/DIGEST/         the configuration files as they were when the runs were dispatched
        jobs/UID/tasks.json  tasks that were submitted together, as one array
        jobs/UID/0.json      the record of the array's first task
        jobs/UID/log/        output of the tasks
        summary.json, .txt   the results, gathered

Runs are in their own folders, as those of single commands. Whether a run is finished is read from
its ``result.json``; whether a job is active, from the cluster; why it failed, from its record.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from launchers.tasks import Task, known_tasks, write_tasks
from mrpo_lab.errors import UserError
from mrpo_lab.runs.reading import RunView
from mrpo_lab.storage.checksums import DamagedError, read_json, without_checksum, write_json
from mrpo_lab.storage.files import is_locked

STATES = ("finished", "running", "queued", "failed", "dead", "damaged", "new")
"""States of a run. ``failed`` ended with an error; ``dead`` was killed or cancelled, or saved
itself and was not started again; ``damaged`` was finished, but a file of it is not as it was;
``new`` was never submitted."""
UNFINISHED = ("failed", "dead", "damaged", "new")
"""States of runs that are submitted when their sweep is dispatched again."""


@dataclass(frozen=True)
class ActiveJob:
    """A job that a cluster runs or will run."""

    array: Path
    """Folder of the array that the job's task belongs to."""
    index: int
    """Index of the task in the array."""
    job: str
    """The cluster's id of the job."""
    state: str
    """queued, running or ending."""
    hold_reason: str = ""
    """Why the job is on hold until someone releases it; empty if it is not."""


@dataclass
class Record:
    """How the last attempt at a task went."""

    title: str
    state: str
    """running, done, failed, cancelled, left (saved a checkpoint, to go on later), or unreadable
    (its file is damaged)."""
    job: str
    host: str
    gpus: str
    restarts: int
    began: float
    """Seconds since the epoch, as ``ended``."""
    log: str
    ended: float | None = None
    error: str = ""
    """One line."""
    traceback: str = ""

    def write(self, file: Path) -> None:
        write_json(file, asdict(self), bound=True)

    @classmethod
    def read(cls, file: Path) -> Record | None:
        """The record in ``file``; None if the task has not begun."""
        try:
            content = read_json(file, bound=True)
            return cls(**without_checksum(content)) if content else None
        except DamagedError as error:
            return cls("", "unreadable", "", "", "", 0, 0.0, "", error=f"record {error}")
        except TypeError:
            return cls("", "unreadable", "", "", "", 0, 0.0, "", error=f"{file}: not a record")


@dataclass
class Plan:
    """What a sweep consists of, over all commands that dispatched it."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a run to its ``overrides``, ``conf`` and the keys of its ``scores``."""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Key of scores to ``slug`` and ``path`` of the reference, and to ``overrides`` and ``conf``
    of a run that needs them."""
    profile: dict[str, Any] = field(default_factory=dict)
    """The launcher's settings at the last dispatch."""


@dataclass(frozen=True)
class RunState:
    """The state of a run in its sweep, with its last record."""

    state: str
    """One of ``STATES``."""
    record: Record | None = None
    job: str = ""
    damage: str = ""
    """What is wrong with the files of a run that was finished."""


@dataclass(frozen=True)
class Sweep:
    """The folder of a sweep, ``OUTPUTS/sweeps/NAME``."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def outputs(self) -> Path:
        """Folder below which the runs are."""
        return self.folder.parent.parent

    def owns(self, job: ActiveJob) -> bool:
        """Whether this sweep submitted the job, rather than another that has the same run."""
        return job.array.parent.parent == self.folder

    @property
    def plan(self) -> Plan:
        """What ``plan.json`` says.

        Raises:
            DamagedError: the file is damaged, or is that of another sweep.
        """
        file = self.folder / "plan.json"
        advice = "delete it and give the sweep's command again; its runs stay"
        try:
            return Plan(**without_checksum(read_json(file, advice, bound=True)))
        except TypeError as error:
            raise DamagedError(file, "it is not the plan of a sweep", advice) from error

    def write_plan(self, plan: Plan) -> None:
        for draft in self.folder.glob(".plan.json.*.tmp"):  # of a process that was killed
            draft.unlink(missing_ok=True)
        write_json(self.folder / "plan.json", asdict(plan), bound=True)

    @property
    def arrays(self) -> list[Path]:
        """Folders of the submitted arrays, the oldest first."""
        folders = [file.parent for file in self.folder.glob("jobs/*/tasks.json")]
        return sorted(folders, key=lambda folder: folder.name.rpartition("-")[2])

    def new_array(self, tasks: Sequence[Task], cluster: str) -> Path:
        """Make the folder of an array that is about to be submitted.

        It is written first because jobs in a queue are recognized by the folder's unique name.
        """
        uid = f"{cluster}-{time.time_ns() // 1000:x}{secrets.token_hex(2)}"
        folder = self.folder / "jobs" / uid
        folder.mkdir(parents=True)
        try:
            write_tasks(folder / "tasks.json", tasks)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def last_records(self) -> dict[str, Record | None]:
        """The last record of every task that was ever submitted, by the task's title."""
        records: dict[str, Record | None] = {}
        for array in self.arrays:
            for index, task in enumerate(known_tasks(array)):
                records[task.title] = Record.read(array / f"{index}.json")
        return records

    def run_states(self, active: Mapping[str, ActiveJob]) -> dict[str, RunState]:
        """The state of every run of the plan, by name.

        Args:
            active: jobs by their outputs. List them before calling this: a run that ends in between
                is then found to be finished.
        """
        records = self.last_records()
        return {
            name: self._run_state(name, active.get(f"run {name}"), records)
            for name in self.plan.runs
        }

    def _run_state(
        self, name: str, job: ActiveJob | None, records: Mapping[str, Record | None]
    ) -> RunState:
        record, run = records.get(name), RunView(self.outputs / name)
        if not run.damage and run.result:
            return RunState("finished", record)
        if job:
            begun = Record.read(job.array / f"{job.index}.json")
            if job.state != "ending" or begun is None or begun.state == "running":
                state = "queued" if job.state == "queued" else "running"
                return RunState(state, begun, job.job)
        if is_locked(self.outputs / name / ".lock"):
            return RunState("running", None, "started by hand")
        if run.damage:
            return RunState("damaged", record, damage=run.damage)
        if record is not None:
            return RunState("failed" if record.state == "failed" else "dead", record)
        return RunState("dead" if name in records else "new")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error while writing the folder of a sweep into one that says what to do.

    Raises:
        UserError: the disk is full, or the folder cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        for draft in folder.glob("conf/.*.tmp"):
            shutil.rmtree(draft, ignore_errors=True)
        # shutil.copytree collects the errors of its files, and has no errno of its own.
        reason = error.strerror or str(error.args[0][0][-1] if error.args else error)
        raise UserError(
            f"outputs: cannot write {folder}: {reason}; the same command goes on once it can be "
            "written"
        ) from error


@contextmanager
def dispatch_lock(outputs: Path) -> Iterator[None]:
    """Let one process at a time decide which jobs are missing below ``outputs``.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = outputs / "sweeps"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_sweeps(outputs: Path) -> list[Sweep]:
    """All sweeps below ``outputs``, the one that was dispatched last at the end."""
    files = sorted(outputs.glob("sweeps/*/plan.json"), key=lambda file: file.stat().st_mtime)
    return [Sweep(file.parent) for file in files]


def by_output(active: Iterable[ActiveJob]) -> dict[str, ActiveJob]:
    """Map every output that an active job will produce to the job."""
    jobs = list(active)
    tasks = {array: known_tasks(array) for array in {job.array for job in jobs}}
    found = {}
    for job in jobs:
        for task in tasks[job.array][job.index : job.index + 1]:  # none if the file is damaged
            found.update(dict.fromkeys(task.outputs, job))
    return found
