"""A study is a function of its config: sizes, budgets, branches and costs, before anything runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmamba_dist.config import Config, ConfigError, load
from vmamba_dist.models import flops, get_variant
from vmamba_dist.models.variants import configured
from vmamba_dist.optim.schedule import build_schedule
from vmamba_dist.scaling import verbs
from vmamba_dist.scaling.study import (
    Choice,
    Point,
    choose_lrs,
    plan_study,
    round_width,
    rule_widths,
    totals,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.name=vmamba_atto",
    "model.num_classes=10",
    "data.image_size=32",
    "data.global_batch=64",
    "schedule.kind=wsd",
    "schedule.warmup=0.1",
    "optim.lr_batch=0",
    "run.dir=runs/s",
]
GRID = [*SMALL, "study.widths=[8,16,24,32]", "study.samples=[6400,12800,25600]"]


def of(study_points: Sequence[Point], label: str) -> list[Point]:
    return [p for p in study_points if p.rung.label == label]


def test_widths_of_a_rule_divide_by_16_below_base_and_by_64_from_there() -> None:
    widths = rule_widths(16, 512, 12)
    assert widths[0] == 16
    assert widths[-1] == 512
    for width in [*widths, *(round_width(w / 7) for w in range(70, 4200))]:
        assert width % (16 if width < 128 else 64) == 0
        dims = get_variant("vmamba_atto", dims=width).dims
        assert all(d % (16 if width < 128 else 64) == 0 for d in dims)


def test_a_rule_in_width_depth_and_ratio_makes_models_that_a_run_can_name() -> None:
    words = [
        *SMALL,
        "study.sizes=4",
        "study.width_from=32",
        "study.width_to=256",
        "study.depth_power=0.5",
        "model.ssm_ratio=2",
        "study.samples=[6400,12800,25600]",
    ]
    study = plan_study(load(words))
    assert [configured(r.model).dims[0] for r in study.rungs] == [32, 64, 128, 256]
    assert [configured(r.model).depths[2] for r in study.rungs] == [2, 3, 4, 6]
    for point in study.planned:
        built = configured(load([*words, *point.words]).model)
        assert built == configured(point.rung.model)
        assert built.ssm_ratio == 2
        assert flops.params(built, 0) == point.rung.params


def test_each_point_is_an_ordinary_run_with_its_own_budget() -> None:
    study = plan_study(load(GRID))
    lrs = {rung.label: 1e-3 * 2**i for i, rung in enumerate(study.rungs)}
    points = study.grid(lrs)
    assert len({p.name for p in points}) == len(points) == 12
    for point in points:
        cfg = load([*GRID, *point.words])
        assert cfg.schedule.samples == point.samples
        assert cfg.run.dir == f"runs/s/{point.name}"
        assert cfg.optim.lr == pytest.approx(lrs[point.rung.label])
        assert point.flops == point.samples * flops.train_flops_per_image(configured(cfg.model), 32, 32, 10)


def test_points_branch_where_both_schedules_are_constant() -> None:
    """Law of branching: the trunk's lr and the branch's agree on every step before the checkpoint."""
    study = plan_study(load(GRID))
    branched = [p for p in study.planned if p.branch_from]
    assert len(branched) == 8  # of three budgets the longest is the trunk
    by_name = {p.name: p for p in study.planned}

    def schedule(point: Point) -> tuple[Config, object]:
        cfg = load([*GRID, *point.words])
        return cfg, build_schedule(cfg.schedule, cfg.optim, global_batch=64, total_samples=point.samples)

    for point in branched:
        assert point.branch_from is not None
        trunk = by_name[point.branch_from.point]
        cfg, ours = schedule(point)
        trunk_cfg, theirs = schedule(trunk)
        start = point.branch_from.samples
        assert 0 < start < point.samples < trunk.samples
        assert all(ours(n) == theirs(n) for n in range(0, start, 64))  # type: ignore[operator]
        assert ours.same_until(theirs, start)  # type: ignore[attr-defined]
        assert point.branch_from.step % trunk_cfg.checkpoint.keep_every == 0
        assert cfg.run.seed == trunk_cfg.run.seed
        assert point.cost_flops == point.rung.flops * (point.samples - start)
        word = point.branch_from.word("runs/s")
        assert load([*GRID, word]).run.resume.endswith(f"{trunk.name}/checkpoints/step-{start // 64:09d}")


def test_without_a_constant_phase_nothing_is_shared() -> None:
    for words in ([*GRID, "schedule.kind=cosine"], [*GRID, "study.branch=false"]):
        assert all(p.branch_from is None for p in plan_study(load(words)).planned)


def test_the_largest_are_held_out() -> None:
    study = plan_study(load([*GRID, "study.held_out=1", "study.models=[vmamba_pico]"]))
    assert [r.label for r in study.rungs if r.held_out] == ["vmamba_pico"]
    assert study.rungs[-1].label == "vmamba_pico"


def test_levels_fill_the_budget_and_no_more() -> None:
    for total in (1e14, 1e15):
        words = [*SMALL, "study.widths=[8,16,24,32]", "study.levels=4", f"study.total_flops={total}"]
        study = plan_study(load(words))
        spent, hours = totals(study.points)
        assert 0.9 * total < spent <= total
        assert hours is None
        assert [b / a for a, b in zip(study.levels, study.levels[1:], strict=False)] == pytest.approx(
            [2, 2, 2]
        )
        for point in study.planned:
            assert point.level is not None
            assert abs(point.flops / point.level - 1) < 0.51 * 64 / point.samples + 1e-9


def test_gpu_hours_follow_the_planner() -> None:
    words = [
        *SMALL,
        "study.widths=[8,16,24,32]",
        "study.levels=4",
        "study.gpu=h100-80",
        "study.total_gpu_hours=0.5",
    ]
    study = plan_study(load(words))
    hours = totals(study.points)[1]
    assert hours is not None
    assert 0.4 < hours <= 0.5


def test_the_search_finds_the_lowest_point_of_a_parabola_and_carries_it_over() -> None:
    words = [*GRID, "study.lrs=[1e-3,2e-3,4e-3,8e-3]", "study.search_sizes=3", "study.search_samples=6400"]
    study = plan_study(load(words))
    assert len(study.search) == 12

    def best(params: int) -> float:  # a power law of the parameters
        return 3e-3 * (params / study.rungs[0].params) ** -0.2

    losses = {
        p.name: 2 + (math.log(load([*words, *p.words]).optim.lr / best(p.rung.params))) ** 2
        for p in study.search
    }
    chosen = choose_lrs(study, losses)
    for rung in study.rungs:
        assert chosen[rung.label].lr == pytest.approx(best(rung.params), rel=1e-6)
    assert chosen[study.rungs[-1].label].how.startswith("transferred: ∝ params^-0.20")
    by_size = [[p.name for p in study.search if p.rung == rung] for rung in study.rungs]
    fast = choose_lrs(study, {p.name: -load([*words, *p.words]).optim.lr for p in study.search})
    assert fast[study.rungs[-1].label] == Choice(pytest.approx(8e-3), "transferred: ∝ params^0.00")  # type: ignore[arg-type]
    lowest = zip(by_size, ("lr0.001", "lr0.004", "lr0.008"), strict=False)
    steep = {name: float(not name.endswith(lr)) for names, lr in lowest for name in names}
    cut = choose_lrs(study, steep)[study.rungs[-1].label]
    assert cut.lr == 8e-3
    assert cut.how.endswith("cut to what was tried")
    edge = choose_lrs(study, {p.name: load([*words, *p.words]).optim.lr for p in study.search})
    assert "edge" in edge[study.rungs[0].label].how
    with pytest.raises(ConfigError, match="no run that ended with a finite loss"):
        choose_lrs(study, dict.fromkeys(losses, math.nan))


def test_held_out_models_are_searched_when_asked() -> None:
    words = [*GRID, "study.lrs=[1e-3,2e-3]", "study.held_out=1"]
    for asked, sizes in ((False, 3), (True, 4)):
        study = plan_study(load([*words, f"study.search_held_out={asked}"]))
        assert len(study.rungs) == 4
        assert len({p.rung.label for p in study.search}) == sizes
        assert len(study.search) == 2 * sizes
        losses = {p.name: float(p.name.endswith("0.001")) for p in study.search}
        assert choose_lrs(study, losses)[study.rungs[-1].label].how.startswith(
            "search" if asked else "transferred"
        )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["study.widths=[8,16,24]", "study.levels=3", "study.total_flops=1e6"], "too small for any point"),
        (["study.widths=[8,16,24]", "study.levels=3"], "what the study may cost"),
        (["study.widths=[8,16]", "study.samples=[640,1280]"], "4 points to fit"),
        (["study.widths=[8,16]", "study.samples=[640,1280,2560]"], "2 sizes"),
        (["study.widths=[8,16,24]"], "set one of them"),
        (["study.samples=[640,1280,2560]"], "a ladder needs two models"),
        (["study.widths=[8,16,24]", "study.samples=[640,1280,2560]", "study.total_flops=1e6"], "9 runs cost"),
        (["study.sizes=9", "study.width_to=64", "study.samples=[640]"], "use fewer sizes"),
        (["study.models=[vmamba_atto]", "study.widths=[16]", "study.samples=[640]"], "are of one size"),
        (["study.models=[vmamba_atom]", "study.samples=[640]"], "did you mean vmamba_atto"),
        (["study.samples=[640]", "study.levels=2"], "take one"),
        (["study.samples=640"], "give a list"),
        (["study.widths=[8,16,24]", "study.levels=3", "study.total_gpu_hours=1"], "needs study.gpu"),
        (
            ["study.widths=[8,16,24]", "study.levels=3", "study.total_gpu_hours=1e-9", "study.gpu=h100-80"],
            "too small for any point",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_plan_that_cannot_be_is_named(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        plan_study(load([*SMALL, *words]))


def test_runs_that_repeat_the_set_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """D counts repeats as fresh samples, which a plan did not say (wrong)."""
    words = [*GRID, f"data.train={tmp_path}"]
    assert verbs.main(["plan", *words]) == 0
    assert "repeat the set" not in capsys.readouterr().out  # nobody knows
    info = {"splits": {"train": {"num_samples": 10000}}, "num_classes": 10}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert verbs.main(["plan", *words]) == 0
    assert "note: 8 runs repeat the set's 10000 samples, up to 2.56 times" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["micro", "gpu", "large"])
def test_shipped_studies_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["plan", f"config=configs/study/{name}.yaml"]) == 0
    said = capsys.readouterr().out
    assert "held out of the fit" in said
    assert "total" in said
    study = plan_study(load([f"config=configs/study/{name}.yaml"]))
    fitted = [p for p in study.planned if not p.rung.held_out]
    assert len(fitted) >= 24
    assert len({p.level or p.samples for p in fitted}) >= 4
    if name == "large":  # what is said of its cost elsewhere
        hours = totals(study.points)[1]
        assert hours is not None
        for file in ("docs/studies.md", "configs/study/large.yaml"):
            told = re.search(r"([\d,]{5,}) GPU-hours of H100|ends it at ([\d,]+)", (ROOT / file).read_text())
            assert told is not None
            assert float((told[1] or told[2]).replace(",", "")) == pytest.approx(hours, rel=0.005)
