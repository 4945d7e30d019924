"""``python -m launchers``: look at sweeps that were dispatched, and act on them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from launchers.dispatch import submit_missing
from launchers.gather import gather
from launchers.logs import show_log
from launchers.profiles import build_cluster
from launchers.queues import cancel, queue
from launchers.sweep import Sweep, dispatch_lock, find_sweeps
from launchers.sync import sync
from launchers.watching import show_status, watch
from mrpo_lab.cli import exit_on_user_error, fail, near
from mrpo_lab.console import show
from mrpo_lab.errors import UserError
from mrpo_lab.storage.checksums import DamagedError
from mrpo_lab.storage.files import path_argument
from mrpo_lab.wording import format_count

Verb = Callable[[argparse.Namespace], int]
"""A function of the parsed arguments that returns an exit code."""


def chosen_sweeps(args: argparse.Namespace) -> list[Sweep]:
    """The sweep that is named, or all of them."""
    found = find_sweeps(args.outputs)
    if not found:
        raise UserError(f"there is no sweep in {args.outputs}; --outputs=FOLDER looks elsewhere")
    if args.sweep is None:
        return found
    named = [sweep for sweep in found if sweep.name == args.sweep]
    if not named:
        options = [sweep.name for sweep in found]
        raise UserError(f"{args.sweep}: no such sweep{near(args.sweep, options)}")
    return named


def only_sweep(args: argparse.Namespace) -> Sweep:
    """The sweep that is named, or the only one."""
    found = chosen_sweeps(args)
    if len(found) > 1:
        raise UserError(f"which sweep? {', '.join(sweep.name for sweep in found)}")
    return found[0]


def for_each(sweeps: Iterable[Sweep], action: Callable[[Sweep], bool | None]) -> int:
    """The exit code of an action on several sweeps: 1 if it returned False for one of them, 2 if
    one could not be read, which does not keep the others from being shown."""
    code = 0
    for sweep in sweeps:
        try:
            code = max(code, int(action(sweep) is False))
        except DamagedError as error:
            fail(str(error))
            code = 2
    return code


def status(args: argparse.Namespace) -> int:
    return for_each(chosen_sweeps(args), show_status)


def wait(args: argparse.Namespace) -> int:
    return for_each(chosen_sweeps(args), watch)


def retry(args: argparse.Namespace) -> int:
    sweep = only_sweep(args)
    with dispatch_lock(sweep.outputs):
        plan = sweep.plan
        submit_missing(sweep, build_cluster(plan.profile), list(plan.runs))
    return 0


def stop(args: argparse.Namespace) -> int:
    sweep = only_sweep(args)
    own = [job for job in queue(sweep.outputs) if sweep.owns(job)]
    cancel(own)
    jobs = format_count(len(own), "job")
    show(f"{sweep.name}: {jobs} cancelled; the same command, or retry, goes on")
    return 0


def logs(args: argparse.Namespace) -> int:
    show(show_log(find_sweeps(args.outputs), args.run, args.lines))
    return 0


def table(args: argparse.Namespace) -> int:
    return for_each(chosen_sweeps(args), lambda sweep: show(gather(sweep)))


def upload(args: argparse.Namespace) -> int:
    return sync(args.outputs, args.parallel)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m launchers", description=__doc__)
    top.add_argument(
        "--outputs", type=path_argument, default=Path("outputs"), help="folder of the runs"
    )
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Verb, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        return command

    for name, function, text in (
        ("status", status, "how far each sweep is, and what went wrong"),
        ("wait", wait, "the same, live, until no job is left; exit code 1 unless all finished"),
        ("retry", retry, "submit the runs that failed or died again"),
        ("cancel", stop, "cancel the jobs of a sweep; running ones save a checkpoint first"),
        ("gather", table, "the results so far, as a table"),
    ):
        command = verb(name, function, text)
        command.add_argument("sweep", nargs="?", help="default: all, or the only one")
    log = verb("logs", logs, "traceback and last output of a run, or of a reference's scoring")
    log.add_argument("run", help="name of the run, or a part that no other name has")
    log.add_argument("-n", "--lines", type=int, default=40, help="lines of output (40)")
    send = verb("sync", upload, "send offline W&B runs to the server that were not sent before")
    send.add_argument("--parallel", type=int, default=8, help="runs at once (8)")
    return top


@exit_on_user_error
def main() -> int:
    args = parser().parse_args()
    args.outputs = args.outputs.resolve()
    code: int = args.function(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
