"""Paths that users write, and writing files that other processes may be reading."""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mrpo_lab.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def local_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user wrote; ``~`` and ``~NAME`` at its beginning are home folders.

    Raises:
        UserError: it is no text, or blank, or there is no such home folder.
    """
    if not isinstance(text, (str, os.PathLike)) or not str(text).strip():
        raise UserError(f"expected the path of a folder or a file, got {text!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: there is no such home folder") from error


def path_argument(text: str) -> Path:
    """A path on the command line, for argparse: ``~`` is the home folder.

    Raises:
        argparse.ArgumentTypeError: the text is empty.
    """
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Replace a file atomically by the one that is written to the path that is yielded.

    Readers see the old content or the new, never a part, and so does whoever comes after a loss of
    power. If writing fails, no draft is left.

    Args:
        lasting: whether to wait until the file is on the disk, some 10 ms. Without, a loss of power
            may leave an empty file: for what can be made again, and is checked when it is read.

    Raises:
        OSError: the file could not be written; ``filename`` is ``path``.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path):
            yield draft
            if lasting:
                flush(draft)
            os.replace(draft, path)
            if lasting:
                flush_names(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Replace a folder by the one that is written to the path that is yielded.

    If writing fails, the former folder is left and no draft. It is moved aside before the new one
    takes its place: what a kill between the two leaves aside is put back by the next call.

    Raises:
        OSError: the folder could not be written; ``filename`` is ``path``.
    """
    draft, former = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "former"))
    shutil.rmtree(draft, ignore_errors=True)
    _put_back(former, path)
    try:
        with naming(path):
            yield draft
            flush_tree(draft)
            if path.exists():
                path.rename(former)
            draft.rename(path)
            flush_names(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _put_back(former, path)


def _put_back(former: Path, path: Path) -> None:
    """Move a folder back from aside, or remove it where another has taken its place."""
    if path.exists():
        shutil.rmtree(former, ignore_errors=True)
    else:
        with suppress(OSError):
            former.rename(path)


def flush(file: Path) -> None:
    """Wait until the content of a file is on the disk.

    Raises:
        OSError: it cannot be stored; some file systems find out only here that they are full.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until all files in and below a folder are on the disk, contents and names.

    Raises:
        OSError: see ``flush``.
    """
    for entry in (*folder.rglob("*"), folder):
        if entry.is_dir():
            flush_names(entry)
        else:
            flush(entry)


def flush_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk.

    File systems that cannot do this, and folders that may not be read, are passed over.
    """
    with suppress(OSError):
        flush(folder)
        _flush_way(folder.absolute(), folder.stat().st_ino)


@functools.cache  # a folder needs it once, after it was made
def _flush_way(folder: Path, _inode: int) -> None:
    """Wait until the folders that lead to ``folder`` are on the disk, which may be new as well."""
    for place, parent in pairwise((folder, *folder.parents)):
        if place.stat().st_dev != parent.stat().st_dev:
            return  # where a file system begins is not new
        with suppress(OSError):
            flush(parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error while writing one that names ``path``.

    Python names no file when a write fails, only when opening one does; and libraries in Rust, such
    as safetensors and tokenizers, raise errors of their own.

    Raises:
        OSError: for an ``OSError``, or another library's error that says what the system said.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def write_whole(path: Path, content: bytes, *, lasting: bool = True) -> None:
    """Replace a file atomically; see ``replacing``, also for ``lasting``.

    Raises:
        OSError: the file could not be written; no draft is left.
    """
    with replacing(path, lasting=lasting) as draft:
        draft.write_bytes(content)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Replace a parquet file atomically."""
    import pyarrow as pa  # here, because dispatching runs needs no pyarrow
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_whole(path, buffer.getvalue().to_pybytes())


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock on ``file``, as ``filelock.FileLock`` takes it.

    A run's folder has such a file, ``.lock``. Processes on other machines count only where the file
    system shares its locks. A file that does not exist is not locked.
    """
    if not file.exists():
        return False
    descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
