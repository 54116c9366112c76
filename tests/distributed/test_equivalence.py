"""Many processes learn what one learns; a mistake in the reduction, the clip, the EMA or the scan is seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from distributed.equivalence import (
    BATCH,
    BF16,
    BF16_EMA_TOLERANCE,
    BF16_NORM_TOLERANCE,
    BF16_TOLERANCE,
    EMA_TOLERANCE,
    NORM_TOLERANCE,
    STEPS,
    TOLERANCE,
    Lines,
    apart,
    by_engine,
    distance,
    learned,
    resumed,
)
from distributed.micro import metrics, train, words
from distributed.world import world
from vmamba_dist.config import load as load_config
from vmamba_dist.data.augment import draw_mix

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
SLOW = pytest.mark.slow


def test_the_run_learns_and_mixes(digits: Path, alone: Lines, alone_in_bf16: Lines) -> None:
    """That it does as drawn is what the mutant `no_mixing` shows."""
    assert [line["step"] for line in alone] == list(range(1, STEPS + 1))
    for lines in (alone, alone_in_bf16):
        assert lines[-1]["eval/raw/loss"] <= 0.8 * lines[0]["loss"]
        assert lines[-1]["eval/ema/loss"] <= 0.8 * lines[0]["loss"]
        norms = [line["grad_norm"] for line in lines]
        assert max(norms) > 3 > min(norms)  # it clips some
    cfg = load_config(words(digits, digits))
    drawn = [draw_mix(cfg.augment, cfg.run.seed, step, cfg.data.image_size) for step in range(STEPS)]
    assert {mix.box is None for mix in drawn if mix} == {True, False}  # by mixup and by cutmix


# parallel.engine, ranks, samples a micro-batch: a rank's share of the 32 is one of them, or several.
CELLS = [
    pytest.param("ddp", 2, 16),
    pytest.param("ddp", 4, 8),
    pytest.param("ddp", 2, 4),
    pytest.param("ddp", 1, 8),
    pytest.param("fsdp", 4, 8),
    pytest.param("fsdp", 2, 4),
    pytest.param("fsdp", 1, 8, marks=SLOW),
    pytest.param("hsdp", 4, 8, marks=SLOW),
    pytest.param("hsdp", 4, 4),
]


@pytest.mark.parametrize(("engine", "ranks", "micro"), CELLS)
def test_all_learn_what_one_process_learns(
    engine: str, ranks: int, micro: int, digits: Path, one: Path, alone: Lines, tmp_path: Path
) -> None:
    lines = learned(digits, tmp_path, ranks, *by_engine(engine), f"parallel.micro_batch={micro}")
    assert [line["samples"] for line in lines] == [line["samples"] for line in alone]
    found = apart(one, tmp_path)
    assert found.loss <= TOLERANCE
    assert found.norm <= NORM_TOLERANCE
    assert found.ema <= EMA_TOLERANCE


CELLS_IN_BF16 = [
    pytest.param("ddp", 1, 8),
    pytest.param("ddp", 2, 16),
    pytest.param("ddp", 4, 4, marks=SLOW),
    pytest.param("fsdp", 4, 8, marks=SLOW),
    pytest.param("fsdp", 2, 4),
    pytest.param("hsdp", 4, 8, marks=SLOW),
    pytest.param("hsdp", 4, 4, marks=SLOW),
]


@pytest.mark.parametrize(("engine", "ranks", "micro"), CELLS_IN_BF16)
def test_all_learn_in_bfloat16_what_one_process_learns(
    engine: str, ranks: int, micro: int, digits: Path, one_in_bf16: Path, alone_in_bf16: Lines, tmp_path: Path
) -> None:
    lines = learned(digits, tmp_path, ranks, BF16, *by_engine(engine), f"parallel.micro_batch={micro}")
    found = apart(one_in_bf16, tmp_path)
    assert found.loss <= BF16_TOLERANCE
    assert found.norm <= BF16_NORM_TOLERANCE
    assert found.ema <= BF16_EMA_TOLERANCE
    # The first forward has the same weights: only the order in which samples' losses are summed differs.
    assert lines[0]["loss"] == pytest.approx(alone_in_bf16[0]["loss"], abs=1e-6)


@pytest.mark.parametrize("policy", ["block", "selective"])
def test_recompute_changes_no_bit(policy: str, digits: Path, tmp_path: Path, alone: Lines) -> None:
    assert learned(digits, tmp_path, 1, f"parallel.recompute={policy}") == alone


@pytest.mark.slow
def test_recompute_and_offload_change_no_bit_of_a_sharded_run(digits: Path, tmp_path: Path) -> None:
    plain = learned(digits, tmp_path / "plain", 2, *by_engine("fsdp"))
    for word in ("parallel.recompute=block", "parallel.recompute=selective", "parallel.cpu_offload=true"):
        assert learned(digits, tmp_path / word, 2, *by_engine("fsdp"), word) == plain


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("fsdp", 2)])
def test_compiled_blocks_learn_what_eager_ones_learn(
    engine: str, ranks: int, digits: Path, tmp_path: Path, alone: Lines
) -> None:
    words_of = [*by_engine(engine), "run.max_steps=3", "parallel.compile=block", "eval.every_epochs=0"]
    world(ranks).run(train, words(digits, tmp_path, *words_of), timeout_s=500)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses == pytest.approx([line["loss"] for line in alone[:3]], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("engine", "mutant"),
    [
        ("ddp", "no_gradient_mean"),
        ("ddp", "no_clip"),
        ("ddp", "late_ema"),
        ("ddp", "no_mixing"),
        ("fsdp", "whole_gradients_unreduced"),
        ("hsdp", "copies_unreduced"),
        *(pytest.param("fsdp", m, marks=SLOW) for m in ("no_gradient_mean", "no_clip", "late_ema")),
        *(pytest.param("hsdp", m, marks=SLOW) for m in ("no_gradient_mean", "copies_counted_twice")),
    ],
)
def test_a_mutant_is_seen(engine: str, mutant: str, digits: Path, one: Path, tmp_path: Path) -> None:
    ranks = 4 if engine == "hsdp" else 2
    learned(
        digits,
        tmp_path,
        ranks,
        *by_engine(engine),
        mutant=mutant,
        engine="ddp" if engine == "ddp" else "fsdp",
    )
    found = apart(one, tmp_path)
    assert found.loss > 10 * TOLERANCE
    assert found.ema > 10 * EMA_TOLERANCE


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=SLOW)])
def test_a_lost_carry_is_seen(engine: str, digits: Path, tmp_path: Path) -> None:
    state, lost = "a_state_that_matters", "lost_carry_of_a_state_that_matters"
    more = (*by_engine(engine), "data.image_size=32")
    one = learned(digits, tmp_path / "one", 1, more[-1], mutant=state)
    two = learned(digits, tmp_path / "two", 2, *more, mutant=state)
    sick = learned(digits, tmp_path / "sick", 2, *more, mutant=lost)
    assert distance(one, two) <= TOLERANCE
    assert distance(one, sick) > 10 * TOLERANCE


def test_a_resume_at_another_world_size_goes_on_within_rounding(
    digits: Path, alone: Lines, tmp_path: Path
) -> None:
    world(4).run(train, words(digits, tmp_path, "run.max_steps=7"))
    world(1).run(train, words(digits, tmp_path, "run.max_steps=13"))
    world(2).run(train, words(digits, tmp_path, f"run.max_steps={STEPS}"))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(alone, lines, strict=True)) <= TOLERANCE
    assert "attempt 3 begins at step 14" in (tmp_path / "train.log").read_text()


SAVED, LATER = 10, 15  # steps


@pytest.fixture(scope="module")
def saved(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Lines]]:
    """Of a sharding, on four ranks: a run that paused at step 10, and the lines of one that did not."""

    @cache
    def run(engine: str) -> tuple[Path, Lines]:
        folder = tmp_path_factory.mktemp(engine)
        for name, steps in (("saved", SAVED), ("unbroken", LATER)):
            more = (f"data.global_batch={BATCH}", f"run.max_steps={steps}", "checkpoint.every_steps=100")
            world(4).run(train, words(digits, folder / name, *more, *by_engine(engine)), timeout_s=240)
        return folder / "saved", metrics(folder / "unbroken")

    return run


@pytest.mark.parametrize(
    ("engine", "to", "ranks"),
    [
        ("fsdp", "fsdp", 4),
        ("fsdp", "fsdp", 3),  # a third of few rows is none for some
        pytest.param("hsdp", "ddp", 2, marks=SLOW),
        *(pytest.param("fsdp", "fsdp", ranks, marks=SLOW) for ranks in (1, 2)),
        *(pytest.param("fsdp", "ddp", ranks, marks=SLOW) for ranks in (1, 2, 3, 4)),
        pytest.param("fsdp", "hsdp", 4, marks=SLOW),
        pytest.param("hsdp", "hsdp", 4, marks=SLOW),
        pytest.param("hsdp", "fsdp", 3, marks=SLOW),
    ],
)
def test_what_four_ranks_saved_goes_on_anywhere(
    engine: str,
    to: str,
    ranks: int,
    saved: Callable[[str], tuple[Path, Lines]],
    digits: Path,
    tmp_path: Path,
) -> None:
    """Loaded bit for bit (asserted in `resumed`), and the next losses are those of the run that did not stop."""
    run_dir, unbroken = saved(engine)
    lines = resumed(run_dir, tmp_path / "run", digits, ranks, LATER, *by_engine(to))
    assert [line["samples"] for line in lines] == [line["samples"] for line in unbroken]
    losses, expected = ([line["loss"] for line in both] for both in (lines[SAVED:], unbroken[SAVED:]))
    assert len(losses) == LATER - SAVED
    if (to, ranks) == (engine, 4):
        assert lines[SAVED:] == unbroken[SAVED:]
    assert losses == pytest.approx(expected, rel=0, abs=TOLERANCE)


@pytest.mark.slow
def test_the_quick_start_learns_the_same_sharded(digits: Path, tmp_path: Path) -> None:
    columns = {}
    for engine in ("ddp", "fsdp"):
        run_dir = tmp_path / engine
        args = ["config=configs/quickstart.yaml", f"run.dir={run_dir}", f"data.train={digits}"]
        args += ["run.max_steps=20", "telemetry.tensorboard=false", "precision.compute=float32"]
        args += by_engine(engine)
        world(2).run(train, args, timeout_s=400)
        columns[engine] = [line["loss"] for line in metrics(run_dir)]
    assert len(columns["ddp"]) == 20
    assert columns["ddp"][-1] <= 0.8 * columns["ddp"][0]
    assert columns["fsdp"] == pytest.approx(columns["ddp"], rel=0, abs=TOLERANCE)
