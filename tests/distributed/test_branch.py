"""A shorter budget that branches from a longer run's constant phase equals a run of its own, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.micro import metrics, train, words
from distributed.world import world
from vmamba_dist.config import ConfigError

pytestmark = pytest.mark.distributed
BATCH = 32
LONG, SHORT = 24 * BATCH, 12 * BATCH  # budgets; the short one decays from step 9 on


def budget(samples: int) -> list[str]:
    return [
        "model.width=8",
        "schedule.kind=wsd",
        f"schedule.samples={samples}",
        "schedule.decay=0.25",
        f"schedule.warmup_samples={2 * BATCH}",
        "eval.every_epochs=0",
        "checkpoint.keep_best=false",
    ]


def test_a_branch_equals_a_run_of_its_own(digits: Path, tmp_path: Path) -> None:
    seldom = "checkpoint.every_steps=1000"
    trunk, own, branch = (tmp_path / name for name in ("trunk", "own", "branch"))
    assert world(1).run(train, words(digits, trunk, *budget(LONG), "checkpoint.keep_every=4")) == ["finished"]
    assert world(1).run(train, words(digits, own, *budget(SHORT), seldom)) == ["finished"]
    start = f"run.resume={trunk}/checkpoints/step-000000008"
    assert world(1).run(train, words(digits, branch, *budget(SHORT), start, seldom)) == ["finished"]
    assert [line["step"] for line in metrics(branch)] == [9, 10, 11, 12]
    assert metrics(branch) == metrics(own)[8:]
    assert metrics(branch)[-1]["lr"] < metrics(trunk)[11]["lr"]  # the trunk was not decaying yet

    late = f"run.resume={trunk}/checkpoints/step-000000012"
    with pytest.raises(ConfigError, match=r"schedule\.samples was 768, now 384"):
        world(1).run(train, words(digits, tmp_path / "late", *budget(SHORT), late))
