"""How far a sweep is, once or until it ends."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from launchers.cluster import cancel, queue
from launchers.sweep import STATES, Live, Record, Standing, Sweep, by_gift
from launchers.tasks import read_tasks
from launchers.wording import counted, duration

EVERY = 2.0
"""Seconds between two looks; a log file gets a line when something has changed."""
SHOWN = 12
"""Most runs that one look lists."""


def watch(sweep: Sweep, stop_with_me: bool = False) -> bool:
    """Show a live table until no job of the sweep is left; whether all runs are finished.

    ``stop_with_me``: Ctrl-C stops the sweep rather than only the watching.
    """
    screen = Screen()
    try:
        while True:
            live = of_sweep(sweep)
            standings = sweep.standings(by_gift(live))
            screen.show(status_lines(sweep, standings, live))
            if not live:
                break
            time.sleep(EVERY)
    except KeyboardInterrupt:
        if stop_with_me:
            print("\nstopping: runs save themselves, and the same command goes on with them")
            cancel([job for job in of_sweep(sweep) if sweep.submitted(job)])
        raise
    return all(standing.state == "finished" for standing in standings.values())


class Screen:
    """Overwrites its lines on a terminal; elsewhere prints the first when it changes."""

    def __init__(self) -> None:
        self._tall, self._last = 0, ""

    def show(self, lines: Sequence[str]) -> None:
        if sys.stdout.isatty():
            up = f"\x1b[{self._tall}F\x1b[J" if self._tall else ""
            wide = shutil.get_terminal_size().columns  # a line that wraps would be two
            print(up + "\n".join(line[:wide] for line in lines), flush=True)
            self._tall = len(lines)
        elif lines[0].partition("; ")[0] != self._last:
            self._last = lines[0].partition("; ")[0]
            print(lines[0], flush=True)


def of_sweep(sweep: Sweep) -> list[Live]:
    """The live tasks that concern a sweep: its own, and others' that give one of its runs."""
    plan = sweep.plan
    wanted = {f"run {name}" for name in plan.runs} | {f"scores {key}" for key in plan.scores}
    live = queue(sweep.outputs)
    concerned = {id(job) for gift, job in by_gift(live).items() if gift in wanted}
    return [job for job in live if id(job) in concerned or sweep.submitted(job)]


def status_lines(
    sweep: Sweep, standings: Mapping[str, Standing], live: Sequence[Live]
) -> list[str]:
    """The first counts; the others name scores and runs that are under way or went wrong."""
    counts = Counter(standing.state for standing in standings.values())
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    left = remaining(standings)
    eta = f"; about {duration(left)} left" if left is not None else ""
    return [
        f"{sweep.name}: {counted(len(standings), 'run')}: {states}{eta}",
        *scoring(sweep, live),
        *under_way(standings),
        *held(live),
        *wrong(sweep, standings),
    ]


def scoring(sweep: Sweep, live: Sequence[Live]) -> list[str]:
    """References that are scored now, and those whose scoring went wrong."""
    lines, alive = [], set()
    for job in live:
        task = read_tasks(job.array / "tasks.json")[job.index]
        if task.kind == "score":
            alive.add(task.title)
            lines.append(f"  {job.state:<8} {task.title}")
    for title, record in sweep.last_records().items():
        if (
            record
            and title.startswith("score ")
            and title not in alive
            and record.state == "failed"
        ):
            lines.append(f"  failed   {title}: {record.error}")
    return lines


def under_way(standings: Mapping[str, Standing]) -> list[str]:
    running = [(name, s) for name, s in standings.items() if s.state == "running"]
    shared = os.path.commonpath(standings) + "/" if len(standings) > 1 else ""
    lines = []
    for name, standing in running[:SHOWN]:
        since = f" for {duration(time.time() - standing.record.began)}" if standing.record else ""
        job = f" (job {standing.job})" if standing.job else ""
        lines.append(f"  running{since}{job}: {name.removeprefix(shared)}")
    return lines + ([f"  ... and {len(running) - SHOWN} more"] if len(running) > SHOWN else [])


def held(live: Sequence[Live]) -> list[str]:
    """Jobs that wait for a person."""
    alike: dict[str, list[str]] = defaultdict(list)
    for job in live:
        if job.held:
            alike[job.held].append(job.job)
    return [
        f"  {counted(len(jobs), 'job')} held ({reason}), to go on: scontrol release {jobs[0]}"
        + (" ..." if len(jobs) > 1 else "")
        for reason, jobs in alike.items()
    ]


def wrong(sweep: Sweep, standings: Mapping[str, Standing]) -> list[str]:
    """Runs that failed or died, those with the same error together."""
    alike: dict[str, list[str]] = defaultdict(list)
    records = sweep.last_records()
    for name, standing in standings.items():
        if standing.state in ("failed", "dead"):
            alike[why(sweep, name, standing, records)].append(name)
    lines = []
    for reason, names in alike.items():
        lines += [f"  {len(names)} x {reason}", *(f"      {name}" for name in names[:3])]
        lines += [f"      ... and {len(names) - 3} more"] if len(names) > 3 else []
    if alike:
        lines.append(
            f"  python -m launchers logs RUN shows what happened, retry {sweep.name} tries again"
        )
    return lines


def why(sweep: Sweep, name: str, standing: Standing, records: Mapping[str, Record | None]) -> str:
    record = standing.record
    if record is None:
        plan = sweep.plan
        slugs = dict.fromkeys(plan.scores[key]["slug"] for key in plan.runs[name]["scores"])
        failed = [s for s in slugs if (r := records.get(f"score {s}")) and r.state == "failed"]
        return f"dead: scoring {', '.join(failed)} failed" if failed else "dead before it began"
    if standing.state == "failed" or record.state == "cancelled":
        return f"{standing.state}: {record.error}"
    if record.state == "left":
        return "dead: saved itself and was not started again"
    return f"dead: killed on {record.host} (job {record.job})"


def remaining(standings: Mapping[str, Standing]) -> float | None:
    """Seconds, from how long finished jobs took and how many run at once; None if unknown."""
    took = [
        record.ended - record.began
        for standing in standings.values()
        if (record := standing.record) and record.state == "done" and record.ended
    ]
    running = [s for s in standings.values() if s.state == "running"]
    queued = sum(standing.state == "queued" for standing in standings.values())
    if not took or not running:
        return None
    mean, now = sum(took) / len(took), time.time()
    begun = sum(max(0.0, mean - (now - s.record.began)) for s in running if s.record)
    return max((queued * mean + begun) / len(running), 1.0)
