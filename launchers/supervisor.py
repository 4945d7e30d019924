"""``python -m launchers.supervisor ARRAY N``: run the tasks of an array on this machine, N at once.

Every task runs in a forked process, so that one that dies takes nothing else with it. Without GPUs
the supervisor imports what training needs once, before it forks, so that tasks start at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from launchers.job import perform
from launchers.sweep import Record
from launchers.tasks import Gather, read_tasks
from mrpo_lab.progress import quiet_libraries

GRACE = 60
"""Seconds that a cancelled run has to save a checkpoint before it is killed."""
PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that a process gets when its parent dies."""


class Supervisor:
    """Runs the tasks of one array until none is left."""

    def __init__(self, array: Path, parallel: int) -> None:
        self.array, self.parallel = array, parallel
        self.tasks = read_tasks(array / "tasks.json")
        self.waiting = dict(enumerate(self.tasks))
        self.running: dict[int, tuple[int, int]] = {}
        """Process id to the index of its task and its slot, which chooses the GPU."""
        self.failed: set[str] = set()
        """Outputs that will not exist, because the task that produces them failed."""

    def work(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        while self.running or self.waiting:
            while (index := self.next_task()) is not None:
                self.start(index)
            if self.running:
                self.wait_for_one()

    def next_task(self) -> int | None:
        """The index of a task that can begin now; cancels tasks whose inputs will never exist."""
        if len(self.running) >= self.parallel:
            return None
        for index, task in list(self.waiting.items()):
            if lost := self.failed.intersection(task.inputs):
                self.cancel_waiting(index, f"{self.titles_producing(lost)} failed")
            elif isinstance(task, Gather):
                if not self.running and len(self.waiting) == 1:
                    return index
            elif not self.are_pending(task.inputs):
                return index
        return None

    def are_pending(self, inputs: Sequence[str]) -> bool:
        """Whether a task that has not ended yet produces one of ``inputs``."""
        unfinished = [*self.waiting, *(index for index, _ in self.running.values())]
        return any(name in self.tasks[index].outputs for index in unfinished for name in inputs)

    def titles_producing(self, outputs: set[str]) -> str:
        return ", ".join(t.title for t in self.tasks if outputs.intersection(t.outputs))

    def cancel_waiting(self, index: int, reason: str, state: str = "failed") -> None:
        """Record that a waiting task will not be started, and why."""
        task = self.waiting.pop(index)
        now = time.time()
        record = Record(
            title=task.title,
            state=state,
            job="",
            host=os.uname().nodename,
            gpus="",
            restarts=0,
            began=now,
            log="",
            ended=now,
            error=reason,
        )
        record.write(self.array / f"{index}.json")

    def start(self, index: int) -> None:
        """Fork a process for a waiting task."""
        slot = min(set(range(self.parallel)) - {slot for _, slot in self.running.values()})
        task = self.waiting.pop(index)
        sys.stdout.flush()
        process = os.fork()
        if process:
            print(f"{process}: {task.title}", flush=True)
            self.running[process] = (index, slot)
            return
        code = 1
        try:
            code = self.run_in_child(index, slot)
        finally:
            os._exit(code)

    def run_in_child(self, index: int, slot: int) -> int:
        """Perform the task in the forked process, its output in a file; return the exit code."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        out = os.open(self.array / "log" / f"{index}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if count := count_gpus():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % count]
        try:
            perform(self.array, index, leave=lambda: sys.exit(75))
        except SystemExit as exit_:
            return int(exit_.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def wait_for_one(self) -> None:
        """Wait until a running task ends; remember its outputs as failed unless it succeeded."""
        try:
            process, status = os.wait()
        except InterruptedError:
            return
        index, _ = self.running.pop(process)
        if code := os.waitstatus_to_exitcode(status):
            print(f"{process}: {self.tasks[index].title} ended with {code}", flush=True)
            self.failed.update(self.tasks[index].outputs)

    def stop(self, *_: object) -> None:
        """Cancel what is waiting; ask running tasks to save and exit, and kill them after GRACE."""
        for index in list(self.waiting):
            self.cancel_waiting(index, "cancelled before it began", "cancelled")
        for process in self.running:
            os.kill(process, signal.SIGUSR2)
        signal.signal(signal.SIGALRM, self.kill)
        signal.alarm(GRACE)

    def kill(self, *_: object) -> None:
        for process in self.running:
            os.kill(process, signal.SIGKILL)


def count_gpus() -> int:
    """Number of GPUs that this process may use.

    Asks ``nvidia-smi`` rather than CUDA: a CUDA context would not survive the supervisor's forks.
    """
    if shown := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(shown.split(","))
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(done.stdout.splitlines())


def main() -> None:
    quiet_libraries()
    if not count_gpus():
        # Once, for all tasks. Not where there are GPUs: some libraries start CUDA when they are
        # imported, which no fork survives.
        import mrpo_lab.experiment  # noqa: F401

    Supervisor(Path(sys.argv[1]), int(sys.argv[2])).work()


if __name__ == "__main__":
    main()
