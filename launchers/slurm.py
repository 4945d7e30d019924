"""Sweeps on SLURM: arrays by resources, chained by ``afterok``, submitted with submitit."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from launchers.cluster import Cluster, checked
from launchers.job import SlurmJob
from launchers.nodes import read_nodes, refuse_impossible
from launchers.scores import billions
from launchers.sweep import Live, Sweep
from launchers.tasks import Gather, Score, Task, Train
from launchers.wording import counted
from mrpo_lab.errors import UserError

T = TypeVar("T")
K = TypeVar("K")

ROOT = Path(__file__).parents[1]
LIVE = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "SPECIAL_EXIT": "queued",
    "PREEMPTED": "queued",
    "RUNNING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "COMPLETING": "ending",
}
PLACE = ("partition", "account", "qos", "constraint", "gpu_type")
"""Settings of all jobs, which each kind of job may have its own of."""


@checked
class Resources:
    """What one job asks for, all its processes on one node."""

    timeout_min: int
    cpus: int
    """Of each process."""
    mem_gb: float
    gpus: int
    tasks: int = 1
    """Processes, which train one run together."""
    up_to_billions: float | None = None
    """Of scoring: parameters of the largest reference that this is enough for."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_type: str | None = None
    """As in ``gpu:a100:1``; null takes any."""


@checked
class Slurm(Cluster):
    """The keys of ``conf/hydra/launcher/slurm*.yaml``."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gpu_type: str | None
    setup: list[str]
    """Shell lines before each job."""
    python: str | None
    """Command for Python in a job; null is the interpreter that submits."""
    options: list[str]
    """Any other options of sbatch, as on its command line."""
    parallel: Annotated[int, Field(ge=1)]
    """Runs at once, all arrays together."""
    signal_delay_s: Annotated[int, Field(ge=0)]
    """Seconds before time is up at which a run saves and is requeued."""
    max_timeouts: Annotated[int, Field(ge=0)]
    """How often a run may go on after its time was up."""
    train: Resources
    score: Annotated[list[Resources], Field(min_length=1)]
    """By size of model; the first whose ``up_to_billions`` holds it."""
    gather: Resources
    billions: dict[str, float]
    """Sizes of references that neither their files nor their names tell, by slug."""

    blocking = False

    def check(self, scores: Sequence[Score]) -> None:
        if not shutil.which("sbatch"):
            raise UserError("there is no SLURM here (no sbatch): hydra/launcher=local runs sweeps")
        kinds = {"train": self.train, "gather": self.gather}
        for task in scores:
            kinds[f"score (for {task.slug})"] = self._resources(task)
        nodes = read_nodes()
        for kind, resources in kinds.items():
            refuse_impossible(kind, self._placed(resources), nodes)

    def submit(
        self,
        sweep: Sweep,
        scores: Sequence[Score],
        runs: Sequence[Train],
        gather: Gather,
        live: Mapping[str, Live],
    ) -> None:
        jobs = {gift: job.job for gift, job in live.items()}
        for resources, together in grouped(scores, self._resources):
            for task, job in self._arrays(sweep, together, resources, len(scores)):
                jobs.update(dict.fromkeys(task.gives, job))
        ends = []
        for after, waiting in grouped(runs, lambda run: waits(run, jobs)):
            for _, job in self._arrays(sweep, waiting, self.train, len(runs), afterok=after):
                ends.append(job.partition("_")[0])
        arrays = list(dict.fromkeys(ends))
        self._arrays(sweep, [gather], self.gather, 1, afterany=arrays)

    def _arrays(
        self,
        sweep: Sweep,
        tasks: Sequence[Task],
        resources: Resources,
        of: int,
        **after: Sequence[str],
    ) -> list[tuple[Task, str]]:
        """Submit tasks with the same resources; each with its job's id."""
        submitted = []
        for chunk in batched(tasks, max_array_size()):
            share = max(1, math.floor(self.parallel * len(chunk) / of))
            submitted += self._array(sweep, chunk, resources, share, after)
        return submitted

    def _array(
        self,
        sweep: Sweep,
        tasks: Sequence[Task],
        resources: Resources,
        at_once: int,
        after: Mapping[str, Sequence[str]],
    ) -> list[tuple[Task, str]]:
        import submitit

        folder = sweep.new_array(tasks, "slurm")
        executor = submitit.SlurmExecutor(folder / "log", self.max_timeouts, python=self.python)
        depends = ",".join(f"{kind}:{':'.join(jobs)}" for kind, jobs in after.items() if jobs)
        others = (option.lstrip("-").partition("=") for option in self.options)
        options = {"kill-on-invalid-dep": "yes", "requeue": True}
        options |= {key: value or True for key, _, value in others}
        executor.update_parameters(
            job_name=f"{sweep.name}.{folder.name}",
            setup=[f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}", *self.setup],
            signal_delay_s=self.signal_delay_s,
            array_parallelism=at_once,
            srun_args=["--kill-on-bad-exit=1"],
            stderr_to_stdout=True,
            wckey=None,
            additional_parameters=options,
            **({"dependency": depends} if depends else {}),
            **self._sbatch(resources),
        )
        try:
            with redirect_stderr(io.StringIO()), executor.batch():  # the error repeats it
                jobs = [executor.submit(SlurmJob(str(folder), i)) for i in range(len(tasks))]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"sbatch refused {counted(len(tasks), 'job')}: {said(error)}"
            ) from error
        return [(task, str(job.job_id)) for task, job in zip(tasks, jobs, strict=True)]

    def _resources(self, task: Score) -> Resources:
        size = billions(task.slug, task.path, self.billions)
        for entry in self.score:
            if entry.up_to_billions is None or size <= entry.up_to_billions:
                return entry
        raise UserError(
            f"hydra.launcher.score: no entry is for {task.slug} with {size:g} billion parameters "
            "(hydra.launcher.billions tells sizes)"
        )

    def _placed(self, resources: Resources) -> Resources:
        """With the settings of all jobs where it has none of its own."""
        return replace(resources, **{k: getattr(resources, k) or getattr(self, k) for k in PLACE})

    def _sbatch(self, resources: Resources) -> dict[str, Any]:
        """In submitit's words."""
        placed = self._placed(resources)
        wanted = {
            **{key: getattr(placed, key) for key in ("partition", "account", "qos", "constraint")},
            "time": placed.timeout_min,
            "mem": f"{math.ceil(1024 * placed.mem_gb)}M",
            "cpus_per_task": placed.cpus,
            "ntasks_per_node": placed.tasks,
        }
        if placed.gpus:
            kind = f"{placed.gpu_type}:" if placed.gpu_type else ""
            wanted["gpus_per_node"] = f"{kind}{placed.gpus}"
        return {key: value for key, value in wanted.items() if value is not None}


