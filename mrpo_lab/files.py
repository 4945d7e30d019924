"""Files that many processes read and write."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Readers see the old content or the new, never a part."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)
