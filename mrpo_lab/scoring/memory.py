"""Passes that fit into memory: their size is halved once, and what still does not fit is named."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from mrpo_lab.errors import UserError
from mrpo_lab.scoring.packing import balanced

T = TypeVar("T")

logger = logging.getLogger(__name__)

PHRASES = ("out of memory", "allocate memory", "bad_alloc", "alloc_failed")
"""Parts of the messages of errors that have no class of their own: torch's allocator for CPUs and
libraries of CUDA raise RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        phrase in str(error).lower() for phrase in PHRASES
    )


@contextmanager
def fitting(what: str, advice: str) -> Iterator[None]:
    """Turn an error of the memory in this block into one line.

    Raises:
        UserError: memory ran out; says that ``what`` does not fit into it, and the ``advice``.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    release()  # only here have the frames of the failed call, and the tensors in them, been freed
    raise UserError(f"{what} does not fit into memory: {advice}")


def release() -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PassSize:
    """Largest number of tokens in one pass. It is halved once, if such a pass does not fit."""

    def __init__(self, tokens: int, setting: str) -> None:
        """
        Args:
            setting: the configuration's name of the number, for messages.
        """
        self.tokens, self._setting = tokens, setting
        self._halved = False

    def run(
        self,
        costs: Sequence[int],
        compute: Callable[[list[int]], T],
        start_over: Callable[[], None] | None = None,
    ) -> list[tuple[list[int], T]]:
        """Compute items in passes of at most ``tokens`` tokens, the costliest first.

        If one runs out of memory, what it held is freed and ``tokens`` becomes half of what it had,
        for this call and all later ones. Each item is computed by itself, so that smaller passes
        change the rounding of sums over them and nothing else.

        Args:
            costs: number of tokens of each item.
            compute: computes the items at some indices.
            start_over: undoes everything that ``compute`` has done, before all items are computed
                again; if it is not given, only the others are.

        Returns:
            The indices and the result of each pass.

        Raises:
            UserError: an item alone, or a pass of half the size, does not fit either.
        """
        done: list[tuple[list[int], T]] = []
        groups = balanced(costs, self.tokens)
        while groups:
            try:
                result = compute(groups[0])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            else:
                done.append((groups.pop(0), result))
                continue
            # Only here have the frames of the failed pass, and the tensors in them, been freed.
            self._halve([costs[i] for i in groups[0]])
            if start_over is not None:
                start_over()
                done.clear()
            left = range(len(costs)) if start_over else [i for group in groups for i in group]
            parts = balanced([costs[i] for i in left], self.tokens)
            groups = [[left[i] for i in part] for part in parts]
        return done

    def _halve(self, costs: Sequence[int]) -> None:
        """Halve the size after a pass of items with these ``costs`` did not fit.

        Raises:
            UserError: it cannot be halved, or not once more.
        """
        release()
        tokens = sum(costs)
        problem = f"{self._setting}: {tokens:,} tokens in one pass do not fit into memory"
        if len(costs) == 1:
            raise UserError(f"{problem}, and they are one item: lower dataset.max_tokens")
        if self._halved:
            raise UserError(f"{problem}, nor did twice as many: lower {self._setting}")
        self._halved, self.tokens = True, max(1, tokens // 2)
        logger.warning("%s: from now on there are %s at most", problem, f"{self.tokens:,}")
