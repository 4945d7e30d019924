"""``python -m mrpo_lab.storage verify [FOLDER] [--delete]``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mrpo_lab.cli import exit_on_user_error
from mrpo_lab.console import show, text_table
from mrpo_lab.progress import progress
from mrpo_lab.storage import cache
from mrpo_lab.storage.files import path_argument
from mrpo_lab.storage.verification import STATES, Verdict, checks, left_over, verdict


@exit_on_user_error
def main(arguments: Sequence[str]) -> int:
    """Verify a cache; returns the exit code, 1 if something is damaged and left there."""
    options = parser().parse_args(arguments)
    return verify(options.folder or cache.root(), options.delete)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m mrpo_lab.storage")
    commands = made.add_subparsers(required=True, metavar="verify")
    about = "check all numbers, hashes and models of a cache against their checksums"
    command = commands.add_parser("verify", help=about, description=about)
    command.add_argument(
        "folder", nargs="?", type=path_argument, help="default: MRPO_LAB_CACHE or outputs/cache"
    )
    command.add_argument(
        "--delete",
        action="store_true",
        help="delete what is damaged or left over; it is computed again when it is needed",
    )
    return made


def verify(root: Path, delete: bool) -> int:
    """Check a cache, print what was found, and delete what is damaged if asked to.

    Raises:
        UserError: the folder is no cache.
    """
    to_check = checks(root)
    verdicts = []
    with progress(len(to_check), f"verifying {root}", "file", delay=1.0) as bar:
        for check in to_check:
            verdicts.append(verdict(check))
            bar.update()
    verdicts += left_over(root)
    show_counts(verdicts)
    bad = [found for found in verdicts if found.problem]
    for found in bad:
        print(f"{found.state}: {found.path}: {found.problem}")
        if delete:
            found.delete()
    if bad:
        done = "deleted" if delete else "delete these, or have it done by --delete"
        print(f"{done}: what is needed of it is computed again")
    return int(not delete and any(found.state == "damaged" for found in bad))


def show_counts(verdicts: Sequence[Verdict]) -> None:
    """Print how many files of each kind are in each state."""
    counts = Counter((found.kind, found.state) for found in verdicts)
    table = text_table("kind", *STATES, right=STATES)
    for kind in dict.fromkeys(found.kind for found in verdicts):
        table.add_row(kind, *(str(counts[kind, state]) for state in STATES))
    show(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
