"""Where things that many runs share live: reference scores, token counts, embedded models."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mrpo_lab.errors import UserError


def root() -> Path:
    """``$MRPO_LAB_CACHE``, or ``outputs/cache`` below the working directory where it is empty."""
    return Path(os.environ.get("MRPO_LAB_CACHE") or "outputs/cache")


@contextmanager
def writing() -> Iterator[None]:
    """Say what to do where writing fails.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {root()}: {error.strerror}: set MRPO_LAB_CACHE"
        ) from error
