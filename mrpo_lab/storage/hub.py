"""The Hugging Face hub, when it can be reached, and what to say when it cannot."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mrpo_lab.errors import UserError

logger = logging.getLogger(__name__)

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


class NotAtHandError(UserError):
    """Something of the hub is neither in its cache nor can it be fetched."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(missing([self]))


def missing(absent: Sequence[NotAtHandError]) -> str:
    """One line on all that is missing and what to do about it."""
    names = ", ".join(dict.fromkeys(error.name for error in absent))
    return (
        f"not in the hub's cache, and {absent[0].reason}: {names}. Give local copies: "
        "dataset.path=FOLDER_OR_FILE for the data; for a model its own path, or "
        "MRPO_LAB_MODELS=FOLDER with FOLDER/ORGANISATION/NAME in it"
    )


@functools.cache
def use_cache_if_unreachable() -> str | None:
    """Why the hub cannot be reached, if so; from then on only its local cache is asked.

    Its own client would try for half a minute, for every file anew.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return None  # only a request through the proxy could tell
    server = urlsplit(constants.ENDPOINT)
    port = server.port or {"http": 80}.get(server.scheme, 443)
    try:
        socket.create_connection((server.hostname or "", port), timeout=5).close()
    except OSError as error:
        # Both libraries read these when they are asked for something, not when imported.
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return f"the hub cannot be reached ({error.strerror or error})"
    return None


def snapshot(name: str, revision: str | None) -> Path:
    """Folder of a model in the hub's cache, downloaded first if it must be.

    Raises:
        NotAtHandError: it is not there and cannot be fetched.
    """
    from huggingface_hub import snapshot_download
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
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise NotAtHandError(name, f"the hub refused it ({detail})") from error
