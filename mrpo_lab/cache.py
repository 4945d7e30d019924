"""Where things that many runs share live: reference scores, token counts, embedded models."""

import os
from pathlib import Path


def root() -> Path:
    """``$MRPO_LAB_CACHE``, or ``outputs/cache`` below the working directory."""
    return Path(os.environ.get("MRPO_LAB_CACHE", "outputs/cache"))
