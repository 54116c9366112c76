"""A study's report and predictions follow from its run directories; what failed or is missing is named."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vmamba_dist.cluster import ledger, status
from vmamba_dist.cluster.ledger import Line
from vmamba_dist.cluster.submit import command_line
from vmamba_dist.config import Config, ConfigError, load, to_yaml
from vmamba_dist.data.datasets.fractals import read_words
from vmamba_dist.models import flops
from vmamba_dist.models.variants import configured
from vmamba_dist.scaling import verbs
from vmamba_dist.scaling.analysis import analyse
from vmamba_dist.scaling.report import Section, Table, as_html, markdown
from vmamba_dist.scaling.runs import _planned, losses_of, read_run, read_study, read_table
from vmamba_dist.scaling.study import Point, Study, choose_lrs, plan_study

ROOT = Path(__file__).resolve().parents[2]
MICRO = "config=configs/study/micro.yaml"
PNG = b"\x89PNG\r\n\x1a\n"


def law(point: Point) -> float:
    return float(0.9 + 30 / point.rung.params**0.3 + 60 / point.samples**0.4)


def record(
    point: Point, words: list[str], loss: float | None, *, until: float = 1.0, lr: float = 2e-3
) -> Path:
    """Leave the run directory that a run of a point leaves: its config and its metrics, up to a share of its budget."""
    more = [f"optim.lr={lr:.6g}"] if point.phase == "grid" else []
    cfg = load([*words, *point.words, *more])
    folder = Path(cfg.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    batch = cfg.data.global_batch
    first = point.branch_from.step if point.branch_from else 0
    last = int(until * point.samples / batch)
    lines: list[dict[str, Any]] = [
        {
            "step": s,
            "samples": s * batch,
            "loss": 3.0,
            "samples_per_s": 100.0,
            "mfu": None,
            "memory_gib": 0.25,
        }
        for s in (first + 1, *range(first + 2, last, max(1, (last - first) // 7)), last)
    ]
    if until == 1:
        lines[-1] |= {"eval/raw/loss": loss, "eval/raw/top1": 40.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[str]]:
    """The shipped micro-study as its runs would leave it, with one missing, one diverged, one cut and one failed."""
    words = [MICRO, f"run.dir={tmp_path_factory.mktemp('study') / 'runs'}"]
    study = plan_study(load(words))
    rng = np.random.default_rng(0)
    for point in study.search:
        lr = load([*words, *point.words]).optim.lr
        record(point, words, law(point) * (1 + 0.05 * math.log(lr / 3e-3) ** 2))
    for i, point in enumerate(study.planned):
        noisy = law(point) * math.exp(0.01 * rng.standard_normal())
        if i == 1:
            continue
        if i == 2:
            record(point, words, None)
        elif i in (5, 9):
            record(point, words, noisy, until=0.5)
        elif i == 10:
            record(point, words, 4.7)  # log(100) = 4.605
        else:
            record(point, words, noisy)
    ends = Path(study.cfg.run.dir) / "points"
    ends.mkdir()
    (ends / f"{study.planned[9].name}.json").write_text('{"exit_code": 1, "reason": "out of memory"}')
    return study, words


@pytest.fixture(scope="module")
def reported(micro: tuple[Study, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert verbs.main(["report", *micro[1], f"out={out}", "bootstraps=100"]) == 0
    return out


def test_every_point_has_one_record_that_says_how_it_stands(micro: tuple[Study, list[str]]) -> None:
    study, _ = micro
    runs = {r.name: r for r in read_study(study)}
    assert list(runs) == [p.name for p in study.points]
    names = [p.name for p in study.planned]
    assert (runs[names[1]].status, runs[names[1]].why) == ("missing", "never started")
    assert runs[names[2]].status == "diverged"
    assert "not finite" in runs[names[2]].why
    assert runs[names[5]].status == "unfinished"
    assert re.fullmatch(r"\d+ of \d+ samples", runs[names[5]].why)
    assert runs[names[9]].status == "failed"
    assert "exit code 1: out of memory" in runs[names[9]].why
    assert runs[names[10]].status == "diverged"
    assert "no better than guessing among 100 classes" in runs[names[10]].why
    assert sum(r.finished for r in runs.values()) == len(runs) - 5
    branched = study.planned[3]
    assert branched.branch_from is not None
    expected = f"{branched.branch_from.point} at step {branched.branch_from.step}"
    assert runs[branched.name].branched_from == expected


def test_a_failure_on_slurm_has_its_reason(tmp_path: Path) -> None:
    """Arrays leave no points/NAME.json, so a run that Slurm stopped had (wrong) "never started"; its ledger has why."""
    words = [MICRO, f"run.dir={tmp_path}"]
    study = plan_study(load(words))
    first, begun, other = study.planned[0], study.planned[1], study.planned[2]
    why = "data.train has no _info.json"
    for point in (first, begun):
        ledger.append(tmp_path / point.name, Line("begin", "s0", "7_1", 0, 0))
        ledger.append(tmp_path / point.name, Line("end", "s0", "7_1", 0, 0, code=2, verdict="stop", why=why))
    ledger.append(tmp_path / other.name, Line("end", "s0", "7_2", 0, 0, verdict="requeue", why="preempted"))
    assert record(begun, words, None, until=0.5).name == begun.name
    runs = {r.name: r for r in read_study(study)}
    assert (runs[first.name].status, runs[first.name].why) == ("failed", why)
    assert runs[begun.name].status == "failed"
    assert runs[begun.name].why.startswith(f"{why}; ")
    assert (runs[other.name].status, runs[other.name].why) == ("missing", "never started")
    assert status.record(tmp_path / first.name).note == why  # `vmamba runs` says the same
    (tmp_path / begun.name / "attempts.jsonl").write_text(
        '{"attempt": 2, "host": "h", "pid": 1, "job": "", "started": "2999-01-01T00:00:00+00:00"}\n'
    )
    assert read_study(study)[len(study.search) + 1].status == "unfinished"  # a later start went on


def test_runs_of_another_config_are_listed_and_not_fitted(tmp_path: Path) -> None:
    """A run in a point's folder that was trained by other words was fitted as the point (wrong)."""
    words = [MICRO, f"run.dir={tmp_path}"]
    study = plan_study(load(words))
    for i, point in enumerate(study.planned):
        other = ["optim.weight_decay=0.2"] if i == 3 else []
        record(point, [*words, *other], law(point))
    stranger = study.planned[3]
    runs = {r.name: r for r in read_study(study)}
    assert runs[stranger.name].status == "foreign"
    assert "trained with another config: optim.weight_decay was 0.2, now 0.05" in runs[stranger.name].why
    assert [r.name for r in runs.values() if r.status == "foreign"] == [stranger.name]
    found = analyse(read_study(study), bootstraps=40)
    assert stranger.name in [r.name for r in found.left_out]
    assert stranger.name not in [r.name for r in found.used]
    allowed = plan_study(load([*words, "run.allow_changes=true"]))
    assert {r.name: r.status for r in read_study(allowed)}[stranger.name] == "finished"
    kept = {rung.label: {"lr": 0.00321, "how": "search: best run"} for rung in study.rungs}
    content = {"search": sorted(point.name for point in study.search), "losses": {}, "chosen": kept}
    (tmp_path / "lrs.json").write_text(json.dumps(content))
    foreign = [
        r for r in read_study(study) if r.status == "foreign"
    ]  # another lr than the one that was chosen
    assert len(foreign) == len(study.planned)
    assert "optim.lr was 0.002, now 0.00321" in foreign[0].why


