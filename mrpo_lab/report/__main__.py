"""``python -m mrpo_lab.report [FOLDER ...] [--out report]`` and ``... compare RUN RUN``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mrpo_lab.cli import exit_on_user_error
from mrpo_lab.errors import UserError
from mrpo_lab.report.reading import RunRecord, read_run
from mrpo_lab.report.study import Study, build_study
from mrpo_lab.runs.reading import find_runs
from mrpo_lab.runs.run_choice import RunChoice, flat
from mrpo_lab.storage.files import path_argument


@exit_on_user_error
def main(arguments: Sequence[str]) -> int:
    """Write a report, or compare a few runs; returns the exit code."""
    if arguments[:1] == ["compare"]:
        return compare(compare_parser().parse_args(arguments[1:]))
    return report(parser().parse_args(arguments))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mrpo_lab.report",
        description="Figures, tables and tests from run folders: OUT/index.html, OUT/figures, "
        "OUT/tables. `compare RUN RUN ...` prints a few runs side by side instead.",
    )
    made.add_argument(
        "folders", nargs="*", type=path_argument, help="run folders or folders of them (outputs)"
    )
    made.add_argument("--out", type=path_argument, default=Path("report"), help="default: report")
    made.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs whose configuration has this value, such as loss.beta=5.0; may be repeated",
    )
    made.add_argument(
        "--published",
        action="append",
        default=[],
        type=path_argument,
        metavar="FILE",
        help="add published results from a CSV table; docs/report.md describes its columns",
    )
    made.add_argument(
        "--from-wandb",
        action="append",
        default=[],
        metavar="ENTITY/PROJECT",
        help="read the runs of a W&B project",
    )
    made.add_argument(
        "--watch",
        nargs="?",
        type=int,
        const=60,
        metavar="SECONDS",
        help="write the report again and again, by default every 60 seconds",
    )
    return made


def compare_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m mrpo_lab.report compare")
    made.add_argument("runs", nargs="+", type=path_argument, help="run folders")
    return made


def report(arguments: argparse.Namespace) -> int:
    """Write the report, again and again with ``--watch``.

    Raises:
        UserError: there are no runs, or the report cannot be written.
    """
    if arguments.watch is not None and arguments.watch < 1:
        raise UserError(f"--watch {arguments.watch}: give at least 1 second")
    while True:
        began = time.monotonic()
        study = collect(arguments)
        from mrpo_lab.report.write import write_report

        page = write_report(study, arguments.out, refresh=arguments.watch)
        counts = Counter(study.runs["status"]) if len(study.runs) else Counter[str]()
        if study.unreadable:
            counts["unreadable"] = len(study.unreadable)
        statuses = ", ".join(f"{number} {status}" for status, number in counts.items())
        if unverified := sum(not record.verified for record in study.records.values()):
            statuses += f", {unverified} of them of an earlier version, without checksums"
        print(f"{page}: {statuses} ({time.monotonic() - began:.1f} s)", flush=True)
        for record in study.unreadable:
            print(f"unreadable: {record.source}: {record.problem}", flush=True)
        if arguments.watch is None:
            return 0
        time.sleep(max(0.0, arguments.watch - (time.monotonic() - began)))


def collect(arguments: argparse.Namespace) -> Study:
    """Read all runs that the arguments name: folders, W&B projects and published tables.

    Raises:
        UserError: there are none, or something cannot be read.
    """
    given: dict[str, RunChoice] = {}
    folders = arguments.folders
    if not (folders or arguments.published or arguments.from_wandb):
        folders = [Path("outputs")]
    records: list[RunRecord] = [read_run(folder) for folder in find_runs(folders)]
    for project in arguments.from_wandb:
        from mrpo_lab.report.wandb_runs import read_project

        records += read_project(project)
    conditions = arguments.where
    records = [r for r in records if all(matches(r.config, c) for c in conditions)]
    for file in arguments.published:
        from mrpo_lab.report.published import read_published

        for record, choice in read_published(file):
            records.append(record)
            given[record.source] = choice
    if not records:
        places = ", ".join(map(str, [*folders, *arguments.from_wandb, *arguments.published]))
        where = f" with {' and '.join(conditions)}" if conditions else ""
        raise UserError(
            f"{places}: no runs{where}; a run is a folder with config.yaml, as train.py writes"
        )
    return build_study(records, given)


def matches(config: dict[str, Any], condition: str) -> bool:
    """Whether a configuration has ``KEY=VALUE``; numbers are compared as numbers.

    Raises:
        UserError: the condition is not KEY=VALUE.
    """
    key, equals, wanted = condition.partition("=")
    if not equals:
        raise UserError(f"--where {condition}: give KEY=VALUE, as in loss.beta=5.0")
    found = dict(flat(config)).get(key)
    if found is None:
        return False
    try:
        return float(found) == float(wanted)
    except ValueError:
        return found == wanted


def compare(arguments: argparse.Namespace) -> int:
    """Print a few runs side by side.

    Raises:
        UserError: there are no runs in these folders.
    """
    from mrpo_lab.console import show
    from mrpo_lab.report.side_by_side import side_by_side

    folders = [folder for path in arguments.runs for folder in find_runs([path])]
    records = [read_run(folder) for folder in dict.fromkeys(folders)]
    if not records:
        raise UserError(f"{', '.join(map(str, arguments.runs))}: no runs")
    lines, table = side_by_side(build_study(records), records)
    show("\n".join(lines))
    if table is not None:
        show("")
        show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
