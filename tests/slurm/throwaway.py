"""A pytest plugin: the cluster of this session, and a laboratory on it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import cluster
import pytest
from laboratory import Lab


@pytest.fixture(scope="session")
def slurm(score_store: Path) -> Iterator[Path]:
    """Up for the session. There is no test without it: what is missing fails."""
    if absent := cluster.missing_programs():
        pytest.fail(f"no {', '.join(absent)}: as root, python3 tests/slurm/cluster.py install")
    root = Path(f"/tmp/mrpo-slurm-{os.getpid()}")
    there = cluster.Cluster(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MRPO_LAB_CACHE", str(score_store))
        patch.setenv("SLURM_CONF", str(there.config))
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            there.up()
            yield root
        finally:
            there.down()
            shutil.rmtree(root)


@pytest.fixture
def lab(slurm: Path, tmp_path: Path) -> Lab:
    (tmp_path / "plants").mkdir()
    return Lab(tmp_path)
