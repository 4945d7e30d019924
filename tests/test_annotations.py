"""Axis annotations are executed in every module that carries them."""

import importlib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from mrpo_lab.scoring.head import Head

ROOT = Path(__file__).parents[1]
ANNOTATED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "mrpo_lab").rglob("*.py"))
    if "from jaxtyping import" in path.read_text()
]


@pytest.mark.parametrize("name", ANNOTATED)
def test_module_is_imported_with_its_annotations_executed(name: str) -> None:
    """The list of packages in conftest.py has the module's package."""
    module = importlib.import_module(name)
    assert type(module.__loader__).__module__.startswith("jaxtyping.")


def test_wrong_axes_are_named_outside_the_objective_too() -> None:
    head = Head(nn.Linear(4, 9), vocabulary=9)
    hidden, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    assert head.token_logps(hidden, targets).shape == (3,)
    with pytest.raises(TypeCheckError, match="parameter 'targets'"):
        head.token_logps(hidden, targets[:2])
