"""Who owns a run directory: one living process, whatever it forked, and the attempt that started last."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmamba_dist.core import rundir
from vmamba_dist.core.rundir import RunBusy, RunDir, Superseded

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from vmamba_dist.core.rundir import RunDir
run = RunDir.acquire(sys.argv[1], wait_s=0)
{then}
print(run.attempt, flush=True)
time.sleep(60)
"""
FORK = """
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
"""


@contextmanager
def owner(path: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that owns the run directory until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "4711"},
    )
    assert process.stdout is not None
    with process, process.stdout:
        yield process
        process.kill()


def line(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_living_owner_is_named_after_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with owner(tmp_path) as process:
        assert line(process) == 1
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING), pytest.raises(RunBusy) as caught:
            RunDir.acquire(tmp_path, wait_s=0.3)
        assert time.monotonic() - begin >= 0.3
    for words in (f"pid {process.pid}", "job 4711", "attempt 1", str(tmp_path), "run.dir"):
        assert words in str(caught.value)
    assert len(caplog.messages) == 1
    assert f"pid {process.pid}" in caplog.messages[0]


def test_a_killed_owner_is_followed_by_the_next_attempt(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with owner(tmp_path) as process:
            assert line(process) == attempt
    run = RunDir.acquire(tmp_path, wait_s=0)
    try:
        assert run.attempt == 3
        described = json.loads(run.lock.read_text())
        assert described["attempt"] == 3
        assert described["pid"] == os.getpid()
        assert set(described) == {"attempt", "host", "pid", "job", "started"}
        assert [a.attempt for a in rundir.attempts(tmp_path)] == [1, 2, 3]
    finally:
        run.release()


def test_an_owner_that_dies_while_others_wait_gives_way(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        line(process)
        os.kill(process.pid, signal.SIGSTOP)  # stopped is still alive
        with pytest.raises(RunBusy):
            RunDir.acquire(tmp_path, wait_s=0)
        os.kill(process.pid, signal.SIGKILL)
        run = RunDir.acquire(tmp_path, wait_s=10)
        run.release()
    assert run.attempt == 2


def test_a_forked_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    """flock belongs to the open file, which fork shares: a DataLoader worker kept the run locked."""
    with owner(tmp_path, FORK) as process:
        child = line(process)
        try:
            assert line(process) == 1
            with pytest.raises(RunBusy):  # the child's closing has not unlocked its parent
                RunDir.acquire(tmp_path, wait_s=0)
            process.kill()
            process.wait()
            os.kill(child, 0)
            run = RunDir.acquire(tmp_path, wait_s=5)  # the child may just now be closing its copy
            run.release()
            os.kill(child, 0)
            assert run.attempt == 2
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_deleted_lock_lets_a_second_owner_in_and_the_first_may_not_publish(tmp_path: Path) -> None:
    first = RunDir.acquire(tmp_path, wait_s=0)
    first.check_attempt()
    RunDir.attach(tmp_path, first.attempt).check_attempt()
    first.lock.unlink()
    second = RunDir.acquire(tmp_path, wait_s=0)
    try:
        assert second.attempt == 2
        second.check_attempt()
        with pytest.raises(Superseded, match="attempt 2"):
            first.check_attempt()
    finally:
        first.release()
        second.release()


def test_a_removed_run_directory_ends_the_attempt(tmp_path: Path) -> None:
    run = RunDir.acquire(tmp_path, wait_s=0)
    run.attempts.unlink()
    with pytest.raises(Superseded, match="removed or replaced"):
        run.check_attempt()
    run.release()


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_line_torn_by_a_kill_loses_no_attempt(tmp_path: Path, torn: int) -> None:
    for _ in range(2):
        RunDir.acquire(tmp_path, wait_s=0).release()
    whole = (tmp_path / "attempts.jsonl").read_bytes()
    (tmp_path / "attempts.jsonl").write_bytes(whole[:-torn])
    (tmp_path / "lock").write_bytes(b'{"attempt": 2, "ho')
    run = RunDir.acquire(tmp_path, wait_s=0)
    run.release()
    # The second line is whole but for its newline at torn = 1; else its start was never published.
    assert run.attempt == (3 if torn == 1 else 2)
    again = RunDir.acquire(tmp_path, wait_s=0)
    again.release()
    assert again.attempt == run.attempt + 1


def test_release_lets_the_same_process_start_again(tmp_path: Path) -> None:
    run = RunDir.acquire(tmp_path / "deep" / "run", wait_s=0)
    with pytest.raises(RunBusy):
        RunDir.acquire(run.path, wait_s=0)
    run.release()
    run.release()
    again = RunDir.acquire(run.path, wait_s=0)
    again.release()
    assert again.attempt == 2
    assert again.checkpoints.is_dir()
    assert {p.name for p in run.path.iterdir()} == {"lock", "attempts.jsonl", "checkpoints"}


def test_every_name_in_the_run_directory_is_put_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable: set[str] = set()
    sync = rundir.sync_directory

    def seen(path: Path) -> None:
        durable.update(entry.name for entry in path.iterdir())
        sync(path)

    monkeypatch.setattr(rundir, "sync_directory", seen)
    RunDir.acquire(tmp_path, wait_s=0).release()
    assert durable == {entry.name for entry in tmp_path.iterdir()}
