"""Damaged files of a sweep: its commands say in one line what is wrong, and go on with the rest."""

from __future__ import annotations

import re
import shutil
from random import Random

from filelock import FileLock
from harness import TINY

from torture.kinds.damage import DAMAGES, similar
from torture.place import Place, succeeded
from torture.process import BrokenError

SWEEP = ("-m", *TINY, "hydra/launcher=local", "weighting=vaw,tsw", "seed=s0")
READERS = (("status",), ("gather",), ("logs", "tsw"), ("status",))


def trial(place: Place, random: Random) -> None:
    base = place.base / "sweep"
    with FileLock(f"{base}.lock"):
        if not (base / "done").exists():
            shutil.rmtree(base, ignore_errors=True)
            made = Place(base, place.base, place.short)
            made.take_scores()
            succeeded(made.start("train.py", *SWEEP).wait())
            succeeded(made.start("launchers", "wait").wait())
            (base / "done").touch()
    shutil.copytree(base / "work", place.work, dirs_exist_ok=True, symlinks=True)
    place.take_scores()
    files = [p for p in sorted(place.work.rglob("*")) if p.is_file() and p.suffix != ".lock"]
    own = [p for p in files if "sweeps" in p.parts or p.suffix in (".json", ".yaml")]
    file = random.choice(own)
    damage = random.choice(DAMAGES)
    damage(file, random, similar(place, file))
    place.notes.append(f"{damage.__name__}: {file.relative_to(place.work)}")
    for reader in random.sample(READERS, 2):
        done = place.start("launchers", *reader).wait()
        if done.code not in (0, 1, 2) or "Traceback" in done.err + done.out:
            raise BrokenError(f"launchers {reader[0]}: {done}")
        errors = [line for line in re.split(r"[\r\n]", done.err) if line.strip()]
        if done.code == 2 and len(errors) != 1:
            raise BrokenError(f"launchers {reader[0]} says more than one line: {done}")
