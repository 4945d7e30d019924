"""Progress bars with an ETA, and other libraries kept quiet."""

import logging
import sys
import warnings
from typing import Any

from tqdm import tqdm


def progress(total: int, doing: str, unit: str, **options: Any) -> "tqdm[Any]":
    """A bar on a terminal; in a log file a line every half minute."""
    every = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        desc=doing,
        unit=unit,
        mininterval=every,
        maxinterval=2 * every,
        dynamic_ncols=True,
        **options,
    )


def quiet_libraries() -> None:
    """Silence what says nothing to our users, each for its reason. Before they are imported."""
    # When imported it looks for a compiled kernel that would come from the hub; it has its own.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # peft asks for an attribute by the name that it had before transformers 5.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # A line for every request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
