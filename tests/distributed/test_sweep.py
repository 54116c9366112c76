"""Sweeps of real runs: one that fails stops no other, one that is killed loses nothing, branches share their trunk."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributed.micro import metrics, words
from vmamba_dist.checkpoint import store
from vmamba_dist.cluster import status
from vmamba_dist.cluster.points import Branch, Point
from vmamba_dist.cluster.sweep import run_points
from vmamba_dist.config import load
from vmamba_dist.core.rundir import attempts
from vmamba_dist.data.shards import pack

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120


def line(digits: Path, folder: Path, *more: str) -> list[str]:
    """The command of a sweep of micro runs."""
    base = words(digits, folder, "eval.every_epochs=0", "checkpoint.async_save=false", *more)
    return [sys.executable, str(ROOT / "launch" / "sweep.py"), *base]


def results(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def starts(folder: Path) -> dict[str, int]:
    return {run.name: len(attempts(run)) for run in status.find_runs(folder)}


@contextmanager
def running(command: list[str], until: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """The command, once `until` holds; killed at the end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not until():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_failure_stops_no_other_point_and_is_run_again_alone(digits: Path, tmp_path: Path) -> None:
    folder, late = tmp_path / "a sweep", tmp_path / "late"
    table = tmp_path / "points.csv"
    table.write_text(f"name,optim.lr,data.train\nlate,3e-3,{late}\na,1e-3,\n")
    command = line(digits, folder, "run.max_steps=3", f"sweep.points={table}", "sweep.parallel=2")

    first = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert first.returncode == 1, first.stderr
    found = results(folder)
    assert {name: row["state"] for name, row in found.items()} == {
        "a": "finished",
        "late": "failed",
    }
    assert str(late) in found["late"]["reason"]
    assert found["a"]["optim.lr"] == "0.001"
    assert found["a"]["step"] == "3"
    assert float(found["a"]["eval/ema/top1"]) > 0
    assert float(found["a"]["loss"]) == metrics(folder / "a")[-1]["loss"]
    assert found["a"]["run_dir"] == str(folder / "a")

    pack("digits", late)
    second = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "1 of 2 points have finished already" in second.stdout
    assert {row["state"] for row in results(folder).values()} == {"finished"}
    assert starts(folder) == {"a": 1, "late": 1}

    third = subprocess.run(
        [*command, "optim.clip=2"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert third.returncode == 2
    assert "point late: " in third.stderr
    assert "was trained with another config: optim.clip was 3.0, now 2.0" in third.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_stopped_anywhere_goes_on(
    number: signal.Signals, digits: Path, tmp_path: Path
) -> None:
    """Killed, its points save all the same, since the kernel asks them to; asked, it waits for them."""
    folder = tmp_path / "sweep"
    swept = ["sweep.optim.lr=[1e-3,2e-3]", "checkpoint.every_steps=1000", "schedule.epochs=50"]
    command = line(digits, folder, *swept)
    run = folder / "lr=0.001"
    with running(command, lambda: len(status.tail(run)) >= 3) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT_S)
    if number == signal.SIGINT:
        assert process.returncode == 75, out + err
        assert f"stopped; to go on: {shlex.join(command[:2])} run.dir=" in out
        states = {name: row["state"] for name, row in results(folder).items()}
        assert states == {"lr=0.001": "stopped", "lr=0.002": "missing"}

    # Enough to go on; 50 epochs, which it cannot have finished, are too many for a test.
    end = len(status.metrics(run)) + 5
    done = subprocess.run(
        [*command, f"run.max_steps={end}"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["state"] for row in results(folder).values()} == {"finished"}
    assert starts(folder) == {"lr=0.001": 2, "lr=0.002": 1}
    log = (run / "train.log").read_text()  # it did not begin anew: it was saved where it was stopped
    assert "asked to stop: saved step" in log
    assert "resuming from" in log
    assert [entry["step"] for entry in metrics(run)] == list(range(1, end + 1))


def test_two_sweeps_do_not_work_on_one_folder(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = line(digits, folder, "sweep.optim.lr=[1e-3]")
    lock = folder / "points" / "lock"
    with running(command, lambda: lock.exists() and lock.read_text() != "") as first:
        second = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert second.returncode == 2
        assert f"a sweep is at work in {folder} (pid {first.pid})" in second.stderr
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=LIMIT_S)
        assert first.returncode == 75
    assert results(folder)["lr=0.001"]["state"] in ("missing", "stopped")


def test_a_branch_begins_in_its_trunk(digits: Path, tmp_path: Path) -> None:
    """Branches wait for their trunk, and say where they began; what cannot begin is named."""
    schedule = ("schedule.kind=wsd", "schedule.warmup_samples=64", "schedule.decay=0.5")
    long, short = (*schedule, "schedule.samples=512"), (*schedule, "schedule.samples=384")
    base = load(words(digits, tmp_path / "sweep", "eval.every_epochs=0", "checkpoint.keep_every=4"))
    points = [
        Point("lost", (*short, "optim.clip=2"), Branch("trunk", 5)),
        Point("short", short, Branch("trunk", 4)),
        Point("trunk", long),
    ]
    folder = tmp_path / "sweep"
    found = {each.point.name: each for each in run_points(points, base=base, folder=folder, parallel=2)}
    states = {name: each.state for name, each in found.items()}
    assert states == {"trunk": "finished", "short": "finished", "lost": "failed"}
    assert "it begins in step 5 of trunk, which has not been saved" in found["lost"].reason
    began = store.directory(folder / "trunk" / "checkpoints", 4)
    assert found["short"].record.began == {"checkpoint": str(began), "step": 4}
    assert found["trunk"].record.began is None
    assert results(folder)["short"]["branched_step"] == "4"
    assert [entry["step"] for entry in metrics(folder / "short")] == list(range(5, 13))


@pytest.mark.slow
def test_points_of_several_processes_are_followed_jobs(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = line(digits, folder, "run.max_steps=2", "sweep.run.seed=[7]", "launch.tasks_per_node=2")
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "seed=7" / "environment.json").read_text())["world_size"] == 2
    assert "2 processes" in (folder / "points" / "seed=7.log").read_text()


def test_a_killed_point_is_named_and_run_again(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = line(digits, folder, "sweep.run.seed=[1]")
    run = folder / "seed=1"
    with running(command, lambda: len(status.tail(run)) >= 6) as process:
        (last,) = attempts(run)
        os.kill(last.pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "killed by SIGKILL" in out
    assert results(folder)["seed=1"]["state"] == "failed"
    assert status.record(run).state == "failed"


def search(digits: Path, folder: Path, *more: str) -> list[str]:
    base = words(digits, folder, "eval.every_epochs=0", "checkpoint.async_save=false", "run.max_steps=6")
    space = ["search.space.optim.lr={log: [1e-4, 1e-2]}", "search.trials=2"]
    return [sys.executable, "-m", "vmamba_dist.cli", "search", *base, *space, "search.parallel=2", *more]


def test_halving_goes_on_where_it_was_killed(digits: Path, tmp_path: Path) -> None:
    """The survivor continues its own run, and the config of the best trial is that run's."""
    folder = tmp_path / "search"
    command = search(digits, folder, "search.method=halving", "search.rungs=[3]", "search.factor=2")
    judged = [folder / f"t00{i}" for i in range(2)]
    with running(
        command, lambda: any(store.list_checkpoints(run / "checkpoints") for run in judged)
    ) as process:
        process.kill()
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 to step 3, 1 to step 6, 2 at a time" in done.stdout

    scores = {run.name: metrics(run)[2]["eval/ema/top1"] for run in status.find_runs(folder)}
    assert len(scores) == 2
    best = max(sorted(scores), key=lambda name: scores[name])
    assert f"step 3: 1 of 2 go on: {best}" in done.stdout
    assert {run.name: len(metrics(run)) for run in status.find_runs(folder)} == {
        name: 6 if name == best else 3 for name in scores
    }
    found = load([f"config={folder / 'best.yaml'}"])
    assert found.run.dir == str(folder / best)
    assert found.run.max_steps == 6
    assert results(folder)[best]["optim.lr"] == f"{found.optim.lr:g}"
    assert len(results(folder)) == 2

    again = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert again.returncode == 0
    assert " begins" not in again.stdout
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_killed_at_random_moments_ends_as_if_never_killed(digits: Path, tmp_path: Path) -> None:
    """Kills fall anywhere: while a point loads, trains or saves, between points, in what the sweep itself writes."""
    swept = ["sweep.optim.lr=[1e-3,2e-3,3e-3]", "sweep.parallel=2", "checkpoint.every_steps=20"]
    whole = tmp_path / "whole"
    subprocess.run(line(digits, whole, *swept), check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    folder = tmp_path / "killed"
    command = line(digits, folder, *swept)
    moments = random.Random(7)
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(1, 12))
        process.kill()
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for run in status.find_runs(whole):
        assert metrics(folder / run.name) == metrics(run)
