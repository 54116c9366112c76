"""What a run directory says of its run, read without torch and without touching it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vmamba_dist.checkpoint import store
from vmamba_dist.cluster import ledger, status
from vmamba_dist.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def make(at: Path, *, steps: int, saved: int = 0, total: int = 10, host: str = "", **config: Any) -> Path:
    """A run of batches of 2 that took `steps` steps and saved at one of them."""
    run = at
    run.mkdir(parents=True)
    lines = [{"step": i, "loss": 3.0 / i, "samples_per_s": 10.0 * i} for i in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    now = datetime.now(UTC).isoformat()
    start = {"attempt": 1, "host": host or socket.gethostname(), "pid": 1, "job": "77", "started": now}
    (run / "attempts.jsonl").write_text(json.dumps(start) + "\n")
    (run / "lock").write_text("")
    if saved:
        place = store.directory(run / "checkpoints", saved)
        place.mkdir(parents=True)
        config = {"data": {"global_batch": 2}, "eval": {"patience": 0}, "run": {"max_steps": None}} | config
        extra = {"config": config, "total_samples": 2 * total}
        metrics = {"eval/ema/top1": 50.0 + saved}
        meta = store.Meta(saved, 2 * saved, 0, {}, 1, "ddp", "", {}, metrics, extra)
        store.write_manifest(place, store.Manifest(meta, {}))
    return run


def test_a_run_is_finished_when_its_checkpoint_says_so(tmp_path: Path) -> None:
    found = status.record(make(tmp_path / "run", steps=10, saved=10))
    assert (found.state, found.step, found.total_steps, found.checkpoint) == ("finished", 10, 10, 10)
    assert (found.loss, found.samples_per_s, found.attempts, found.job) == (0.3, 55.0, 1, "77")
    assert found.evaluation == {"eval/ema/top1": 60.0}


@pytest.mark.parametrize(
    ("steps", "saved", "state"),
    [(4, 4, "stopped"), (6, 4, "failed"), (3, 0, "failed")],
    ids=["saved at its last step", "went on after its last save", "never saved"],
)
def test_a_run_that_ended_early_stopped_or_failed(steps: int, saved: int, state: str, tmp_path: Path) -> None:
    assert status.record(make(tmp_path / "run", steps=steps, saved=saved)).state == state


def test_a_pause_is_where_it_was_asked_for(tmp_path: Path) -> None:
    found = status.record(make(tmp_path / "run", steps=4, saved=4, run={"max_steps": 4}))
    assert (found.state, found.note) == ("paused", "at run.max_steps=4")


def test_a_run_out_of_patience_is_finished(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=4, saved=4, eval={"patience": 2})
    meta = status.newest(run)
    assert meta is not None
    assert not status.is_finished(meta)
    meta.state["evals_since_best"] = 2
    assert status.is_finished(meta)


def test_a_living_owner_runs_and_a_silent_one_is_stale(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=4)
    with (run / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status.record(run).state == "running"
        long_ago = 1_000_000_000
        os.utime(run / "metrics.jsonl", (long_ago, long_ago))
        found = status.record(run)
    assert found.state == "stale"
    assert "attempt 1" in found.note
    assert status.record(run).state == "failed"


def test_another_machine_that_wrote_just_now_runs(tmp_path: Path) -> None:
    assert status.record(make(tmp_path / "run", steps=4, host="elsewhere")).state == "running"
    assert status.record(make(tmp_path / "done", steps=10, saved=10, host="elsewhere")).state == "finished"


@pytest.mark.parametrize(("in_queue", "state"), [("PENDING", "queued"), ("RUNNING", "running")])
def test_a_requeued_run_is_as_the_queue_says(in_queue: str, state: str, tmp_path: Path) -> None:
    assert status.record(make(tmp_path / "run", steps=4, saved=4), {"77": in_queue}).state == state


def test_a_torn_line_and_a_damaged_checkpoint_are_passed_over(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=9, saved=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    store.directory(run / "checkpoints", 8).mkdir()
    found = status.record(run)
    assert (found.step, found.checkpoint) == (9, 4)


def test_the_tail_of_a_long_file_is_whole_lines(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=5000)
    lines = status.tail(run)
    assert lines[-1]["step"] == 5000
    assert [line["step"] for line in lines] == list(range(5001 - len(lines), 5001))
    assert len(lines) < 5000


def test_runs_below_a_folder_are_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "b" / "deep", steps=10, saved=10)
    make(tmp_path / "a", steps=4, saved=2)
    assert status.main([str(tmp_path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "state", "step"]
    assert [row.split()[:3] for row in rows] == [
        [str(tmp_path / "a"), "failed", "4/10"],
        [str(tmp_path / "b" / "deep"), "finished", "10/10"],
    ]


def test_a_sweep_shows_its_points_in_their_order_begun_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    make(folder / "b", steps=10, saved=10)
    (folder / "slurm").mkdir()
    (folder / "points").mkdir()
    (folder / "points" / "a.job").write_text("12_0\n")
    (folder / status.SWEEP).write_text(json.dumps({"points": [{"name": "b"}, {"name": "a"}, {"name": "c"}]}))
    runs = list(status.find_runs(tmp_path))
    assert runs == [folder / "b", folder / "a", folder / "c"]
    jobs = {"12_0": "PENDING", "12": "RUNNING"}
    assert [status.record(run, jobs).state for run in runs] == ["finished", "queued", "new"]
    assert status.record(folder / "a", jobs).job == "12_0"
    assert status.main([str(folder)]) == 0
    assert capsys.readouterr().out.count("\n") == 4


def test_records_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", steps=4, saved=2)
    assert status.main([str(tmp_path / "a"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["checkpoint"], found["samples"]) == ("failed", 2, 4)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no run directory there"):
        status.main([str(tmp_path / "nowhere")])


def test_looking_loads_no_torch() -> None:
    code = (
        "import sys, vmamba_dist.cluster.status, vmamba_dist.cluster.sweep\n"
        "heavy = {'torch', 'torchvision', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_one_run_is_told_with_its_state_its_checkpoint_its_job_and_why_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run", steps=6, saved=4)
    for restart, why in enumerate(
        ("pre-empted, saved", "disk; 3 starts in a row have brought no new checkpoint")
    ):
        ledger.append(run, ledger.Line("begin", "s", "77", restart, 0))
        ledger.append(
            run, ledger.Line("end", "s", "77", restart, 4, verdict=("go on", "stop")[restart], why=why)
        )
    assert status.main([str(run)]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert next(iter(told)) == "state"
    assert told["state"].startswith("failed: disk; 3 starts in a row")
    assert told["ended"].startswith("stop: disk")
    assert (told["starts"], told["job"], told["trained"]) == ("2", "77", "step 6, loss 0.5000")
    assert told["saved"].startswith("step 4, ")


@pytest.mark.parametrize(
    ("jobs", "state"),
    [(None, "stopped"), ({}, "stopped"), ({"77": "PENDING"}, "queued"), ({"77": "RUNNING"}, "running")],
)
def test_starts_that_never_reached_training_are_starts(
    jobs: dict[str, str] | None, state: str, tmp_path: Path
) -> None:
    folder = tmp_path / "slurm" / "s"
    folder.mkdir(parents=True)
    (folder / "77_submitted.pkl").write_bytes(b"")
    for restart in range(2):
        ledger.append(tmp_path, ledger.Line("begin", "s", "77", restart, 0))
        ledger.append(tmp_path, ledger.Line("end", "s", "77", restart, 0, verdict="go on", why="no disk"))
    found = status.record(tmp_path, jobs)
    assert (found.state, found.attempts, found.job, found.last_end) == (state, 2, "77", "go on: no disk")
    assert "go on: no disk" in status.text(tmp_path, jobs)
