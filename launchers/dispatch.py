"""Work out which runs and scores are missing and submit them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.cluster import Cluster
from launchers.composing import Composer
from launchers.profiles import build_cluster
from launchers.queues import queue
from launchers.scores import is_scored, required_scores
from launchers.sweep import UNFINISHED, Plan, RunState, Sweep, by_output, dispatch_lock, writing
from launchers.tasks import Gather, Score, Train
from launchers.watching import watch
from mrpo_lab.console import show
from mrpo_lab.errors import UserError
from mrpo_lab.runs.identity import difference
from mrpo_lab.runs.inputs import changed_inputs
from mrpo_lab.runs.reading import RunView, finished
from mrpo_lab.wording import format_count


def launch(
    name: str,
    outputs: Path,
    overrides: Sequence[Sequence[str]],
    composer: Composer,
    profile: Mapping[str, Any],
) -> None:
    """Submit what is missing of the runs with these overrides, and print what that was.

    A blocking cluster is watched until the sweep has ended.

    Raises:
        UserError: the sweep is refused, or a watched one ended with unfinished runs.
    """
    sweep = Sweep(outputs.resolve() / "sweeps" / name.replace("/", "-"))
    cluster = build_cluster(profile)
    with dispatch_lock(sweep.outputs):
        names = extend_plan(sweep, overrides, composer, profile)
        submit_missing(sweep, cluster, names)
    if cluster.blocking:
        if not watch(sweep, cancel_on_interrupt=True):
            raise UserError(f"not all runs finished: python -m launchers status {sweep.name}")
        show(f"{sweep.folder}/: summary.txt, summary.json")


def extend_plan(
    sweep: Sweep,
    overrides: Sequence[Sequence[str]],
    composer: Composer,
    profile: Mapping[str, Any],
) -> list[str]:
    """Add runs to the plan of the sweep; return their names.

    Raises:
        UserError: two runs would share a folder, or a finished run has another configuration.
    """
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
    refuse_other_inputs(sweep, list(asked))
    changed = [name for name in asked if plan.runs.get(name, {}).get("conf") != conf]
    refuse_other_results(sweep, {name: asked[name] for name in changed}, composer)
    for name, each in asked.items():
        run = {"overrides": list(each), "conf": conf}
        required = required_scores(composer.sections(each))
        plan.runs[name] = {**run, "scores": [scores.key for scores in required]}
        for scores in required:
            plan.scores[scores.key] = {"slug": scores.slug, "path": scores.path, **run}
    with writing(sweep.folder):
        composer.snapshot(sweep.folder / "conf")
        sweep.write_plan(plan)
    return list(asked)


def refuse_other_inputs(sweep: Sweep, names: Sequence[str]) -> None:
    """Refuse the sweep if a run is finished that was made from other local files than today's.

    Raises:
        UserError: names the first such file and run.
    """
    for name in names:
        folder = sweep.outputs / name
        if finished(folder) and (changed := changed_inputs(folder, RunView(folder).config)):
            raise UserError(
                f"{changed[0]}: give this sweep a name of its own, name=NAME, or delete its folders"
            )


def refuse_other_results(
    sweep: Sweep, asked: Mapping[str, Sequence[str]], composer: Composer
) -> None:
    """Refuse the sweep if a run, by name, is finished with another configuration than asked for.

    Raises:
        UserError: names the first such run and how it differs.
    """
    others = []
    done = [name for name in asked if finished(sweep.outputs / name)]
    if len(done) > 20:
        show(f"comparing {len(done)} finished runs with today's configuration files ...")
    for name in done:
        saved = RunView(sweep.outputs / name).config
        if differing := difference(composer.full_config(asked[name]), saved):
            others.append(f"{name} ({'; '.join(differing)})")
    if others:
        raise UserError(
            f"{format_count(len(others), 'finished run')} of another configuration, first "
            f"{others[0]}: give this sweep a name of its own, name=NAME, or delete their folders"
        )


def submit_missing(sweep: Sweep, cluster: Cluster, names: Sequence[str]) -> None:
    """Submit what is neither finished nor active of the runs ``names`` and their scores."""
    plan, active = sweep.plan, by_output(queue(sweep.outputs))
    wanted = set(names)
    states = {name: run for name, run in sweep.run_states(active).items() if name in wanted}
    runs = [
        Train(str(sweep.folder), name, **plan.runs[name])
        for name, run in states.items()
        if run.state in UNFINISHED
    ]
    scores = missing_scores(sweep, plan, runs, active)
    if runs:
        cluster.check(scores)
        with writing(sweep.folder):
            cluster.submit(sweep, scores, runs, Gather(str(sweep.folder)), active)
    show(describe(sweep, states, scores))


def missing_scores(
    sweep: Sweep, plan: Plan, runs: Sequence[Train], active: Container[str]
) -> list[Score]:
    """One task for each reference that lacks scores which ``runs`` need.

    Args:
        active: outputs that active jobs will produce.
    """
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    tasks: dict[tuple[str, str], dict[str, Any]] = {}
    for key in keys:
        if f"scores {key}" in active or is_scored(key):
            continue
        scores = plan.scores[key]
        run = {"overrides": scores["overrides"], "conf": scores["conf"]}
        tasks.setdefault((scores["slug"], scores["path"]), {})[key] = run
    return [Score(str(sweep.folder), slug, path, by_key) for (slug, path), by_key in tasks.items()]


def describe(sweep: Sweep, states: Mapping[str, RunState], scores: Sequence[Score]) -> str:
    """One line: how many runs are finished, active, and submitted now."""
    counts = Counter(run.state for run in states.values())
    submitted = sum(counts[state] for state in UNFINISHED)
    again = [f"{counts[s]} {s}" for s in ("failed", "dead", "damaged") if counts[s]]
    parts = [f"{counts[s]} {s}" for s in ("finished", "running", "queued") if counts[s]]
    parts.append(f"{submitted} submitted" + (f" ({', '.join(again)} before)" if again else ""))
    if submitted and scores:
        parts.append(f"after {format_count(len(scores), 'reference')} to score")
    return f"{sweep.name}: {format_count(len(states), 'run')}: {', '.join(parts)}"
