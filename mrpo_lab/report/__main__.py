"""``python -m mrpo_lab.report [FOLDER ...] [--out report]`` and ``... compare RUN RUN``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mrpo_lab.errors import UserError
from mrpo_lab.report.reading import RunRecord, read_run
from mrpo_lab.report.study import Study, build_study
from mrpo_lab.runs.reading import find_runs
from mrpo_lab.runs.run_choice import RunChoice, flat


def main(arguments: Sequence[str]) -> int:
    try:
        if arguments[:1] == ["compare"]:
            return compare(parser_of_compare().parse_args(arguments[1:]))
        return report(parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mrpo_lab.report",
        description="Figures, tables and tests from run folders: OUT/index.html, OUT/figures, "
        "OUT/tables. `compare RUN RUN ...` prints a few runs side by side instead.",
    )
    made.add_argument(
        "folders", nargs="*", type=Path, help="run folders or folders of them (outputs)"
    )
    made.add_argument("--out", type=Path, default=Path("report"), help="default: report")
    made.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this in their configuration, as loss.beta=5.0; may be repeated",
    )
    made.add_argument(
        "--published",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="results of others, a CSV table (docs/report.md), beside the runs",
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
        help="write the report again and again, every 60 seconds if no number is given",
    )
    return made


def parser_of_compare() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m mrpo_lab.report compare")
    made.add_argument("runs", nargs="+", type=Path, help="run folders")
    return made


def report(asked: argparse.Namespace) -> int:
    if asked.watch is not None and asked.watch < 1:
        raise UserError(f"--watch {asked.watch}: give at least 1 second")
    while True:
        began = time.monotonic()
        study = collect(asked)
        from mrpo_lab.report.write import write_report

        page = write_report(study, asked.out, refresh=asked.watch)
        counts = Counter(study.runs["status"]) if len(study.runs) else Counter[str]()
        said = ", ".join(f"{number} {status}" for status, number in counts.items())
        unreadable = f", {len(study.unreadable)} unreadable" if study.unreadable else ""
        print(f"{page}: {said}{unreadable} ({time.monotonic() - began:.1f} s)", flush=True)
        if asked.watch is None:
            return 0
        time.sleep(max(0.0, asked.watch - (time.monotonic() - began)))


def collect(asked: argparse.Namespace) -> Study:
    """All records that were asked for.

    Raises:
        UserError: there are none.
    """
    records: list[RunRecord] = []
    given: dict[str, RunChoice] = {}
    folders = asked.folders
    if not (folders or asked.published or asked.from_wandb):
        folders = [Path("outputs")]
    records += [read_run(folder) for folder in find_runs(folders)]
    for project in asked.from_wandb:
        from mrpo_lab.report.wandb_runs import read_project

        records += read_project(project)
    records = [r for r in records if all(has(r.config, condition) for condition in asked.where)]
    for file in asked.published:
        from mrpo_lab.report.published import read_published

        for record, choice in read_published(file):
            records.append(record)
            given[record.source] = choice
    if not records:
        places = ", ".join(map(str, [*folders, *asked.from_wandb, *asked.published]))
        where = f" with {' and '.join(asked.where)}" if asked.where else ""
        raise UserError(
            f"{places}: no runs{where}; a run is a folder with config.yaml, as train.py writes"
        )
    return build_study(records, given)


def has(config: dict[str, Any], condition: str) -> bool:
    """Raises UserError where the condition is not KEY=VALUE."""
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
    print("\n".join(lines))
    if table is not None:
        print()
        show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
