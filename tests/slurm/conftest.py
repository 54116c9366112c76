"""The cluster of virtual nodes, up for the session; a failure, not a skip, where it could be brought up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed import micro
from slurm import lab


@pytest.fixture(scope="session", autouse=True)
def _cluster() -> Iterator[None]:
    """Bring the cluster up, and down again if it was down before."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("a Slurm of virtual nodes needs root on a Debian")
    before = os.environ.get("SLURM_CONF")
    was_up = lab.cluster("status", check=False).returncode == 0
    lab.cluster("up")
    os.environ["SLURM_CONF"] = lab.cluster("env").stdout.strip().partition("=")[2]
    try:
        yield
    finally:
        if not was_up:
            lab.cluster("down")
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(autouse=True)
def _nothing_left(_cluster: None) -> Iterator[None]:
    """Cancel what a test has left in the queue, and see that every node is there for the next."""
    yield
    lab.slurm("scancel", "--user=root")
    lab.wait_until(lambda: not lab.slurm("squeue", "-h"), "an empty queue")
    lab.cluster("up")


@pytest.fixture(scope="session")
def words(digits: Path) -> list[str]:
    """The micro run as a job of two nodes with two processes each; run.dir is still to be named."""
    ours = micro.words(digits, Path("nowhere"))
    return [*ours[1:], "launch.nodes=2", "launch.tasks_per_node=2", "launch.time_limit_min=10"]


@pytest.fixture(scope="session")
def whole(_cluster: None, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> lab.Job:
    """The run that nobody disturbed, with a reader process a rank and so two cores each."""
    job = lab.submit(words, tmp_path_factory.mktemp("whole") / "run", "data.workers=1")
    job.await_end()
    return job
