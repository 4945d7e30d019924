"""Progress bars, and silencing warnings of other libraries."""

import logging
import sys
import warnings
from typing import Any

from tqdm import tqdm

from mrpo_lab.console import PrintableRecord


def progress(total: int, doing: str, unit: str, **options: Any) -> "tqdm[Any]":
    """A progress bar, updated five times a second in a terminal, every half minute in a log file.

    Args:
        options: further arguments of ``tqdm``.
    """
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
    """Silence messages that users can do nothing about, and keep control characters out of others.

    Call this before importing libraries.
    """
    logging.setLogRecordFactory(PrintableRecord)
    # It looks for an optional kernel on the hub when imported, and falls back to its own.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # peft uses the name that this attribute had before transformers 5.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # It logs a line per request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