def grouped(tasks: Iterable[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    """Tasks with the same key, together, in the order they came."""
    groups: list[tuple[K, list[T]]] = []
    for task in tasks:
        value = key(task)
        same = [members for known, members in groups if known == value]
        if same:
            same[0].append(task)
        else:
            groups.append((value, [task]))
    return groups


def batched(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def waits(run: Train, jobs: Mapping[str, str]) -> list[str]:
    """Ids of the jobs that will give what the run needs."""
    return sorted({jobs[need] for need in run.needs if need in jobs})


def max_array_size() -> int:
    """Tasks that one array may have."""
    shown = slurm_says("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.M)
    return max(1, int(found[1])) if found else 1000


def queue(outputs: Path) -> list[Live]:
    """Tasks of this folder's sweeps that SLURM still holds, whoever submitted them."""
    arrays = {
        file.parent.name: file.parent for file in outputs.glob("sweeps/*/jobs/slurm-*/tasks.json")
    }
    if not arrays or not shutil.which("squeue"):  # looked at from elsewhere
        return []
    owners = {str(folder.stat().st_uid) for folder in arrays.values()} | {str(os.getuid())}
    how = ("-h", "-r", "-t", "all", "-u", ",".join(sorted(owners)), "-o", "%F|%K|%T|%r|%j")
    live = []
    for line in slurm_says("squeue", *how).splitlines():
        job, task, state, reason, name = line.split("|", 4)
        folder = arrays.get(name.rpartition(".")[2])
        if folder is not None and state in LIVE:
            index = int(task) if task.isdigit() else 0
            one = f"{job}_{task}" if task.isdigit() else job
            held = reason if "held" in reason.lower() else ""
            live.append(Live(folder, index, one, LIVE[state], held))
    return live


def cancel(tasks: Sequence[Live]) -> None:
    for some in range(0, len(tasks), 200):
        slurm_says("scancel", *(task.job for task in tasks[some : some + 200]))


def slurm_says(*command: str) -> str:
    """Standard output of one of SLURM's programs.

    Raises:
        UserError: it failed, as when the controller cannot be reached.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here: is this a SLURM cluster?") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{command[0]}: {said(error)}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]}: no answer in a minute") from error
    return done.stdout


def said(error: Exception) -> str:
    """What a program of SLURM complained about, in one line."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line for line in str(text).splitlines() if "error:" in line.lower()]
    return re.sub(r"^.*?error:\s*", "", lines[-1], flags=re.I) if lines else str(text).strip()
