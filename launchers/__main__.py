"""``python -m launchers``: look at sweeps that were dispatched, and act on them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from launchers.cluster import build, cancel, queue
from launchers.dispatch import submit_missing
from launchers.gather import gather
from launchers.logs import show_log
from launchers.sweep import Sweep, by_gift, dispatching, sweeps
from launchers.sync import sync
from launchers.watching import of_sweep, status_lines, watch
from mrpo_lab.cli import near
from mrpo_lab.errors import UserError

Verb = Callable[[argparse.Namespace], int]
"""Its exit code."""


def chosen(args: argparse.Namespace) -> list[Sweep]:
    """The sweep that is named, or all."""
    there = sweeps(args.outputs)
    if not there:
        raise UserError(f"there is no sweep in {args.outputs}; --outputs=FOLDER looks elsewhere")
    if args.sweep is None:
        return there
    found = [sweep for sweep in there if sweep.name == args.sweep]
    if not found:
        options = [sweep.name for sweep in there]
        raise UserError(f"{args.sweep}: no such sweep{near(args.sweep, options)}")
    return found


def the_one(args: argparse.Namespace) -> Sweep:
    """The sweep that is named, or the only one."""
    found = chosen(args)
    if len(found) > 1:
        raise UserError(f"which sweep? {', '.join(sweep.name for sweep in found)}")
    return found[0]


def status(args: argparse.Namespace) -> int:
    for sweep in chosen(args):
        live = of_sweep(sweep)
        print("\n".join(status_lines(sweep, sweep.standings(by_gift(live)), live)))
    return 0


def wait(args: argparse.Namespace) -> int:
    done = [watch(sweep) for sweep in chosen(args)]
    return 0 if all(done) else 1


def retry(args: argparse.Namespace) -> int:
    sweep = the_one(args)
    with dispatching(sweep.outputs):
        plan = sweep.plan
        submit_missing(sweep, build(plan.profile), list(plan.runs))
    return 0


def stop(args: argparse.Namespace) -> int:
    sweep = the_one(args)
    own = [job for job in queue(sweep.outputs) if sweep.submitted(job)]
    cancel(own)
    print(f"{sweep.name}: {len(own)} jobs cancelled; the same command, or retry, goes on")
    return 0


def logs(args: argparse.Namespace) -> int:
    print(show_log(sweeps(args.outputs), args.run, args.lines))
    return 0


def table(args: argparse.Namespace) -> int:
    for sweep in chosen(args):
        print(gather(sweep))
    return 0


def upload(args: argparse.Namespace) -> int:
    return sync(args.outputs, args.parallel)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m launchers", description=__doc__)
    top.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, does: Verb, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        command.set_defaults(does=does)
        return command

    for name, does, text in (
        ("status", status, "how far each sweep is, and what went wrong"),
        ("wait", wait, "the same, live, until nothing is left; exit code 1 unless all finished"),
        ("retry", retry, "submit the runs that failed or died again"),
        ("cancel", stop, "take a sweep's jobs out of the queue; running ones save first"),
        ("gather", table, "the results so far, as a table"),
    ):
        verb(name, does, text).add_argument(
            "sweep", nargs="?", help="default: all, or the only one"
        )
    show = verb("logs", logs, "traceback and last output of a run, or of a reference's scoring")
    show.add_argument("run", help="its name, or a part that no other has")
    show.add_argument("-n", "--lines", type=int, default=40, help="of output (40)")
    send = verb(
        "sync", upload, "send offline W&B runs to the server; those sent are not sent again"
    )
    send.add_argument("--parallel", type=int, default=8, help="at once (8)")
    return top


def main() -> None:
    args = parser().parse_args()
    args.outputs = args.outputs.resolve()
    try:
        code = args.does(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
