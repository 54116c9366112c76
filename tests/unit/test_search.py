"""A search's trials are drawn from the seed, its rungs are sorts, and its mistakes are told by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vmamba_dist.cluster import search
from vmamba_dist.cluster.points import Planned, Point
from vmamba_dist.cluster.search import Search, Standing, draw, go_on, score
from vmamba_dist.cluster.status import RunRecord
from vmamba_dist.cluster.sweep import PointResult
from vmamba_dist.config import Config, ConfigError, load

LR = "search.space.optim.lr={log: [1e-4, 1e-2]}"


def values(points: list[Point], key: str) -> list[str]:
    return [dict(word.split("=") for word in each.words)[key] for each in points]


def test_a_draw_depends_on_seed_number_and_key_alone() -> None:
    lr = {"log": [1e-4, 1e-2]}
    few = draw(Search({"optim.lr": lr}, trials=5))
    many = draw(Search({"optim.clip": [1, 2, 5], "optim.lr": lr}, trials=50))
    assert values(few, "optim.lr") == values(many, "optim.lr")[:5]
    assert values(few, "optim.lr") != values(draw(Search({"optim.lr": lr}, trials=5, seed=1)), "optim.lr")
    assert [each.name for each in few] == ["t000", "t001", "t002", "t003", "t004"]


def test_draws_fill_their_spaces() -> None:
    space = {
        "optim.lr": {"log": [1e-4, 1e-2]},
        "optim.weight_decay": {"uniform": [0, 0.2]},
        "model.num_classes": {"int": [10, 12]},
        "optim.clip": [1, 5],
    }
    trials = draw(Search(space, trials=2000))
    lrs = [float(v) for v in values(trials, "optim.lr")]
    assert 1e-4 <= min(lrs) < 1.1e-4
    assert 0.9e-2 < max(lrs) < 1e-2 + 1e-9
    assert sum(lr < 1e-3 for lr in lrs) == pytest.approx(1000, abs=70)  # half below the geometric mean
    decays = [float(v) for v in values(trials, "optim.weight_decay")]
    assert sum(decays) / len(decays) == pytest.approx(0.1, abs=0.005)
    for key, found in (("model.num_classes", {"10", "11", "12"}), ("optim.clip", {"1", "5"})):
        drawn = values(trials, key)
        assert set(drawn) == found
        assert drawn.count(min(found)) == pytest.approx(2000 / len(found), abs=90)


def standing(name: str, value: float, rung: int | None = 10) -> Standing:
    planned = Planned(Point(name, ()), Config())
    return Standing(PointResult(planned, "finished", RunRecord(name, "paused")), rung, value)


def test_one_in_so_many_goes_on_and_nobody_without_a_score() -> None:
    found = [standing("a", 3.0), standing("b", math.nan), standing("c", 1.0), standing("d", 2.0)]
    assert go_on(found, 3, small=False) == ["a", "d"]
    assert go_on(found, 3, small=True) == ["c", "d"]
    assert go_on(found, 100, small=True) == ["c"]
    assert go_on([standing("b", math.nan)], 3, small=True) == []
    assert go_on([standing("b", 1.0), standing("a", 1.0)], 2, small=True) == ["a"]


def test_the_best_came_furthest_then_scored_best() -> None:
    found = [standing("early", 9.0, 10), standing("late", 5.0, None), standing("best", 6.0, None)]
    ranked = sorted(found, key=lambda s: s.key(small=False))
    assert [s.result.point.name for s in ranked] == ["best", "late", "early"]


def test_a_score_is_the_metric_at_the_rung(tmp_path: Path) -> None:
    lines = [{"step": 1}, {"step": 2, "eval/raw/top1": 20.0}, {"step": 3}, {"step": 4, "eval/raw/top1": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score(tmp_path, "eval/raw/top1", 2) == 20.0
    assert math.isnan(score(tmp_path, "eval/raw/top1", 3))
    assert math.isnan(score(tmp_path, "eval/raw/top1", None))
    assert math.isnan(score(tmp_path / "nowhere", "eval/raw/top1", None))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], r"search\.space is empty: give for example"),
        ([LR.replace("lr", "lrr")], r"search\.space\.optim\.lrr: no such key; did you mean optim\.lr\?"),
        ([LR, "search.trails=3"], r"search\.trails=3: no such key; did you mean search\.trials\?"),
        ([LR, "search.trials=0"], r"search\.trials=0: use 1 or more"),
        ([LR, "search.method=grid"], r"search\.method='grid': choose one of random, halving"),
        ([LR, "search.method=halving"], r"search\.rungs=\[\] beside search\.method=halving"),
        ([LR, "search.rungs=[3]"], r"search\.rungs=\[3\] beside search\.method=random"),
        (
            [LR, "search.method=halving", "search.rungs=[3,3]"],
            r"search\.rungs=\[3, 3\]: steps, each more than",
        ),
        ([LR, "search.method=halving", "search.rungs=3"], r"search\.rungs=3: give a list"),
        (
            [LR, "search.method=halving", "search.rungs=[3]", "run.max_steps=3"],
            r"search\.rungs=\[3\]: the last is not before the end, run\.max_steps=3",
        ),
        (["search.space.optim.lr=[]"], r"search\.space\.optim\.lr=\[\]: an empty list"),
        (["search.space.optim.lr=3"], r"search\.space\.optim\.lr=3: give a list of values, or a range"),
        (["search.space.optim.lr={logg: [1,2]}"], r"give a list of values, or a range"),
        (["search.space.optim.lr={log: [0,1]}"], r"use 0 < from < to"),
        (["search.space.optim.lr={uniform: [2,1]}"], r"use from < to"),
        (["search.space.optim.lr={int: [1,2.5]}"], r"int needs two whole numbers"),
        (["search.space.optim.betas={uniform: [0,1]}"], r"trial|optim\.betas"),
        (["search.space.launch.nodes=[1,2]"], r"search\.space\.launch\.nodes: not a key to sweep"),
    ],
)
def test_a_mistake_is_told_by_name(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        search.main([f"run.dir={tmp_path / 'search'}", *words])
    assert not (tmp_path / "search").exists()


def test_a_dry_run_lists_the_trials_and_what_they_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halving = ["search.method=halving", "search.rungs=[3,9]", "search.trials=7", "search.parallel=2"]
    assert search.main([f"run.dir={tmp_path / 'search'}", LR, *halving, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "7 to step 3, 3 to step 9, 1 to the end, 2 at a time" in out
    assert out.count("optim.lr=") == 7
    assert not (tmp_path / "search").exists()


def test_trials_that_repeat_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        f"run.dir={tmp_path / 'search'}",
        "search.space.optim.clip=[1,5]",
        "search.trials=9",
        "--dry-run",
    ]
    assert search.main(words) == 0
    out = capsys.readouterr().out
    assert "7 of 9 trials repeat earlier ones" in out
    assert "2 trials to the end" in out


def test_a_search_can_stand_in_a_config(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(
        "optim: {clip: 3}\nsearch:\n  space:\n    optim: {lr: {log: [1e-4, 1e-2]}}\n    data.workers: [0, 1]\n"
        "  trials: 4\n"
    )
    found, base = search.read_words([f"config={file}", "search.trials=5", "ema.enabled=false"])
    assert found.space == {"optim.lr": {"log": [1e-4, 1e-2]}, "data.workers": [0, 1]}
    assert (found.trials, found.metric, base.optim.clip) == (5, "eval/raw/top1", 3)
    with pytest.raises(ConfigError, match=r"search\.…: this group is for vmamba search"):
        load([f"config={file}"])
