"""Two GPUs over NCCL learn what one learns, under every engine, and go on with each other's checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.equivalence import STEPS, Lines, by_engine, distance
from distributed.launcher import Launcher
from distributed.micro import metrics, words

pytestmark = [pytest.mark.distributed, pytest.mark.multigpu, pytest.mark.timeout(400)]

ENGINES = {
    "ddp": by_engine("ddp"),
    "fsdp": by_engine("fsdp"),
    **{f"zero{n}": ["parallel.engine=deepspeed", f"parallel.zero_stage={n}"] for n in (1, 2, 3)},
}
# Measured on two H100s: 6.3e-5 to 7.4e-5, and 1.9e-3. Wider than on a CPU, where 1e-5 holds; why is not known.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


def learned(launcher: Launcher, digits: Path, run_dir: Path, ranks: int, *more: str) -> Lines:
    run_dir.mkdir(parents=True, exist_ok=True)
    args = words(
        digits,
        run_dir,
        f"run.max_steps={STEPS}",
        "checkpoint.every_steps=100",
        "precision.device=cuda",
        *more,
    )
    output = run_dir / "output"
    launcher.wait(launcher.start(ranks, args, output), 200)
    lines = metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    assert lines, output.read_text()
    return lines


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(
    request: pytest.FixtureRequest, launcher: Launcher, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Lines]:
    word = f"precision.compute={request.param}"
    return request.param, learned(launcher, digits, tmp_path_factory.mktemp("alone") / "run", 1, word)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_learn_what_one_learns(
    engine: str, launcher: Launcher, digits: Path, alone: tuple[str, Lines], tmp_path: Path
) -> None:
    compute, one = alone
    two = learned(launcher, digits, tmp_path / "two", 2, f"precision.compute={compute}", *ENGINES[engine])
    apart = distance(one, two)
    print(f"{engine} {compute}: losses differ by {apart:.1e}, norms by {distance(one, two, 'grad_norm'):.1e}")
    assert two[-1]["eval/raw/loss"] <= 0.8 * two[0]["loss"]
    assert apart <= TOLERANCE[compute]


def test_what_two_gpus_saved_goes_on_under_another_engine_and_alone(
    launcher: Launcher, digits: Path, tmp_path: Path
) -> None:
    whole = learned(launcher, digits, tmp_path / "whole", 1, "precision.compute=float32")
    first = ["precision.compute=float32", *ENGINES["fsdp"], "run.max_steps=8"]
    learned(launcher, digits, tmp_path / "fsdp", 2, *first)
    for name, ranks in (("zero3", 2), ("ddp", 1), ("fsdp", 2)):
        shutil.copytree(tmp_path / "fsdp", tmp_path / f"on-{name}")
        lines = learned(
            launcher, digits, tmp_path / f"on-{name}", ranks, "precision.compute=float32", *ENGINES[name]
        )
        assert "begins at step 9" in (tmp_path / f"on-{name}" / "train.log").read_text()
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        losses = [[line["loss"] for line in run] for run in (whole, lines)]
        assert losses[1] == pytest.approx(losses[0], rel=0, abs=TOLERANCE["float32"])
