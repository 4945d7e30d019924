"""Files that are replaced: what a kill or a loss of power at any instant leaves."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from harness import Killed, killed
from safetensors.numpy import save_file

from mrpo_lab.storage.files import replacing, replacing_folder, write_parquet, write_whole


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was flushed and renamed, in order, by path; all of it is done as well."""
    calls: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def flushed(descriptor: int) -> None:
        calls.append(("flushed", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        calls.append(("renamed", str(source)))
        replace(source, target)

    def renamed(source: Path, target: Path) -> Path:
        calls.append(("renamed", str(source)))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    return calls


def write_with_a_library(path: Path) -> None:
    with replacing(path) as draft:
        save_file({"a": np.zeros(3)}, draft)


def write_a_folder(path: Path) -> None:
    with replacing_folder(path) as draft:
        (draft / "below").mkdir(parents=True)
        for file in ("one", "below/two"):
            (draft / file).write_text("new")


WRITES: dict[str, Callable[[Path], None]] = {
    "whole": lambda path: write_whole(path, b"new"),
    "parquet": lambda path: write_parquet(path, pa.table({"a": [1]})),
    "library": write_with_a_library,
    "folder": write_a_folder,
}


@pytest.mark.parametrize("write", WRITES)
def test_contents_are_on_the_disk_before_the_name_is(
    tmp_path: Path, done: list[tuple[str, str]], write: str
) -> None:
    path = tmp_path / "new" / "newer" / "place"
    path.parent.mkdir(parents=True)
    for again in (False, True):
        done.clear()
        WRITES[write](path)
        (renaming,) = (
            i for i, (what, name) in enumerate(done) if name.endswith(".tmp") and what == "renamed"
        )
        draft = done[renaming][1]
        below = ("one", "below", "below/two") if path.is_dir() else ()
        written = [draft, *(f"{draft}/{name}" for name in below)]
        assert {("flushed", name) for name in written} <= {*done[:renaming]}
        folders = [path.parent] if again else [path.parent, path.parent.parent, tmp_path]
        assert {("flushed", str(folder)) for folder in folders} <= {*done[renaming:]}


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_survives_a_kill_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, when: str
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "one").write_text("old")
    with monkeypatch.context() as no_clean_up:
        for name in ("shutil.rmtree", "mrpo_lab.storage.files._put_back"):
            no_clean_up.setattr(name, lambda *_, **__: None)
        with killed(Path, "rename", call, when):
            write_a_folder(folder)
    with suppress(Killed), replacing_folder(folder):
        raise Killed
    assert (folder / "one").read_text() in ("old", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    write_a_folder(folder)
    assert (folder / "one").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
