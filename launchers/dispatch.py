"""From the runs that are asked for to the jobs that are missing."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launchers.cluster import Cluster, build, queue
from launchers.composing import Composer
from launchers.scores import Need, mark, needs
from launchers.sweep import UNFINISHED, Plan, Standing, Sweep, by_gift, dispatching
from launchers.tasks import Gather, Score, Train
from launchers.wording import counted
from mrpo_lab.errors import UserError
from mrpo_lab.runs.identity import difference
from mrpo_lab.runs.reading import finished


def launch(
    name: str,
    outputs: Path,
    overrides: Sequence[Sequence[str]],
    composer: Composer,
    profile: Mapping[str, Any],
) -> None:
    """Submit what is missing of the runs with these overrides, and say what that was."""
    sweep = Sweep(outputs.resolve() / "sweeps" / name.replace("/", "-"))
    cluster = build(profile)
    with dispatching(sweep.outputs):
        asked = extend_plan(sweep, overrides, composer, profile)
        submit_missing(sweep, cluster, asked)
    if cluster.blocking:
        from launchers.watching import watch

        if not watch(sweep, stop_with_me=True):
            raise UserError(f"not all runs finished: python -m launchers status {sweep.name}")
        say(f"{sweep.folder}/: summary.txt, summary.json")


def extend_plan(
    sweep: Sweep,
    overrides: Sequence[Sequence[str]],
    composer: Composer,
    profile: Mapping[str, Any],
) -> list[str]:
    """Add the runs to the sweep's plan; their names.

    Raises:
        UserError: two of them would share a folder, or a finished one is of another configuration.
    """
    composer.recall(sweep.folder / "composed.json")
    plan, conf = sweep.plan, f"conf/{composer.digest}"
    plan.profile = dict(profile)
    asked: dict[str, Sequence[str]] = {}
    for each in overrides:
        name = composer.name(each)
        if name in asked:
            raise UserError(
                f"{' '.join(each)} and {' '.join(asked[name])} would share {name}: "
                "give them names of their own, name=NAME"
            )
        asked[name] = each
    changed = [name for name in asked if plan.runs.get(name, {}).get("conf") != conf]
    refuse_other_results(sweep, {name: asked[name] for name in changed}, composer)
    for name, each in asked.items():
        run = {"overrides": list(each), "conf": conf}
        wanted: list[Need] = needs(composer.composed(each).sections)
        plan.runs[name] = {**run, "scores": [need.key for need in wanted]}
        for need in wanted:
            plan.scores[need.key] = {"slug": need.slug, "path": need.path, **run}
    composer.snapshot(sweep.folder / "conf")
    composer.remember(sweep.folder / "composed.json")
    sweep.keep(plan)
    return list(asked)


def refuse_other_results(
    sweep: Sweep, asked: Mapping[str, Sequence[str]], composer: Composer
) -> None:
    """A finished run counts only if it is of the configuration that is asked for."""
    other = []
    done = [name for name in asked if finished(sweep.outputs / name)]
    if len(done) > 20:
        say(f"comparing {len(done)} finished runs with the configuration files as they are now ...")
    for name in done:
        saved = yaml.load((sweep.outputs / name / "config.yaml").read_text(), yaml.CSafeLoader)
        if differing := difference(composer.whole(asked[name]), saved):
            other.append(f"{name} ({'; '.join(differing)})")
    if other:
        raise UserError(
            f"{counted(len(other), 'finished run')} of another configuration, first {other[0]}: "
            "give this sweep a name of its own, name=NAME, or delete their folders"
        )


def submit_missing(sweep: Sweep, cluster: Cluster, names: Sequence[str]) -> None:
    """Submit the scores and runs, out of ``names``, that are neither there nor on their way."""
    plan, live = sweep.plan, by_gift(queue(sweep.outputs))
    standings = {name: s for name, s in sweep.standings(live).items() if name in set(names)}
    runs = [
        Train(str(sweep.folder), name, **plan.runs[name])
        for name, standing in standings.items()
        if standing.state in UNFINISHED
    ]
    scores = missing_scores(sweep, plan, runs, live)
    if runs:
        cluster.check(scores)
        cluster.submit(sweep, scores, runs, Gather(str(sweep.folder)), live)
    say(described(sweep, standings, scores))


def missing_scores(
    sweep: Sweep, plan: Plan, runs: Sequence[Train], live: Mapping[str, Any]
) -> list[Score]:
    """One task for each reference that lacks scores which ``runs`` need."""
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    absent = [key for key in keys if f"scores {key}" not in live and not mark(key).exists()]
    tasks: dict[tuple[str, str], dict[str, Any]] = {}
    for key in absent:
        need = plan.scores[key]
        run = {"overrides": need["overrides"], "conf": need["conf"]}
        tasks.setdefault((need["slug"], need["path"]), {})[key] = run
    return [Score(str(sweep.folder), slug, path, of) for (slug, path), of in tasks.items()]


def described(sweep: Sweep, standings: Mapping[str, Standing], scores: Sequence[Score]) -> str:
    """One line: what is there, what is alive, and what is submitted now."""
    counts = Counter(standing.state for standing in standings.values())
    submitted = sum(counts[state] for state in UNFINISHED)
    again = [f"{counts[s]} {s}" for s in ("failed", "dead") if counts[s]]
    parts = [f"{counts[s]} {s}" for s in ("finished", "running", "queued") if counts[s]]
    parts.append(f"{submitted} submitted" + (f" ({', '.join(again)} before)" if again else ""))
    if submitted and scores:
        parts.append(f"after {counted(len(scores), 'reference')} to score")
    return f"{sweep.name}: {counted(len(standings), 'run')}: {', '.join(parts)}"


def say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
