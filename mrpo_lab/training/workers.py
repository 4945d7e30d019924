"""The processes that train together, one or many, under ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# One process scores references while the others wait; a 14B model takes hours.
PATIENCE = timedelta(hours=48)


@dataclass(frozen=True)
class Workers:
    """This process's place among ``count`` that hold the same model and see the same batches."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls) -> Workers:
        """Join the group that the launcher set up in the environment, if any."""
        from accelerate import PartialState

        state = PartialState(timeout=PATIENCE, cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> range:
        """Indices of the rows that are this process's: every ``count``-th."""
        return range(self.rank, rows, self.count)

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def any(self, wish: bool) -> bool:
        """Whether some process has the wish; all processes learn the same."""
        if self.count == 1:
            return wish
        wishes = torch.tensor(float(wish), device=self.device)
        dist.all_reduce(wishes)
        return bool(wishes)

    def main_first(self, compute: Callable[[], T]) -> T:
        """``compute()`` on every process; the others find in the store what the main one put."""
        result = [compute()] if self.is_main else []
        self.wait()
        return result[0] if result else compute()

    def gather(self, values: Tensor, mine: Sequence[int], total: int) -> Tensor:
        """(total, ...) on the CPU, of which ``values`` are this process's rows, ``mine``."""
        whole = torch.zeros(total, *values.shape[1:], dtype=values.dtype, device=self.device)
        whole[list(mine)] = values.to(self.device)
        if self.count > 1:
            dist.all_reduce(whole)
        return whole.cpu()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up every process's gradients; a process without rows adds nothing.

        Done once per step over plain gradients rather than by a wrapper around the model, so that
        processes may have different numbers of micro-batches.
        """
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
