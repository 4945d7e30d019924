"""A pytest plugin: what whole runs find around them, the same on every machine."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def score_store(tiny7_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the shared models and no scores: nothing of an earlier session decides."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(tiny7_dir.parent)
    return folder


@pytest.fixture
def surroundings(score_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store, and no setting of whoever runs the tests."""
    monkeypatch.setenv("MRPO_LAB_CACHE", str(score_store))
    for name in ("HYDRA_FULL_ERROR", "WANDB_MODE", "WANDB_API_KEY", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
