"""``python -m torture``: faults on purpose, with a table of what held."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tqdm
from harness import TINY, train_py

from mrpo_lab.storage import cache
from mrpo_lab.storage.files import path_argument
from torture.driver import KINDS, Session, share, table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    made.add_argument("--minutes", type=float, default=30.0, help="default: 30")
    made.add_argument("--seed", type=int, help="default: another one each time; it is printed")
    made.add_argument("--kinds", default=",".join(KINDS), help=f"default: {','.join(KINDS)}")
    made.add_argument("--trial", type=int, help="only this one of one kind, and its folder is kept")
    made.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    made.add_argument("--folder", type=path_argument, help="where failures are kept")
    return made


def warm(base: Path) -> None:
    """Import in this process what every trial needs, and fill a cache that all begin with.

    Forks of it begin at once. No thread may run here, since a fork has only the one that forked.
    """
    tqdm.tqdm.monitor_interval = 0
    base.mkdir(parents=True)
    models = cache.root() / "models"
    os.environ["MRPO_LAB_CACHE"] = str(base / "cache")
    if models.is_dir():  # else they are built here
        (base / "cache").mkdir()
        (base / "cache" / "models").symlink_to(models.resolve())
    done = train_py(*TINY, "reference_set.use=null", f"outputs={base / 'warm'}")
    assert done.code == 0, done.err
    import mrpo_lab.report.write  # noqa: F401


def main() -> int:
    arguments = parser().parse_args()
    kinds = arguments.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        sys.exit(f"--kinds: {', '.join(unknown)}: choose from {', '.join(KINDS)}")
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    began = time.monotonic()
    base = folder / "base"
    warm(base)
    session = Session(folder, base, seed, short=arguments.minutes < 10)
    if arguments.trial is not None:
        pid = session.start(kinds[0], arguments.trial)
        os.waitpid(pid, 0)
        print((session.trial(kinds[0], arguments.trial) / "verdict.json").read_text())
        print(session.trial(kinds[0], arguments.trial))
        return 0
    print(f"seed {seed}, {arguments.minutes:g} minutes, {folder}", flush=True)
    left = 60 * arguments.minutes - (time.monotonic() - began)
    tallies = share(session, kinds, left, arguments.cores)
    failures = sum(len(tally.failures) for tally in tallies.values())
    print(f"seed {seed}, {(time.monotonic() - began) / 60:.1f} minutes\n\n{table(tallies)}")
    if failures:
        print(f"\n{failures} did not hold; their folders are in {folder}. One of them again:")
        print("PYTHONPATH=tests python -m torture --kinds KIND --seed SEED --trial NUMBER")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