def test_a_points_config_is_what_its_words_make(micro: tuple[Study, list[str]]) -> None:
    words = micro[1]
    deep = [*words, "study.depth_power=0.5", "study.batch_power=0.5"]
    for said in (words, deep):
        other = plan_study(load(said))
        for point in (other.search[0], *other.grid(dict.fromkeys((r.label for r in other.rungs), 1e-5))[::9]):
            assert _planned(point, other.cfg) == load([*said, *point.words])


def test_a_record_counts_as_the_model_does(micro: tuple[Study, list[str]]) -> None:
    study, _ = micro
    point = study.planned[-1]
    run = read_run(Path(study.cfg.run.dir) / point.name)
    assert run.params == flops.params("vmamba_pico", 0)
    assert run.flops == pytest.approx(point.samples * flops.train_flops_per_image("vmamba_pico", 32, 32, 100))
    assert (run.samples_per_s, run.memory_gib, run.mfu) == (100.0, 0.25, None)
    assert (run.resolution, run.width, run.depth) == (32, 48, 10)


def test_the_search_is_read_from_its_runs(micro: tuple[Study, list[str]]) -> None:
    study, _ = micro
    chosen = choose_lrs(study, losses_of(read_study(study)))
    for rung in study.rungs[:4]:
        assert chosen[rung.label].lr == pytest.approx(3e-3, rel=0.02)


