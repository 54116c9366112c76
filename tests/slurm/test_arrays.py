"""A sweep as an array: so many points at a time, one that fails again alone, one that branches waits its turn."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm import lab
from vmamba_dist.cluster import status
from vmamba_dist.cluster.points import Branch, Point
from vmamba_dist.cluster.sweep import run_points
from vmamba_dist.config import load
from vmamba_dist.core.rundir import attempts
from vmamba_dist.data.shards import pack

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SWEEP = [sys.executable, str(lab.ROOT / "launch" / "sweep.py")]
# One process a point, few steps: what is looked at is who runs when.
SMALL = ["launch.cluster=slurm", "launch.nodes=1", "launch.tasks_per_node=1", "eval.every_epochs=0"]


def results(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def running() -> int:
    return lab.slurm("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i").count("\n")


def test_six_points_two_at_a_time_and_the_failed_one_again_alone(words: list[str], tmp_path: Path) -> None:
    folder, late, table = tmp_path / "a sweep", tmp_path / "late", tmp_path / "points.csv"
    good = [f"p{i},{i}e-3," for i in range(1, 6)]
    table.write_text(
        "\n".join(["name,optim.lr,data.train", *good[:2], f"late,6e-3,{late}", *good[2:]]) + "\n"
    )
    command = [*SWEEP, *words, *SMALL, f"run.dir={folder}", "run.max_steps=6", f"sweep.points={table}"]
    command += ["sweep.parallel=2"]

    queued = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert queued.returncode == 0, queued.stderr
    found = re.search(r"^arrays +(\d+): 6 points, 2 at a time$", queued.stdout, re.MULTILINE)
    assert found is not None, queued.stdout
    assert re.search(r"^p5 +queued", queued.stdout, re.MULTILINE)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "6 points: 0 finished, 6 queued or running already" in again.stdout
    assert "arrays" not in again.stdout

    most = 0
    deadline = time.monotonic() + 2 * lab.START_S
    while lab.slurm("squeue", "-h"):
        most = max(most, running())
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert most == 2

    first = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=120, check=False)
    states = dict(re.findall(r"^(\w+) +(\w+) +optim", first.stdout, re.MULTILINE))
    assert states == {f"p{i}": "finished" for i in range(1, 6)} | {"late": "failed"}

    pack("digits", late)
    done = subprocess.run([*command, "--follow"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 points: 5 finished, 0 queued or running already" in done.stdout
    assert re.search(r": 1 points, 2 at a time", done.stdout)
    rows = results(folder)
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert {row["step"] for row in rows.values()} == {"6"}
    assert {name: len(attempts(folder / name)) for name in rows} == dict.fromkeys(rows, 1)


def test_a_failure_is_told_with_its_reason(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = [
        *SWEEP,
        *words,
        *SMALL,
        f"run.dir={folder}",
        "run.max_steps=2",
        "sweep.model.num_classes=[5,12]",
    ]
    done = subprocess.run([*command, "--follow"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = results(folder)
    assert rows["num_classes=5"]["state"] == "failed"
    assert "model.num_classes=5: the shards have 10 classes" in rows["num_classes=5"]["reason"]
    assert rows["num_classes=12"]["state"] == "finished"
    looked = status.record(folder / "num_classes=5")
    assert (looked.state, looked.step) == ("failed", 0)


@pytest.mark.slow
def test_a_branch_waits_in_the_queue_for_its_trunk(words: list[str], tmp_path: Path) -> None:
    schedule = ("schedule.kind=wsd", "schedule.warmup_samples=64", "schedule.decay=0.5")
    base = load([*words, *SMALL, f"run.dir={tmp_path / 'sweep'}", "checkpoint.keep_every=4"])
    points = [
        Point("short", (*schedule, "schedule.samples=384"), Branch("trunk", 4)),
        Point("trunk", (*schedule, "schedule.samples=512")),
    ]
    short, trunk = run_points(points, base=base, folder=tmp_path / "sweep", parallel=2)
    assert (short.state, trunk.state) == ("finished", "finished")
    assert short.record.began is not None
    assert short.record.began["step"] == 4
    assert len(attempts(short.run)) == 1


def test_a_study_is_an_array_that_outlives_its_command(words: list[str], tmp_path: Path) -> None:
    """Killed while its grid runs and begun again, it queues nothing twice, and its runs are fitted."""
    folder, file = tmp_path / "study", tmp_path / "study.yaml"
    file.write_text(
        "study: {widths: [8, 12, 16], samples: [96, 160, 224], lrs: [1e-3, 4e-3], search_sizes: 1, held_out: 0}\n"
    )
    said = [f"config={file}", *words, *SMALL, f"run.dir={folder}", "model.drop_path=0", "eval.weights=raw"]
    said += ["schedule.kind=wsd", "schedule.warmup=0.2"]
    command = [sys.executable, "-m", "vmamba_dist.cli", "study"]
    first = subprocess.Popen([*command, "run", *said, "sweep.parallel=4"], stdout=subprocess.DEVNULL)
    try:
        begun = folder / "vmamba_atto-w8-224-s0"
        lab.wait_until(lambda: first.poll() is not None or status.tail(begun), "the grid's first run")
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()

    done = subprocess.run(
        [*command, "run", *said, "sweep.parallel=4"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = list(status.find_runs(folder))
    assert len(runs) == 2 + 9
    assert {run.name: (status.record(run).state, len(attempts(run))) for run in runs} == {
        run.name: ("finished", 1) for run in runs
    }
    began = status.record(folder / "vmamba_atto-w12-96-s0").began
    assert began is not None
    assert Path(began["checkpoint"]).parts[-3] == "vmamba_atto-w12-224-s0"
    fitted = subprocess.run(
        [*command, "fit", *said], capture_output=True, text=True, timeout=120, check=False
    )
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    assert "of 9 runs" in fitted.stdout


def test_an_element_that_is_requeued_goes_on(words: list[str], tmp_path: Path) -> None:
    """Another element of its array trains on meanwhile; both end as if nothing had happened."""
    folder = tmp_path / "sweep"
    command = [*SWEEP, *words, *SMALL, f"run.dir={folder}", "sweep.run.seed=[1,2]", "sweep.parallel=2"]
    command += ["checkpoint.every_steps=1000", "schedule.epochs=3"]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    run = folder / "seed=2"
    lab.wait_until(lambda: len(status.tail(run)) >= 3, "three steps")
    lab.slurm("scontrol", "requeue", status.job_of(run))
    lab.wait_until(lambda: len(attempts(run)) == 2, "a second start")
    jobs = status.queue()
    looked = status.record(run, jobs)
    assert (looked.state, looked.job) == ("running", status.job_of(run))  # not the whole array's number
    done = subprocess.run([*command, "--follow"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arrays" not in done.stdout  # nothing was queued anew
    steps = [entry["step"] for entry in status.metrics(run)]
    assert steps == list(range(1, 3 * lab.STEPS + 1))
    assert "asked to stop: saved step" in (run / "train.log").read_text()
    assert {name: row["starts"] for name, row in results(folder).items()} == {"seed=1": "1", "seed=2": "2"}


def test_what_slurm_refuses_is_one_line_with_nothing_queued(words: list[str], tmp_path: Path) -> None:
    command = [*SWEEP, *words, *SMALL, f"run.dir={tmp_path / 'sweep'}", "sweep.run.seed=[1,2]"]
    command += ["launch.partition=nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert lab.slurm("squeue", "-h") == ""
    assert not (tmp_path / "sweep" / "slurm").exists()
