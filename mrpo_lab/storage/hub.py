"""Access to the Hugging Face hub, and error messages for where it cannot be reached."""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mrpo_lab.errors import UserError, first_line
from mrpo_lab.storage.network import connection_error

logger = logging.getLogger(__name__)

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "*.codes"]
"""The files of a model that are downloaded."""


NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NotAtHandError(UserError):
    """A model or data set that is neither in the hub's local cache nor can be downloaded.

    Attributes:
        name: its name on the hub.
        reason: why it cannot be downloaded.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(missing([self]))


def missing(absent: Sequence[NotAtHandError]) -> str:
    """One line that names all that is missing and says what to do."""
    names = ", ".join(dict.fromkeys(error.name for error in absent))
    return (
        f"not in the hub's cache, and {absent[0].reason}: {names}. Give local copies: "
        "dataset.path=FOLDER_OR_FILE for the data; for a model its own path, or "
        "MRPO_LAB_MODELS=FOLDER with FOLDER/ORGANIZATION/NAME in it"
    )


@functools.cache
def use_cache_if_unreachable() -> str | None:
    """Switch the hub's clients to their local cache if the hub cannot be reached.

    Without the switch they retry for half a minute for every file.

    Returns:
        Why the hub cannot be reached, or None if it can be.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return None  # only a request through the proxy could tell
    error = connection_error(constants.ENDPOINT)
    if error is None:
        return None
    # Both libraries read these values at each request, not at import.
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    return f"the hub cannot be reached ({error.strerror or error})"


def snapshot(name: str, revision: str | None) -> Path:
    """The folder of a model in the hub's local cache, after downloading it if needed.

    Raises:
        NotAtHandError: it is not there and cannot be downloaded.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=FILES, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        reason = use_cache_if_unreachable()
    if reason:
        raise NotAtHandError(name, reason)
    logger.info("downloading %s", name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        refuse_full_disk(error, constants.HF_HUB_CACHE)
        raise NotAtHandError(name, f"the hub refused it ({first_line(error)})") from error


def refuse_full_disk(error: BaseException, place: str | Path) -> None:
    """Raise another error if ``error``, or one that caused it, is that a disk cannot be written to.

    Args:
        place: the folder that was written to.

    Raises:
        UserError: names ``place`` and says what to do.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NOT_WRITABLE:
            raise UserError(
                f"cannot write to the hub's cache {place}: {os.strerror(cause.errno)}: set HF_HOME "
                "to another folder, or make room there"
            ) from error
        cause = cause.__cause__ or cause.__context__
