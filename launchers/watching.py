"""Show how far a sweep is, once or until it ends."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from rich.live import Live
from rich.text import Text

from launchers.queues import cancel, queue
from launchers.sweep import STATES, ActiveJob, Record, RunState, Sweep, by_output
from launchers.tasks import known_tasks
from mrpo_lab.console import TerminalConsole, show
from mrpo_lab.wording import format_count, format_duration

INTERVAL = 2.0
"""Seconds between two looks at a sweep that is watched."""
MOST_RUNNING = 12
"""Running runs that are listed by name; the others are counted."""
STYLES = {"failed": "red", "dead": "red", "damaged": "red", "finished": "green", "running": "cyan"}
"""Colors of states on a terminal."""


def watch(sweep: Sweep, cancel_on_interrupt: bool = False) -> bool:
    """Show the sweep's status until none of its jobs is left.

    A terminal has the whole status, live; elsewhere its first line is printed when it changes.

    Args:
        cancel_on_interrupt: Ctrl-C cancels the sweep's jobs, rather than only the watching.

    Returns:
        Whether all runs are finished.
    """
    live = Live(console=TerminalConsole(), auto_refresh=False) if sys.stdout.isatty() else None
    printed = ""
    try:
        with live or nullcontext():
            while True:
                active = active_jobs(sweep)
                states = sweep.run_states(by_output(active))
                lines = status_lines(sweep, states, active)
                counts = lines[0].partition("; ")[0]  # without the time left, which always changes
                if live:
                    live.update(styled(lines), refresh=True)
                elif counts != printed:
                    show(lines[0])
                    printed = counts
                if not active:
                    break
                time.sleep(INTERVAL)
    except KeyboardInterrupt:
        if cancel_on_interrupt:
            print("\nstopping: runs save themselves, and the same command goes on with them")
            cancel([job for job in active_jobs(sweep) if sweep.owns(job)])
        raise
    return all(run.state == "finished" for run in states.values())


def styled(lines: Sequence[str]) -> Text:
    """Status lines for a terminal, with colored states."""
    text = Text("\n".join(lines))
    for state, style in STYLES.items():
        text.highlight_words([state], style)
    return text


def show_status(sweep: Sweep) -> None:
    """Print how far the sweep is and what went wrong."""
    active = active_jobs(sweep)
    show(styled(status_lines(sweep, sweep.run_states(by_output(active)), active)))


def active_jobs(sweep: Sweep) -> list[ActiveJob]:
    """The sweep's active jobs, and those of other sweeps that produce its runs or scores."""
    plan = sweep.plan
    wanted = {f"run {name}" for name in plan.runs} | {f"scores {key}" for key in plan.scores}
    active = queue(sweep.outputs)
    concerned = {id(job) for output, job in by_output(active).items() if output in wanted}
    return [job for job in active if id(job) in concerned or sweep.owns(job)]


def status_lines(
    sweep: Sweep, states: Mapping[str, RunState], active: Sequence[ActiveJob]
) -> list[str]:
    """A line of counts, then lines on scores and runs that are running or went wrong."""
    counts = Counter(run.state for run in states.values())
    parts = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    left = seconds_left(states)
    eta = f"; about {format_duration(left)} left" if left is not None else ""
    return [
        f"{sweep.name}: {format_count(len(states), 'run')}: {parts}{eta}",
        *scoring_lines(sweep, active),
        *running_lines(states),
        *hold_lines(active),
        *failure_lines(sweep, states),
    ]


def scoring_lines(sweep: Sweep, active: Sequence[ActiveJob]) -> list[str]:
    """References that are being scored, and those whose scoring failed."""
    lines, titles = [], set()
    for job in active:
        for task in known_tasks(job.array)[job.index : job.index + 1]:
            if task.kind == "score":
                titles.add(task.title)
                lines.append(f"  {job.state:<8} {task.title}")
    for title, record in sweep.last_records().items():
        if not title.startswith("score ") or title in titles:
            continue
        if record and record.state == "failed":
            lines.append(f"  failed   {title}: {record.error}")
    return lines


def running_lines(states: Mapping[str, RunState]) -> list[str]:
    """Running runs by name, without the folders that all runs share."""
    running = [(name, run) for name, run in states.items() if run.state == "running"]
    shared = os.path.commonpath(states) + "/" if len(states) > 1 else ""
    lines = []
    for name, run in running[:MOST_RUNNING]:
        since = f" for {format_duration(time.time() - run.record.began)}" if run.record else ""
        job = f" (job {run.job})" if run.job else ""
        lines.append(f"  running{since}{job}: {name.removeprefix(shared)}")
    more = len(running) - MOST_RUNNING
    return lines + ([f"  ... and {more} more"] if more > 0 else [])


def hold_lines(active: Sequence[ActiveJob]) -> list[str]:
    """Jobs that are on hold until a person releases them, by reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for job in active:
        if job.hold_reason:
            by_reason[job.hold_reason].append(job.job)
    return [
        f"  {format_count(len(jobs), 'job')} on hold ({reason}), to release: "
        f"scontrol release {jobs[0]}" + (" ..." if len(jobs) > 1 else "")
        for reason, jobs in by_reason.items()
    ]


def failure_lines(sweep: Sweep, states: Mapping[str, RunState]) -> list[str]:
    """Runs that failed, died or are damaged, grouped by the reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    records = sweep.last_records()
    for name, run in states.items():
        if run.state in ("failed", "dead", "damaged"):
            by_reason[failure_reason(sweep, name, run, records)].append(name)
    lines = []
    for reason, names in by_reason.items():
        lines += [f"  {len(names)} x {reason}", *(f"      {name}" for name in names[:3])]
        lines += [f"      ... and {len(names) - 3} more"] if len(names) > 3 else []
    if by_reason:
        lines.append(
            f"  python -m launchers logs RUN shows what happened, retry {sweep.name} tries again"
        )
    return lines


def failure_reason(
    sweep: Sweep, name: str, run: RunState, records: Mapping[str, Record | None]
) -> str:
    """Why a failed, dead or damaged run is not finished, in one line."""
    if run.damage:
        return run.damage
    record = run.record
    if record is None:
        plan = sweep.plan
        slugs = dict.fromkeys(plan.scores[key]["slug"] for key in plan.runs[name]["scores"])
        failed = [s for s in slugs if (r := records.get(f"score {s}")) and r.state == "failed"]
        return f"dead: scoring {', '.join(failed)} failed" if failed else "dead before it began"
    if run.state == "failed" or record.state in ("cancelled", "unreadable"):
        return f"{run.state}: {record.error}"
    if record.state == "left":
        return "dead: saved itself and was not started again"
    return f"dead: killed on {record.host} (job {record.job})"


def seconds_left(states: Mapping[str, RunState]) -> float | None:
    """Estimate the seconds until all runs have ended, from how long finished jobs took.

    None while no job has finished or none is running.
    """
    durations = [
        record.ended - record.began
        for run in states.values()
        if (record := run.record) and record.state == "done" and record.ended
    ]
    running = [run for run in states.values() if run.state == "running"]
    queued = sum(run.state == "queued" for run in states.values())
    if not durations or not running:
        return None
    mean, now = sum(durations) / len(durations), time.time()
    begun = sum(max(0.0, mean - (now - run.record.began)) for run in running if run.record)
    return max((queued * mean + begun) / len(running), 1.0)
