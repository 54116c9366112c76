"""One run, started three ways, stopped in several: what it computes does not depend on who started it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmamba_dist.checkpoint.store import list_checkpoints
from vmamba_dist.cluster import submit

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = [sys.executable, str(ROOT / "launch" / "submit.py")]
TRAIN = [sys.executable, "-m", "vmamba_dist.cli", "train"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "vmamba_dist.train",
]
LIMIT_S = 120  # for one start on a busy machine


@pytest.fixture
def words(digits: Path, tmp_path: Path) -> list[str]:
    """A small run of the quick start on two processes, without an evaluation before its end."""
    return [
        "config=quickstart.yaml",
        f"run.dir={tmp_path / 'run'}",
        f"data.train={digits}",
        "data.global_batch=16",
        "data.image_size=16",
        "data.workers=0",
        "eval.every_epochs=0",
        "checkpoint.every_steps=4",
        "telemetry.log_every_steps=1",
        "telemetry.tensorboard=false",
    ]


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(line: list[str]) -> tuple[int, str, str]:
    process = start(line)
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def steps(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    raw = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in raw if line.endswith(b"\n")]


def wait_until(condition: Any, what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.05)


def pids(run: Path) -> list[int]:
    return [int(file.read_text()) for file in run.glob("slurm/*/*.pid")]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@contextmanager
def running(line: list[str], run: Path, *, step: int) -> Iterator[subprocess.Popen[str]]:
    """The command, once its run has taken `step` steps; whatever is left of it is killed at the end."""
    process = start(line)
    try:
        wait_until(lambda: len(steps(run)) >= step or process.poll() is not None, f"step {step}")
        yield process
    finally:
        process.kill()
        process.communicate()
        for pid in pids(run):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_dry_run_shows_the_plan_and_does_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in (
        str(tmp_path / "run"),
        "2 processes",
        " submit config=quickstart.yaml",
        "data.global_batch=16",
    ):
        assert part in out
    assert not (tmp_path / "run").exists()


def test_the_same_run_three_ways(words: list[str], tmp_path: Path) -> None:
    """Submitted and stopped by Ctrl-C, gone on with by `vmamba train`: equal to one unbroken torchrun."""
    broken, whole = tmp_path / "run", tmp_path / "whole"
    with running([*SUBMIT, *words], broken, step=3) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 75, err
    assert "step 3/" in out
    assert re.search("^stopped; to go on: /.* submit config=quickstart.yaml", out, re.MULTILINE)
    stopped_at = steps(broken)[-1]["step"]
    assert list_checkpoints(broken / "checkpoints")[-1].name == f"step-{stopped_at:09d}"

    end = stopped_at + 4
    code, _, err = finish([*TRAIN, *words, f"run.max_steps={end}"])
    assert code == 0, err
    code, _, err = finish([*TORCHRUN, *words, f"run.dir={whole}", f"run.max_steps={end}"])
    assert code == 0, err
    decided = ("step", "epoch", "samples", "loss", "lr", "grad_norm")
    ours, theirs = ([[line[key] for key in decided] for line in steps(run)] for run in (broken, whole))
    assert [line[0] for line in ours] == list(range(1, end + 1))
    assert ours == theirs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_torchrun_on_two_machines_is_torchrun_on_one(words: list[str], tmp_path: Path) -> None:
    """Two agents, as two machines start them, with a process each: the numbers of one agent with two."""
    apart, together = tmp_path / "run", tmp_path / "together"
    line = [*TORCHRUN[:3], "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    line.append(f"--master-port={free_port()}")
    tail = ["-m", "vmamba_dist.train", *words, "run.max_steps=4"]
    agents = [start([*line, f"--node-rank={rank}", *tail]) for rank in range(2)]
    try:
        for agent in agents:
            _, err = agent.communicate(timeout=LIMIT_S)
            assert agent.returncode == 0, err
    finally:
        for agent in agents:
            agent.kill()
    code, _, err = finish([*TORCHRUN, *words, f"run.dir={together}", "run.max_steps=4"])
    assert code == 0, err
    decided = ("step", "epoch", "samples", "loss", "lr", "grad_norm")
    ours, theirs = ([[line[key] for key in decided] for line in steps(run)] for run in (apart, together))
    assert len(ours) == 4
    assert ours == theirs


def await_checkpoint(run: Path) -> None:
    """One is published a while after its step."""
    deadline = time.monotonic() + 30
    while not list_checkpoints(run / "checkpoints"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def controller(run: Path) -> int:
    """The process that submitit put between the follower and the ranks."""
    return int(Path(f"/proc/{pids(run)[0]}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("victim", ["follower", pytest.param("controller", marks=pytest.mark.slow)])
def test_a_killed_launcher_takes_its_job_along_and_the_next_start_goes_on(
    words: list[str], tmp_path: Path, victim: str
) -> None:
    run = tmp_path / "run"
    with running([*SUBMIT, *words], run, step=5) as process:
        await_checkpoint(run)
        os.kill(process.pid if victim == "follower" else controller(run), signal.SIGKILL)
        code, _, err = finish([*SUBMIT, *words, "run.max_steps=12"])
    assert code == 0, err
    begun = re.findall(r"attempt (\d+) begins at step (\d+)", (run / "train.log").read_text())
    assert [attempt for attempt, _ in begun] == ["1", "2"]
    assert int(begun[1][1]) in (5, 9)  # after a checkpoint: one every four steps
    assert [line["step"] for line in steps(run)] == list(range(1, 13))
    assert not any(alive(pid) for pid in pids(run))


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([*SUBMIT, *words], run, step=2) as process:
        os.kill(int(next(run.glob("slurm/*/1.pid")).read_text()), signal.SIGKILL)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "rank 1 ended without a word" in err


def test_a_job_that_stands_alone_goes_on_and_is_stopped_by_its_id(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = finish([*SUBMIT, *words, "launch.follow=false"])
    assert code == 0, err
    job = int(out.split("job ")[1].split(",")[0])
    wait_until(lambda: len(steps(run)) >= 2, "step 2")
    assert f"kill {job}" in out
    os.kill(job, signal.SIGTERM)
    wait_until(lambda: not alive(job), "the job's end")
    last = steps(run)[-1]["step"]
    assert list_checkpoints(run / "checkpoints")[-1].name == f"step-{last:09d}"


@pytest.mark.slow  # the second start waits for the first to end before it gives up
def test_a_second_start_names_the_first(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([*SUBMIT, *words], run, step=1):
        code, _, err = finish([*SUBMIT, *words])
    assert code == 2
    assert "in use by attempt 1" in err
    assert any(f"pid {pid}" in err and err.rstrip().endswith(f"kill {pid}") for pid in pids(run))


def test_a_mistake_that_only_the_job_sees_is_one_line(words: list[str], tmp_path: Path) -> None:
    code, _, err = finish([*SUBMIT, *words, f"data.train={tmp_path / 'nowhere'}"])
    assert code == 2
    assert "no set of shards" in err
    assert len(err.splitlines()) == 1


def test_a_failing_rank_is_named_with_its_traceback_and_log(words: list[str], tmp_path: Path) -> None:
    """A folder where a file should be written: an error that no check of ours foresees."""
    (tmp_path / "run" / "bad.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    code, _, err = finish([*SUBMIT, *words, "launch.tasks_per_node=1"])
    assert code == 1
    assert err.startswith("rank 0 failed:\n")
    assert "IsADirectoryError" in err
    assert Path(err.splitlines()[-1].removeprefix("log: ")).exists()


def test_debug_runs_in_this_process(words: list[str], tmp_path: Path) -> None:
    code, out, err = finish([*SUBMIT, *words, "launch.cluster=debug", "run.max_steps=2"])
    assert code == 0, err
    assert "one process, not 2" in out
    assert len(steps(tmp_path / "run")) == 2
    assert not (tmp_path / "run" / "slurm").exists()
