"""The runs of one process that every engine is compared with, trained once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.equivalence import BF16, Lines, learned
from distributed.micro import metrics


@pytest.fixture(scope="session")
def one(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, a step a micro-batch."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    learned(digits, run_dir, 1)
    return run_dir


@pytest.fixture(scope="session")
def one_in_bf16(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    learned(digits, run_dir, 1, BF16)
    return run_dir


@pytest.fixture(scope="session")
def alone(one: Path) -> Lines:
    return metrics(one)


@pytest.fixture(scope="session")
def alone_in_bf16(one_in_bf16: Path) -> Lines:
    return metrics(one_in_bf16)
