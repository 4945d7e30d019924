"""Sweeps on SLURM: arrays of jobs with equal resources, chained by ``afterok``.

Submitted with submitit.
"""

from __future__ import annotations

import io
import math
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
from launchers.nodes import Resources, read_nodes, refuse_impossible
from launchers.scores import billions_of_parameters
from launchers.slurm_commands import error_line, max_array_size
from launchers.sweep import ActiveJob, Sweep
from launchers.tasks import Gather, Score, Task, Train
from mrpo_lab.errors import UserError
from mrpo_lab.wording import format_count

T = TypeVar("T")
K = TypeVar("K")

ROOT = Path(__file__).parents[1]
PLACEMENT = ("partition", "account", "qos", "constraint", "gpu_type")
"""Settings of all jobs that each kind of job may override."""


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
    """Command that starts Python in a job; null is the interpreter that submits."""
    options: list[str]
    """Any other options of sbatch, as on its command line."""
    parallel: Annotated[int, Field(ge=1)]
    """Number of runs at once, over all arrays of one command."""
    signal_delay_s: Annotated[int, Field(ge=0)]
    """Seconds before time is up at which a run saves and is requeued."""
    max_timeouts: Annotated[int, Field(ge=0)]
    """How often a run may be requeued because its time was up."""
    train: Resources
    score: Annotated[list[Resources], Field(min_length=1)]
    """By size of the reference: the first entry whose ``up_to_billions`` is enough counts."""
    gather: Resources
    billions: dict[str, float]
    """Billions of parameters of references whose files and names do not tell, by slug."""

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
        active: Mapping[str, ActiveJob],
    ) -> None:
        jobs = {output: job.job for output, job in active.items()}
        for resources, together in grouped(scores, self._resources):
            for task, job in self._arrays(sweep, together, resources, len(scores)):
                jobs.update(dict.fromkeys(task.outputs, job))
        started = []
        for after, waiting in grouped(runs, lambda run: jobs_before(run, jobs)):
            for _, job in self._arrays(sweep, waiting, self.train, len(runs), afterok=after):
                started.append(job.partition("_")[0])
        arrays = list(dict.fromkeys(started))
        self._arrays(sweep, [gather], self.gather, 1, afterany=arrays)

    def _arrays(
        self,
        sweep: Sweep,
        tasks: Sequence[Task],
        resources: Resources,
        total: int,
        **after: Sequence[str],
    ) -> list[tuple[Task, str]]:
        """Submit tasks with equal resources in as many arrays as the cluster needs.

        Args:
            total: number of tasks of this kind in all; the arrays share ``parallel`` in proportion.
            after: dependencies, as ``afterok=[job ids]``.

        Returns:
            Each task with the id of its job.
        """
        submitted = []
        for chunk in batched(tasks, max_array_size()):
            share = max(1, math.floor(self.parallel * len(chunk) / total))
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
        import submitit  # takes 0.1 s, which commands that submit nothing need not wait for

        folder = sweep.new_array(tasks, "slurm")
        executor = submitit.SlurmExecutor(folder / "log", self.max_timeouts, python=self.python)
        depends = ",".join(f"{kind}:{':'.join(jobs)}" for kind, jobs in after.items() if jobs)
        more = (option.lstrip("-").partition("=") for option in self.options)
        options = {"kill-on-invalid-dep": "yes", "requeue": True}
        options |= {key: value or True for key, _, value in more}
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
            with redirect_stderr(io.StringIO()), executor.batch():  # the error has the same text
                jobs = [executor.submit(SlurmJob(str(folder), i)) for i in range(len(tasks))]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"sbatch refused {format_count(len(tasks), 'job')}: {error_line(error)}"
            ) from error
        return [(task, str(job.job_id)) for task, job in zip(tasks, jobs, strict=True)]

    def _resources(self, task: Score) -> Resources:
        size = billions_of_parameters(task.slug, task.path, self.billions)
        for entry in self.score:
            if entry.up_to_billions is None or size <= entry.up_to_billions:
                return entry
        raise UserError(
            f"hydra.launcher.score: no entry is for {task.slug} with {size:g} billion parameters "
            "(hydra.launcher.billions tells sizes)"
        )

    def _placed(self, resources: Resources) -> Resources:
        """Fill in the settings of all jobs that ``resources`` does not override."""
        return replace(
            resources, **{key: getattr(resources, key) or getattr(self, key) for key in PLACEMENT}
        )

    def _sbatch(self, resources: Resources) -> dict[str, Any]:
        """The parameters of submitit's ``SlurmExecutor`` that ask for ``resources``."""
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
    """Group tasks by equal keys; groups and their members keep the order they came in."""
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
    """Split tasks into consecutive parts of at most ``size``."""
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def jobs_before(run: Train, jobs: Mapping[str, str]) -> list[str]:
    """Ids of the jobs that will produce inputs of the run, given each output's job."""
    return sorted({jobs[name] for name in run.inputs if name in jobs})
