"""A study runs through the sweep: search, choice, grid, branches; killed anywhere it repeats no finished point."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed.micro import metrics, words
from vmamba_dist.cluster import status
from vmamba_dist.config import ConfigError, load_beside
from vmamba_dist.core.rundir import attempts
from vmamba_dist.data.shards import pack
from vmamba_dist.scaling import running
from vmamba_dist.scaling.runs import LRS
from vmamba_dist.scaling.study import plan_study

pytestmark = pytest.mark.distributed
LIMIT_S = 280


def study_words(digits: Path, folder: Path) -> list[str]:
    """Three sizes, three budgets of which two branch, a search at one size."""
    return [
        *words(digits, folder, "eval.every_epochs=0", "model.drop_path=0", "eval.weights=raw"),
        "schedule.kind=wsd",
        "schedule.warmup=0.2",
        "checkpoint.async_save=false",
        "study.widths=[8,12,16]",
        "study.samples=[160,224,288]",
        "study.lrs=[1e-3,4e-3]",
        "study.search_sizes=1",
        "sweep.parallel=2",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_that_is_killed_twice_goes_on(tmp_path: Path) -> None:
    digits, folder = tmp_path / "digits", tmp_path / "study"
    pack("digits", digits)
    said = study_words(digits, folder)
    command = [sys.executable, "-m", "vmamba_dist.cli", "study", "run", *said]
    for name in ("vmamba_atto-w8-lr0.001", "vmamba_atto-w12-288-s0"):  # in the search, then in the grid
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + LIMIT_S
        while not status.tail(folder / name):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
    finished = {
        run.name: attempts(run) for run in status.find_runs(folder) if status.record(run).state == "finished"
    }

    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {run.name: status.record(run).state for run in status.find_runs(folder)}
    assert len(states) == 2 + 9
    assert set(states.values()) == {"finished"}
    assert len(finished) >= 2
    assert {name: attempts(folder / name) for name in finished} == finished
    began = status.record(folder / "vmamba_atto-w16-160-s0").began
    assert began is not None
    assert Path(began["checkpoint"]).parts[-3] == "vmamba_atto-w16-288-s0"
    # The search's run of the chosen lr had that budget too: the branch from the longest is the same run.
    chosen = json.loads((folder / "lrs.json").read_text())["chosen"]["vmamba_atto-w8"]["lr"]
    searched = metrics(folder / f"vmamba_atto-w8-lr{chosen:g}")
    assert (
        metrics(folder / "vmamba_atto-w8-160-s0")
        == searched[-len(metrics(folder / "vmamba_atto-w8-160-s0")) :]
    )


def test_learning_rates_are_chosen_once(tmp_path: Path) -> None:
    config, _ = load_beside(study_words(tmp_path, tmp_path / "study"), "sweep")
    study = plan_study(config)
    with pytest.raises(
        ConfigError, match=r"has no run that ended with a finite loss.*lr0\.001: never started"
    ):
        running.chosen(study)
    file = tmp_path / "study" / LRS
    file.parent.mkdir()
    record = {
        "search": sorted(point.name for point in study.search),
        "chosen": {rung.label: {"lr": 3e-3, "how": "search"} for rung in study.rungs},
    }
    file.write_text(json.dumps(record))
    assert {choice.lr for choice in running.chosen(study).values()} == {3e-3}
    file.write_text(json.dumps(record | {"search": ["another"]}))
    with pytest.raises(ConfigError, match=r"lrs\.json holds the learning rates of another search"):
        running.chosen(study)


def test_a_search_that_has_chosen_is_not_run_again(tmp_path: Path) -> None:
    """A failed run of the search was started again at every start (wrong), though lrs.json had fixed the choice."""
    digits, folder = tmp_path / "digits", tmp_path / "study"
    pack("digits", digits)
    said = study_words(digits, folder)
    config, _ = load_beside(said, "sweep")
    study = plan_study(config)
    folder.mkdir()
    record = {
        "search": sorted(point.name for point in study.search),
        "chosen": {rung.label: {"lr": 3e-3, "how": "search"} for rung in study.rungs},
    }
    (folder / LRS).write_text(json.dumps(record))
    ends = folder / "points"
    ends.mkdir()
    failed = ends / f"{study.search[0].name}.json"
    failed.write_text('{"exit_code": 1, "reason": "out of memory"}')
    trunks = [point for point in study.planned if point.branch_from is None]
    assert (
        running.main([*said, "run.max_steps=1"]) == 1
    )  # of the grid the trunks, which branches need more steps of
    assert json.loads(failed.read_text())["reason"] == "out of memory"
    assert not any((folder / point.name).exists() for point in study.search)
    assert len(trunks) == 3
    assert all((folder / point.name / "metrics.jsonl").exists() for point in trunks)
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + len(study.points)  # the search's are still there


def test_data_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    """Every point failed by itself, and the error spoke of learning rates (wrong)."""
    said = study_words(tmp_path / "nowhere", tmp_path / "study")
    with pytest.raises(ConfigError, match=r"data\.train='.*nowhere' is not there; make it with"):
        running.main(said)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ConfigError, match=r"nowhere' has no _info\.json and no tars"):
        running.main(said)
    assert not (tmp_path / "study").exists()


def test_a_study_stays_until_its_end(tmp_path: Path) -> None:
    """launch.follow=false was not read (wrong)."""
    with pytest.raises(ConfigError, match=r"launch\.follow=false: a study stays"):
        running.main([*study_words(tmp_path, tmp_path / "study"), "launch.follow=false"])


def test_a_study_names_its_points_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.optim\.lr: a study names its points itself"):
        running.main([*study_words(tmp_path, tmp_path / "study"), "sweep.optim.lr=[1]"])
