"""The cache folder, for what many runs share: reference scores, token counts, embedded models."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mrpo_lab.errors import UserError
from mrpo_lab.storage.files import local_path, naming


def root() -> Path:
    """The cache folder: ``$MRPO_LAB_CACHE``, or ``outputs/cache`` if that is unset or empty."""
    return local_path(os.environ.get("MRPO_LAB_CACHE", "").strip() or "outputs/cache")


@contextmanager
def writing() -> Iterator[None]:
    """Turn an error while writing to the cache into one that says what to do.

    Raises:
        UserError: the cache's disk is full or cannot be written to.
    """
    try:
        with naming(root()):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {root()}: {error.strerror}: set MRPO_LAB_CACHE to "
            "another folder, or make room there; the same command goes on"
        ) from error
