"""The processes that train one run together, under ``accelerate launch`` or SLURM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# The other processes wait while one scores the references, which takes hours for a 14B model.
PATIENCE = timedelta(hours=48)


@dataclass(frozen=True)
class Workers:
    """This process's rank among the processes that hold the same model and see the same batches."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls) -> Workers:
        """Join the process group that the environment describes, if there is one."""
        from accelerate import PartialState

        state = PartialState(timeout=PATIENCE, cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> range:
        """Indices of the rows that this process computes: every ``count``-th one."""
        return range(self.rank, rows, self.count)

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def any(self, wish: bool) -> bool:
        """Whether ``wish`` is true in any process; all processes get the same answer."""
        if self.count == 1:
            return wish
        wishes = torch.tensor(float(wish), device=self.device)
        dist.all_reduce(wishes)
        return bool(wishes)

    def main_first(self, compute: Callable[[], T]) -> T:
        """Run ``compute()`` in the main process first, then in the others.

        The others find in the cache what the main one computed.
        """
        result = [compute()] if self.is_main else []
        self.wait()
        return result[0] if result else compute()

    def gather(self, values: Tensor, mine: Sequence[int], total: int) -> Tensor:
        """Collect rows from all processes into (total, ...) on the CPU.

        Args:
            values: this process's rows.
            mine: their indices in the whole.
        """
        whole = torch.zeros(total, *values.shape[1:], dtype=values.dtype, device=self.device)
        whole[list(mine)] = values.to(self.device)
        if self.count > 1:
            dist.all_reduce(whole)
        return whole.cpu()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place.

        Done once per step on plain gradients rather than by a wrapper around the model, so that
        processes may have different numbers of micro-batches, or none.
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