def test_the_report_tells_the_learning_rates_that_the_grid_has(tmp_path: Path) -> None:
    """A run of the search that ends later would change the choice (wrong), but not the record that the grid ran by."""
    words = [MICRO, f"run.dir={tmp_path}"]
    study = plan_study(load(words))
    kept = {rung.label: {"lr": 0.00321, "how": "search: best run"} for rung in study.rungs}
    content = {"search": sorted(point.name for point in study.search), "losses": {}, "chosen": kept}
    (tmp_path / "lrs.json").write_text(json.dumps(content))
    for point in study.search:
        record(point, words, law(point))
    assert verbs.main(["report", *words, "bootstraps=40"]) == 0
    told = (tmp_path / "study" / "report.md").read_text(encoding="utf-8")
    for rung in study.rungs:
        assert f"| {rung.label} | 0.00321 | search: best run |" in told


def test_the_report_is_one_file_with_its_plots_in_it(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 6
    assert all(base64.b64decode(image).startswith(PNG) for image in images)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.rstrip().endswith("</html>")


def test_the_report_has_all_of_its_parts(reported: Path, micro: tuple[Study, list[str]]) -> None:
    study, _ = micro
    told = (reported / "report.md").read_text()
    for heading in (
        "Summary",
        "Points that failed or are missing",
        "The law and its residuals",
        "IsoFLOP curves",
        "Compute-optimal frontier",
        "Predictions against held-out runs",
        "Laws along one dimension",
        "Search of the learning rate",
        "Throughput, MFU and memory",
        "Every run",
        "Commands",
    ):
        assert f"## {heading}" in told
    lacking = told.split("## Points that failed")[1].split("##")[0]
    for i in (1, 2, 5, 9, 10):
        assert f"| {study.planned[i].name} |" in lacking
    assert lacking.count("\n| vmamba") == 5
    for image in re.findall(r"\]\((figures/\w+\.png)\)", told):
        assert (reported / image).read_bytes().startswith(PNG)
    assert "between seeds" in told
    assert re.search(r"the law.s best size is N\* [\d.e+]+ \(.*for a loss of [\d.]+ \(", told)
    assert "branched from a checkpoint" in told
    assert all(f"{r.label}-131072-s0" in told for r in study.rungs)


def test_each_command_makes_the_run_that_it_stands_for(
    reported: Path, micro: tuple[Study, list[str]]
) -> None:
    study, _ = micro
    told = (reported / "report.md").read_text()
    commands = [line.split() for line in told.splitlines() if line.startswith("vmamba train ")]
    assert len(commands) == len(study.points) - 1  # one never started
    for command in commands:
        cfg: Config = load(command[2:])
        kept = load([f"config={Path(cfg.run.dir) / 'config.yaml'}"])
        assert cfg.schedule == kept.schedule
        assert (cfg.model, cfg.optim, cfg.data, cfg.run.seed) == (
            kept.model,
            kept.optim,
            kept.data,
            kept.run.seed,
        )


def test_the_table_of_runs_fits_to_the_same_law(reported: Path, micro: tuple[Study, list[str]]) -> None:
    of_study = analyse(read_study(micro[0]), bootstraps=50)
    of_table = analyse(read_table(reported / "runs.csv"), bootstraps=50)
    assert of_table.law.value == pytest.approx(of_study.law.value, rel=1e-5)
    assert of_table.work == of_study.work
    names = {run.name for run in of_table.left_out}
    assert {run.name for run in of_study.left_out} | {h.run.name for h in of_study.held_out} <= names
    assert len(of_table.used) + len(of_table.left_out) == len(micro[0].points)


def test_tensorboard_has_the_losses_and_the_plots(reported: Path) -> None:
    (events,) = (reported / "tensorboard").iterdir()
    read = EventAccumulator(str(events)).Reload()
    assert "study/loss/grid/vmamba_pico/seed 0" in read.Tags()["scalars"]
    steps = [e.step for e in read.Scalars("study/loss/grid/vmamba_pico/seed 0")]
    assert sorted(steps) == [16384, 32768, 65536, 131072]
    assert {"study/curves", "study/isoflop", "study/frontier"} <= set(read.Tags()["images"])


def test_held_out_runs_are_predicted_and_not_fitted(micro: tuple[Study, list[str]]) -> None:
    study, _ = micro
    found = analyse(read_study(study), bootstraps=100)
    assert {h.run.model for h in found.held_out} == {"vmamba_pico"}
    assert not {r.model for r in found.used} & {"vmamba_pico"}
    assert len(found.used) + len(found.held_out) + len(found.left_out) == len(study.planned)
    assert all(abs(h.error) < 0.06 for h in found.held_out)
    assert found.seeds == pytest.approx(0.01, rel=0.5)


def test_a_study_without_runs_has_a_report_that_says_so(tmp_path: Path) -> None:
    assert verbs.main(["report", MICRO, f"run.dir={tmp_path / 'none'}", "bootstraps=40"]) == 0
    told = (tmp_path / "none" / "study" / "report.md").read_text()
    count = len(plan_study(load([MICRO])).points)
    assert f"0 of {count} runs finished" in told
    assert "There is no fit: 0 points for 5 parameters" in told
    assert told.count("| missing | never started |") == count


def test_the_report_begins_with_the_rejection_of_its_law(tmp_path: Path) -> None:
    """A learning transition: the report of the law fitted to it spoke of intervals and predictions alone (wrong)."""
    words = [MICRO, f"run.dir={tmp_path}", "study.lrs=[]"]
    study = plan_study(load(words))
    rng = np.random.default_rng(0)
    for point in study.planned:
        size, count = point.rung.params / 1e5, point.samples / 3e4
        lr = choose_lrs(study, {})[point.rung.label].lr  # the rule's
        record(
            point,
            words,
            (0.2 + 4 / (1 + count**1.6) * size**-0.2) * math.exp(0.03 * rng.standard_normal()),
            lr=lr,
        )
    assert all(r.finished for r in read_study(study))
    assert verbs.main(["report", *words, "bootstraps=40"]) == 0
    told = (tmp_path / "study" / "report.md").read_text()
    summary = told.split("## Summary")[1]
    assert summary.lstrip().startswith("REJECTED: the runs reject this law")
    assert "mean residuals by samples: 16384 " in summary
    assert "8 of the 32 runs saw fewer than 300 samples a class" in summary
    assert "a law that its runs reject is not extrapolated" in told
    assert "Inside shows little here" in told


def test_the_report_tells_where_and_how_it_ran(tmp_path: Path) -> None:
    """The run's command lacked sweep.parallel and that of the data, and nothing said what it ran on (wrong)."""
    shards, runs = tmp_path / "fractals", tmp_path / "runs"
    shards.mkdir()
    info = {
        "num_classes": 100,
        "fractal": {
            "classes": 100,
            "size": 32,
            "seed": 0,
            "points": 4096,
            "patch": 1,
            "format": "jpg",
            "quality": 90,
        },
        "splits": {"train": {"num_samples": 132000}, "test": {"num_samples": 5000}},
    }
    (shards / "_info.json").write_text(json.dumps(info))
    words = [MICRO, f"run.dir={runs}", f"data.train={shards}"]
    study = plan_study(load(words))
    (runs / "points").mkdir(parents=True)
    command = f"vmamba study run {' '.join(words)} sweep.parallel=2"
    kept = command_line("study", ["run", *words, "sweep.parallel=2"])  # for a shell of this machine
    assert kept != command
    (runs / "sweep.json").write_text(json.dumps({"command": kept, "points": []}))
    facts = {
        "world_size": 2,
        "threads": 3,
        "device": "cpu",
        "machine": "x86_64",
        "torch": "2.14.1",
        "commit": "01ab" * 10,
    }
    for i, point in enumerate(study.planned[:3]):
        folder = record(point, words, law(point))
        known = {"processor": "Abacus 9000", "cores": 48} if i else {}
        (folder / "environment.json").write_text(json.dumps(facts | known))
        starts = [
            {
                "attempt": n,
                "host": "elsewhere",
                "pid": 1,
                "job": "",
                "started": f"2026-11-30T10:0{n}:00+00:00",
            }
            for n in range(1, 1 + max(1, i))
        ]
        (folder / "attempts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
        ended = datetime(2026, 11, 30, 10, 10, tzinfo=UTC).timestamp()
        (runs / "points" / f"{point.name}.json").write_text(
            json.dumps({"exit_code": 0, "reason": "", "at": ended})
        )
    assert verbs.main(["report", *words, "bootstraps=40"]) == 0
    told = (runs / "study" / "report.md").read_text()
    where = told.split("## Where it ran")[1].split("##")[0]
    # Two processes a run, of 9 minutes, and of 8 in the run whose last start began at 10:02.
    assert (
        "| Abacus 9000, 48 cores | 2 | 2 × 3 | 2026-11-30 10:01 | 2026-11-30 10:10 | 2040 | torch 2.14.1, "
        in where
    )
    assert "| x86_64 | 1 | 2 × 3 | 2026-11-30 10:01 | 2026-11-30 10:10 | 1080 |" in where
    assert "3 runs took 3120 process-seconds" in where
    assert "1 earlier starts of them were cut off" in where
    assert "commit 01ab01ab01ab" in where
    commands = told.split("## Commands")[1]
    assert f"\n{command}\n" in commands
    fractal = next(line for line in commands.splitlines() if line.startswith("vmamba shards fractal"))
    assert f"{shards} classes=100 per_class=1320 test_per_class=50 size=32 seed=0" in fractal
    config = read_words(fractal.split()[4:])
    assert (config.classes, config.per_class, config.num_test, config.size) == (100, 1320, 50, 32)


def test_what_a_run_is_called_cannot_break_the_page() -> None:
    table = Section("<b>", ("a < b & c", Table(("|",), (("<script>|x",),))))
    page = as_html("<t>", [table])
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
    assert r"<script>\|x" in markdown("t", [table])


@pytest.mark.parametrize(
    "delays", [(0.3,), pytest.param((0.05, 0.6, 1.1, 1.7, 2.3), marks=pytest.mark.slow)], ids=["one", "five"]
)
def test_a_kill_leaves_no_half_report(
    micro: tuple[Study, list[str]], delays: tuple[float, ...], tmp_path: Path
) -> None:
    """SIGKILL at moments all over a report that is written anew and anew: each file is whole, the next goes on."""
    words = [*micro[1], f"out={tmp_path / 'r'}", "bootstraps=40"]
    code = f"from vmamba_dist.scaling.report import main\nwhile True: main({words!r})\n"
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for delay in delays:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, cwd=ROOT)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()  # the first has been written
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert (tmp_path / "r" / "report.html").read_text().endswith("</html>\n")
        assert "## Commands" in (tmp_path / "r" / "report.md").read_text()
        for image in (tmp_path / "r" / "figures").glob("*.png"):
            assert image.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_a_prediction_says_how_far_out_it_is(
    micro: tuple[Study, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    study, words = micro
    with pytest.raises(ConfigError, match=r"no such file; `vmamba study fit"):
        verbs.main(["predict", "model=vmamba_giant", "samples=1e9", *words])
    assert verbs.main(["fit", *words, "bootstraps=100"]) == 0
    capsys.readouterr()
    far = ["model=vmamba_giant", "samples=1e9", "gpu=h100-80", "gpus=64", "batch=4096", "image_size=224"]
    large = ["parallel.engine=fsdp", "parallel.recompute=block"]
    assert verbs.main(["predict", *far, *words, *large]) == 0
    said = capsys.readouterr().out
    most = max(r.params for r in study.rungs if not r.held_out)
    assert f"{flops.params('vmamba_giant', 0) / most:.3g} × the most params that were fitted" in said
    assert "× the most samples that were fitted" in said
    assert "images of 224 px, where those of the runs had 32" in said
    assert "GPU-hours on 64 × h100-80" in said
    assert verbs.main(["predict", *far, *words, "gpus=1", "batch=4097"]) == 0
    said = capsys.readouterr().out
    assert "cost     unknown: " in said
    assert re.search(r"^loss +\d", said, re.MULTILINE)  # which no cost keeps from being told
    assert verbs.main(["predict", "model=vmamba_atto", "width=24", "samples=50000", *words]) == 0
    said = capsys.readouterr().out
    assert "inside of the fitted range" in said
    point = next(p for p in study.planned if p.rung.label == "vmamba_atto-w24")
    expected = 0.9 + 30 / point.rung.params**0.3 + 60 / 50000**0.4
    loss = float(re.search(r"^loss +([\d.]+)", said, re.MULTILINE).group(1))  # type: ignore[union-attr]
    assert loss == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["samples=1e6", MICRO], "model is not set"),
        (["model=vmamba_nano", MICRO], "samples is not set"),
        (["model=vmamba_nano", "samples=-1", "fit=x.json"], "samples=-1"),
        (["model=vmamba_nano", "samples=1e6"], "name the law"),
        (["model=vmamba_nano", "samples=1e6", "fit=nowhere.json"], "no such file"),
    ],
    ids=["no model", "no samples", "negative", "no law", "no file"],
)
def test_a_prediction_that_cannot_be_is_named(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        verbs.main(["predict", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["model.ssm_ratio=2"],
        ["model.width=48"],
        ["model.depths=[2,2,5,2]"],
        ["width=48", "model.ssm_ratio=2"],
    ],
    ids=" ".join,
)
def test_a_prediction_is_of_the_model_that_was_asked_for(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """model.* was dropped without a word (wrong): the bare model's parameters and loss came out."""
    rows = [
        f"{n:g},{d:g},{0.5 + 30 / n**0.3 + 90 / d**0.4:.8g}" for n in (1e4, 1e5, 1e6) for d in (1e4, 1e5, 1e6)
    ]
    (tmp_path / "runs.csv").write_text("\n".join(["params,samples,loss", *rows]) + "\n")
    full = tmp_path / "details.json"
    assert verbs.main(["fit", f"table={tmp_path / 'runs.csv'}", f"details={full}", "bootstraps=40"]) == 0
    capsys.readouterr()
    assert verbs.main(["predict", "model=vmamba_atto", "samples=1e5", f"fit={full}", *words]) == 0
    said = capsys.readouterr().out
    config = [word if word.startswith("model.") else f"model.{word}" for word in words]
    params = flops.params(configured(load(["model.name=vmamba_atto", *config]).model), 0)
    assert params != flops.params("vmamba_atto", 0)
    assert f"{params / 1e6:.2f} M parameters without the classifier" in said
    loss = float(re.search(r"^loss +([\d.]+)", said, re.MULTILINE).group(1))  # type: ignore[union-attr]
    assert loss == pytest.approx(0.5 + 30 / params**0.3 + 90 / 1e5**0.4, rel=0.01)


def test_a_misspelt_sub_verb_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean report"):
        verbs.main(["reprot"])


@pytest.mark.parametrize("name", verbs.SUB_VERBS)
def test_each_sub_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main([name, "--help"]) == 0
    assert f"usage: vmamba study {name}" in capsys.readouterr().out


def test_plan_and_fit_load_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys\nfrom vmamba_dist.scaling import planned, fitted, predicted, verbs\n"
        "heavy = {'torch', 'matplotlib', 'tensorboard', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
