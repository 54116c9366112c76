"""A study of real runs, from its plan to its report: what runs leave is what the reader finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distributed.micro import train, words
from distributed.world import world
from vmamba_dist.config import load
from vmamba_dist.core.machine import cores, processor
from vmamba_dist.data.shards import pack
from vmamba_dist.scaling import verbs
from vmamba_dist.scaling.runs import losses_of, read_study
from vmamba_dist.scaling.study import choose_lrs, plan_study

pytestmark = pytest.mark.distributed


def test_from_a_plan_over_its_runs_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = tmp_path / "digits"
    pack("digits", digits)
    study_words = words(
        digits,
        tmp_path / "runs",
        "model.num_classes=10",
        "model.drop_path=0",
        "ema.enabled=false",
        "eval.weights=raw",
        "eval.every_epochs=0",
        "checkpoint.every_steps=1000",  # but for the trunks
        "checkpoint.keep_best=false",
        "schedule.kind=wsd",
        "schedule.warmup=0.2",
        "augment.mixup=0",
        "augment.cutmix=0",
        "objective.label_smoothing=0",
        "study.widths=[8,12,16]",
        "study.samples=[320,640,1280]",
        "study.lrs=[2e-3,4e-3]",
        "study.search_sizes=1",
    )
    study = plan_study(load(study_words))
    for point in study.search:
        assert world(1).run(train, [*study_words, *point.words]) == ["finished"]
    chosen = choose_lrs(study, losses_of(read_study(study)))
    for point in study.grid({label: choice.lr for label, choice in chosen.items()}):
        start = [point.branch_from.word(study.cfg.run.dir)] if point.branch_from else []
        assert world(1).run(train, [*study_words, *point.words, *start]) == ["finished"]

    runs = read_study(study)
    assert all(run.finished for run in runs), [(run.name, run.why) for run in runs if not run.finished]
    assert sum(bool(run.branched_from) for run in runs) == 6
    grid = [run for run in runs if run.phase == "grid"]
    for width in (8, 12, 16):  # more samples, less loss
        losses = [run.loss for run in sorted(grid, key=lambda r: r.samples) if run.width == width]
        assert losses == sorted(losses, key=lambda loss: -(loss or 0))

    config = tmp_path / "study.json"  # YAML reads JSON
    config.write_text("{}")
    line = [f"config={config}", *study_words]
    for verb in ("fit", "report"):
        assert verbs.main([verb, *line, "bootstraps=40"]) == 0
    law = json.loads((tmp_path / "runs" / "study" / "fit.json").read_text())
    assert set(law) == {"E", "A", "B", "alpha", "beta"}
    assert verbs.main(["predict", "model=vmamba_atto", "samples=640", *line]) == 0
    assert "inside of the fitted range" in capsys.readouterr().out
    told = (tmp_path / "runs" / "study" / "report.md").read_text()
    assert "9 runs" in told
    where = told.split("## Where it ran")[1].split("##")[0]
    assert f"| {processor()}, {cores()} cores | 11 | 1 × " in where
    assert "11 runs took " in where
