"""The learning rate: bit for bit that of transformers' schedules."""

import pytest
import torch
from transformers import get_scheduler

from mrpo_lab.training.schedule import SCHEDULES, learning_rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 10), (10, 10), (12, 10)])
def test_factors_are_those_of_transformers(schedule: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 3):
        factor = learning_rate_factor(step, schedule, warmup, total)
        assert theirs.get_last_lr() == [factor], step
        optimizer.step()
        theirs.step()
