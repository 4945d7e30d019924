"""Sweeps on this machine: a process in the background that runs tasks N at a time.

It forks for every task, which takes nothing down with it when it dies. Without GPUs it imports what
training needs once, so that tasks start in no time.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from launchers.cluster import Cluster, checked
from launchers.sweep import Live, Record, Sweep, is_locked
from launchers.tasks import Gather, Score, Train, read_tasks

ROOT = Path(__file__).parents[1]
LOCK = ".supervisor"
GRACE = 60.0
"""Seconds that a cancelled run has to save itself."""
PR_SET_PDEATHSIG = 1


@checked
class Local(Cluster):
    """The keys of ``conf/hydra/launcher/local.yaml``."""

    parallel: Annotated[int, Field(ge=1)] | None
    """Runs at once; null is one for each GPU, or each core where there is none."""
    threads: Annotated[int, Field(ge=1)] | None
    """CPU threads of each; null shares the cores out."""
    blocking: bool

    def check(self, scores: Sequence[Score]) -> None:
        """All that it asks for is here."""

    def submit(
        self,
        sweep: Sweep,
        scores: Sequence[Score],
        runs: Sequence[Train],
        gather: Gather,
        live: Mapping[str, Live],
    ) -> None:
        """One array, worked off by a process that outlives this one. Scores that others are
        computing need no waiting here: the store makes a run wait for them."""
        cores = len(os.sched_getaffinity(0))
        parallel = self.parallel or gpus() or cores
        threads = self.threads or max(1, cores // parallel)
        folder = sweep.new_array([*scores, *runs, gather], "local")
        (folder / "log").mkdir()
        # The lock is handed on, open: at no moment does the array look abandoned.
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (folder / "log" / "supervisor.out").open("w") as out:
            started = subprocess.Popen(
                [sys.executable, "-m", "launchers.local", str(folder), str(parallel)],
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ":".join(places)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=[lock],
                start_new_session=True,
            )
        os.write(lock, f"{started.pid}\n".encode())
        os.close(lock)


class Supervisor:
    """Works off one array."""

    def __init__(self, array: Path, parallel: int) -> None:
        self.array, self.parallel = array, parallel
        self.tasks = read_tasks(array / "tasks.json")
        self.waiting = dict(enumerate(self.tasks))
        self.running: dict[int, tuple[int, int]] = {}
        """Process to its task and the place it takes."""
        self.failed: set[str] = set()
        """What will not be given."""

    def work(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        while self.running or self.waiting:
            while (index := self.next()) is not None:
                self.start(index)
            if self.running:
                self.reap()

    def next(self) -> int | None:
        """A task that may begin; those that no longer can are struck off."""
        if len(self.running) >= self.parallel:
            return None
        for index, task in list(self.waiting.items()):
            if lost := self.failed.intersection(task.needs):
                self.strike(index, f"{self.whose(lost)} failed")
            elif isinstance(task, Gather):
                if not self.running and len(self.waiting) == 1:
                    return index
            elif not self.pending(task.needs):
                return index
        return None

    def pending(self, needs: Sequence[str]) -> bool:
        unfinished = [*self.waiting, *(index for index, _ in self.running.values())]
        return any(need in self.tasks[index].gives for index in unfinished for need in needs)

    def whose(self, lost: set[str]) -> str:
        return ", ".join(t.title for t in self.tasks if lost.intersection(t.gives))

    def strike(self, index: int, why: str, state: str = "failed") -> None:
        """A task will not be started."""
        task = self.waiting.pop(index)
        now, host = time.time(), os.uname().nodename
        record = Record(task.title, state, "", host, "", 0, now, "", now, why)
        record.write(self.array / f"{index}.json")

    def start(self, index: int) -> None:
        place = min(set(range(self.parallel)) - {place for _, place in self.running.values()})
        task = self.waiting.pop(index)
        sys.stdout.flush()
        process = os.fork()
        if process:
            print(f"{process}: {task.title}", flush=True)
            self.running[process] = (index, place)
            return
        code = 1
        try:
            code = self.child(index, place)
        finally:
            os._exit(code)

    def child(self, index: int, place: int) -> int:
        """In the new process: the task, its output in a file of its own."""
        from launchers.job import perform

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        out = os.open(self.array / "log" / f"{index}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if count := gpus():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % count]
        try:
            perform(self.array, index, leave=lambda: sys.exit(75))
        except SystemExit as left:
            return int(left.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            return 1
        return 0

    def reap(self) -> None:
        try:
            process, status = os.wait()
        except InterruptedError:
            return
        index, _ = self.running.pop(process)
        if code := os.waitstatus_to_exitcode(status):
            print(f"{process}: {self.tasks[index].title} ended with {code}", flush=True)
            self.failed.update(self.tasks[index].gives)

    def stop(self, *_: object) -> None:
        """Ask every run to save and leave, then make it."""
        for index in list(self.waiting):
            self.strike(index, "cancelled before it began", "cancelled")
        for process in self.running:
            os.kill(process, signal.SIGUSR2)
        signal.signal(signal.SIGALRM, self.kill)
        signal.alarm(int(GRACE))

    def kill(self, *_: object) -> None:
        for process in self.running:
            os.kill(process, signal.SIGKILL)


def queue(outputs: Path) -> list[Live]:
    """Tasks of this folder's sweeps that a process on this machine works off."""
    live = []
    for lock in outputs.glob(f"sweeps/*/jobs/local-*/{LOCK}"):
        if not holds(lock.parent):
            continue
        for index, _ in enumerate(read_tasks(lock.parent / "tasks.json")):
            record = Record.read(lock.parent / f"{index}.json")
            if record is None or record.state == "running":
                state = "running" if record else "queued"
                live.append(Live(lock.parent, index, record.job if record else "", state))
    return live


def holds(array: Path) -> bool:
    """Whether some process still works off the array."""
    return is_locked(array / LOCK)


def cancel(tasks: Sequence[Live]) -> None:
    """Stop whole arrays, whose runs cannot be taken out alone, and wait until they have."""
    arrays = {task.array for task in tasks}
    for array in arrays:
        os.kill(int((array / LOCK).read_text()), signal.SIGTERM)
    while any(holds(array) for array in arrays):
        time.sleep(0.1)


def gpus() -> int:
    """GPUs of this machine, asked for without a CUDA context, which no fork would survive."""
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
    from mrpo_lab.progress import quiet_libraries

    quiet_libraries()
    if not gpus():  # some libraries begin with CUDA when imported, which no fork survives
        import mrpo_lab.experiment  # noqa: F401  # once, for all tasks

    Supervisor(Path(sys.argv[1]), int(sys.argv[2])).work()


if __name__ == "__main__":
    main()
