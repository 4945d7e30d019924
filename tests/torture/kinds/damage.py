"""Damaged files: refused in one line that says what to do, or the result is what it was."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from filelock import FileLock

import mrpo_lab
from mrpo_lab import embedded
from mrpo_lab.errors import UserError
from torture.events import at_event, die
from torture.place import Place, Reference, refused, same_runs, succeeded
from torture.process import BrokenError, Finished

MODELS = ("tiny-qwen2", "tiny-llama", "tiny-neox")
ENTRIES = ", ".join(f"{{slug: {name}, path: models/{name}}}" for name in MODELS[:2])
RUN = (
    "model.path=models/tiny-neox",
    "reference_set=custom",
    "reference_set.dtype=float32",
    "reference_set.use=null",
    f"reference_set.entries=[{ENTRIES}]",
    "weighting=tsw",
)
STATES = ("scored", "interrupted", "finished")


def trial(place: Place, random: Random) -> None:
    state = random.choice(STATES)
    reference = begin(place, state)
    file = chosen(place, random)
    damage = random.choice(DAMAGES)
    name = file.relative_to(place.folder)
    others = [path for path in similar(place, file) if path.read_bytes() != file.read_bytes()]
    damage(file, random, others)
    place.notes.append(f"{state}: {damage.__name__}: {name}")
    if state == "finished" and random.random() < 0.4:
        read(place, reference, random)
    else:
        done = place.train(*RUN)
        model_of_new_run = state == "scored" and "models" in file.parts
        finish(place, done, reference, as_before=not model_of_new_run)


def begin(place: Place, state: str) -> Reference:
    """Bring the place into a state that is made once for all trials."""
    folder = place.base / "damage"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            for name in STATES:
                _make(Place(folder / name, place.base, place.short), name)
            (folder / "done").touch()
    shutil.copytree(folder / state / "work", place.work, dirs_exist_ok=True)
    place.take_scores(folder / state / "cache")
    (run,) = Place(folder / "finished", place.base, place.short).runs
    return Reference(run, 0, 0)


def _make(place: Place, state: str) -> None:
    for name in MODELS:
        shutil.copytree(embedded.folder(f"tiny7/{name}"), place.work / "models" / name)
    if state == "interrupted":
        number = 0
        while not list(place.work.rglob("state.safetensors")):
            number += 5
            place.train(*RUN, before=partial(at_event, number, die))
    else:
        succeeded(place.train(*RUN))
    if state == "scored":
        shutil.rmtree(place.work / "outputs")


def chosen(place: Place, random: Random) -> Path:
    """A file that is read back: each kind of file is as likely as any other."""
    kinds: dict[str, list[Path]] = {}
    for root in (place.work, place.cache):
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.name != ".lock" and not path.name.endswith(".lock"):
                parts = path.relative_to(root).parts
                kind = (parts[0], re.sub(r"^\d{20}-\w+|^[0-9a-f]{16,}", "N", path.name))
                kinds.setdefault("/".join(kind), []).append(path)
    return random.choice(kinds[random.choice(sorted(kinds))])


def similar(place: Place, file: Path) -> list[Path]:
    """Other files of the same kind, to be swapped with it."""
    top = next(root for root in (place.work, place.cache) if root in file.parents)
    kind = top / file.relative_to(top).parts[0]
    return [path for path in sorted(kind.rglob(f"*{file.suffix}")) if path.is_file()]


def finish(place: Place, done: Finished, reference: Reference, as_before: bool = True) -> None:
    """The command was refused, and goes on once what it says was done; or the result is right.

    ``as_before``: whether the result has to be that of the undamaged files.
    """
    for _ in range(4):
        if done.code == 0:
            succeeded(done)
            if as_before:
                (run,) = place.runs
                same_runs(run, reference.folder)
            return
        message = refused(done)
        if not (as_before and "delete" in message):
            return
        if not (named := named_path(place, message)):
            raise BrokenError(f"nothing that exists is named: {message}")
        shutil.rmtree(named) if named.is_dir() else named.unlink()
        place.notes.append(f"deleted {named.relative_to(place.folder)}, as the message says")
        done = place.train(*RUN)
    raise BrokenError(f"deleting what is named does not help: {message}")


def named_path(place: Place, message: str) -> Path | None:
    """The first file or folder below the place that a message names."""
    for word in re.findall(r"[^\s:;()'\"]+", message):
        path: Path = place.work / word.rstrip(",.")
        if path.exists() and place.folder in path.resolve().parents and path != place.work:
            return path
    return None


def read(place: Place, reference: Reference, random: Random) -> None:
    """What reads finished runs says in one line what is wrong, or shows the right numbers."""
    if random.random() < 0.3:
        words = random.choice([("outputs",), ("compare", "outputs"), ("compare", "outputs")])
        done = place.start("mrpo_lab.report", *words).wait()
        if done.code not in (0, 2) or "Traceback" in done.err + done.out:
            raise BrokenError(f"the report: {done}")
        return
    (expected, found) = ({}, {})  # type: dict[str, Any], dict[str, Any]
    for run, values in ((reference.folder, expected), (None, found)):
        for name in ("result", "metrics", "alpha", "test_pairs"):
            folder = run or next(iter(place.runs), place.work / "outputs")
            try:
                value = getattr(mrpo_lab.open_run(folder), name)
            except UserError as error:
                value = error
            values[name] = value
    for name, value in found.items():
        if not isinstance(value, UserError) and not _equal(name, value, expected[name]):
            raise BrokenError(f"open_run(...).{name} is wrong, and nothing is said")


def _equal(name: str, one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if name == "result":
        drop = ("wall_seconds", "pairs_per_second", "setup_seconds", "peak_memory_gib")
        return all(one.get(key) == other[key] for key in other if key not in drop)
    kept = [column for column in other.columns if not column.startswith("perf/")]
    return set(kept) <= set(one.columns) and bool(one[kept].equals(other[kept]))


Damage = Callable[[Path, Random, list[Path]], None]


def truncated(file: Path, random: Random, others: list[Path]) -> None:
    content = file.read_bytes()
    rewrite(file, content[: random.randrange(max(len(content), 1))])


def emptied(file: Path, random: Random, others: list[Path]) -> None:
    rewrite(file, b"")


def bit_flipped(file: Path, random: Random, others: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    rewrite(file, bytes(content))


def bytes_zeroed(file: Path, random: Random, others: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    start = random.randrange(max(len(content), 1))
    end = min(len(content), start + random.choice([1, 64, 4096]))
    content[start:end] = bytes(end - start)
    rewrite(file, bytes(content))


def swapped(file: Path, random: Random, others: list[Path]) -> None:
    """Two files change places; where there is only one, it is lost."""
    if others:
        other = random.choice(others)
        one, two = file.read_bytes(), other.read_bytes()
        rewrite(file, two)
        rewrite(other, one)
    else:
        file.unlink()


def deleted(file: Path, random: Random, others: list[Path]) -> None:
    file.unlink()


def foreign(file: Path, random: Random, others: list[Path]) -> None:
    """Well-formed content that does not belong there."""
    rewrite(file, random.choice([b"[]", b"{}", b"null", json.dumps({"a": 1}).encode(), b"\xff\n"]))


DAMAGES: tuple[Damage, ...] = (
    truncated,
    emptied,
    bit_flipped,
    bit_flipped,
    bytes_zeroed,
    swapped,
    deleted,
    foreign,
)


def rewrite(file: Path, content: bytes) -> None:
    """Replace a file's content, not that of a file with which it shares its disk space."""
    file.unlink()
    file.write_bytes(content)
