"""Writing files that other processes may be reading."""

from __future__ import annotations

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
