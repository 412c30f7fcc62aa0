"""One SLURM cluster of three nodes for the whole session, mended before every test. Skipped where SLURM is not installed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamem.testing.slurm_cluster import SlurmCluster, missing_packages


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder need SLURM."""
    if missing := missing_packages():
        skip = pytest.mark.skip(reason=f"SLURM is not installed: apt-get install {' '.join(missing)}")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Three nodes of 4 CPUs, 8000 MB and 2 fake GPUs: jobs of two nodes can lose one. ``cluster`` is the same in a known state."""
    # Not pytest's own directory: munge's socket needs a short path.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster.start(Path(folder), nodes=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The session's cluster, idle, with every node up; afterwards no process of a job is left."""
    slurm_cluster.reset()
    yield slurm_cluster
    slurm_cluster.reset()
