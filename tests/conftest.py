"""What must happen before any test module imports the package, and shared fixtures."""

import os
from pathlib import Path

import pytest

# Two workers share two cores, and what is computed here is too small for a second thread anyway.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# --- Axis annotations are executed: a transposed (K, B) tensor fails by its argument's name -------
# (tests/test_losses.py shows that it does.) Nothing above may import mrpo_lab.
from jaxtyping import install_import_hook

install_import_hook(
    [
        f"mrpo_lab.{name}"
        for name in ("objective", "scoring", "models", "training", "runs", "merging")
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int is a float
)
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny7_dir() -> Path:
    """Folder of the seven models, one below it for each; built once and kept in the cache."""
    from mrpo_lab.embedded import folder

    return folder("tiny7/tiny-qwen2").parent.resolve()
