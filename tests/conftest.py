"""One thread a process, set before torch is imported: two spinning threads made a forward 5× slower.

Without an NVIDIA driver Triton's kernels run in its interpreter, which must be chosen before triton is imported.
"""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pytest
import torch

from distributed import world
from vmamba_dist.data.shards import pack

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as a set of shards, which no test changes."""
    folder = tmp_path_factory.mktemp("digits") / "set"
    pack("digits", folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _workers() -> Iterator[None]:
    """End the pool of gloo workers with the session."""
    yield
    world.close()
