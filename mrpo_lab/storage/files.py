"""Writing files that other processes may be reading."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file atomically: readers see the old content or the new, never a part."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)


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
