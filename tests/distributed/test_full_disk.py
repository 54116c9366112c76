"""A disk without room under the whole run directory: training goes on, and nothing that it noted is lost."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from distributed.micro import metrics, train, words
from distributed.test_async_checkpoint import fill_up, names, small_file_system
from distributed.world import world
from shardsets import make_set
from vmamba_dist.checkpoint.store import CheckpointError
from vmamba_dist.core.log import logging_to
from vmamba_dist.data.badlog import BadLog
from vmamba_dist.data.batch import BadSample
from vmamba_dist.train.meter import MetricsLog

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("images") / "set", count=64)


def few(images: Path, run_dir: Path) -> list[str]:
    """24 steps, a checkpoint every 4."""
    fields = ("data.global_batch=4", "eval.split=train", "eval.every_epochs=0", "schedule.epochs=2")
    more = ("run.max_steps=24", "checkpoint.max_failures=99", "telemetry.tensorboard=true")
    return words(images, run_dir, *fields, *more)


def train_on_a_full_disk(args: list[str], run_dir: Path, full_at: int, free_at: int) -> str:
    """The disk is full when step `full_at` is written down, and has room again from `free_at` on."""
    write = MetricsLog.write

    def with_change(self: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == full_at:
            with suppress(OSError):  # a save in flight may take some of it
                fill_up(run_dir, 0)
        if line["step"] == free_at:
            (run_dir / "ballast").unlink()
        write(self, line)

    with patch.object(MetricsLog, "write", with_change):
        return train(args)


@pytest.mark.slow
def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, images: Path) -> None:
    """It used to end the run with a bare OSError at the first step that was not written."""
    run_dir = tmp_path / "run"
    with small_file_system(run_dir, "64m"):
        told = world(2).run(train_on_a_full_disk, few(images, run_dir), run_dir, 3, 22)
        assert told == ["paused"] * 2
        assert [line["step"] for line in metrics(run_dir)] == list(range(1, 25))
        assert names(run_dir) == {"step-000000024"}
        assert len(list((run_dir / "tensorboard").iterdir())) == 2  # another file after the gap
        log = (run_dir / "train.log").read_text()
        assert "metrics.jsonl is written again, and nothing of it is missing" in log
        assert "saved step 24" in log


def test_lines_still_unwritten_at_the_end_are_one_clear_error(tmp_path: Path, images: Path) -> None:
    run_dir = tmp_path / "run"
    with small_file_system(run_dir, "64m"):  # which can only be unmounted where every file was closed
        with pytest.raises(CheckpointError) as caught:
            world(2).run(train_on_a_full_disk, few(images, run_dir), run_dir, 6, 99)
        assert f"rank 0 could not begin {run_dir}/checkpoints/step-000000024" in str(caught.value)
        assert f"No space left on device: '{run_dir}/metrics.jsonl'; free space there" in str(caught.value)
        assert names(run_dir) <= {"step-000000004"}


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_wait_for_room_and_say_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "small"
    caplog.set_level(logging.WARNING, "vmamba_dist")
    with small_file_system(disk):
        log = MetricsLog(disk / "metrics.jsonl", after_step=0)
        log.write({"step": 1})
        fill_up(disk, 0)
        for step in range(2, 2000):  # beyond the page that the file has
            log.write({"step": step})
        with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"):
            log.sync()
        assert 0 < (disk / "metrics.jsonl").stat().st_size < 2000 * 10
        (disk / "ballast").unlink()
        log.write({"step": 2000})
        log.close()
        assert lines_of(disk / "metrics.jsonl") == list(range(1, 2001))
    assert [line.split("/")[-1] for line in caplog.messages] == [
        "metrics.jsonl cannot be written: [Errno 28] No space left on device; "
        "its lines wait in memory until there is room",
        "metrics.jsonl is written again, and nothing of it is missing",
    ]


def test_memory_for_lines_that_wait_is_bounded_and_the_file_is_let_go(tmp_path: Path) -> None:
    disk = tmp_path / "small"
    with small_file_system(disk), patch.object(MetricsLog, "MOST_BYTES", 20_000):
        log = MetricsLog(disk / "metrics.jsonl", after_step=0)
        for step in range(1, 3001):  # with room, the bound is none
            log.write({"step": step})
        fill_up(disk, 0)

        def write_on() -> None:
            with log:
                for step in range(3001, 9000):
                    log.write({"step": step})

        with pytest.raises(OSError, match="No space left on device"):
            write_on()
        whole = (disk / "metrics.jsonl").read_bytes().splitlines()[:-1]
        assert [json.loads(line)["step"] for line in whole] == list(range(1, len(whole) + 1))
        assert len(whole) >= 3000


def test_what_a_failed_fsync_dropped_is_written_again(tmp_path: Path) -> None:
    """Linux forgets the pages that it could not sync, and the next fsync succeeds without them."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, after_step=0)
    log.write({"step": 1})
    log.sync()
    log.write({"step": 2})

    def fsync(descriptor: int) -> None:
        os.ftruncate(descriptor, len('{"step": 1}\n'))
        raise OSError(28, "No space left on device")

    with patch.object(os, "fsync", fsync), pytest.raises(OSError, match="No space left"):
        log.sync()
    log.write({"step": 3})
    log.close()
    assert lines_of(path) == [1, 2, 3]


def bad(position: int) -> BadSample:
    return BadSample(0, position, "shard", position, f"key-{position}", "torn", "other", 1)


def test_choices_wait_for_room_and_stand_once(tmp_path: Path) -> None:
    disk = tmp_path / "small"
    with small_file_system(disk):
        path = disk / "bad.jsonl"
        one, other = BadLog(path), BadLog(path)  # of two ranks
        one.note([bad(0)])
        fill_up(disk, 0)
        for position in range(1, 100):  # beyond the page that the file has: a line is torn
            one.note([bad(position)])
        with pytest.raises(OSError, match=r"No space left on device: '.*/bad.jsonl'"):
            one.sync()
        (disk / "ballast").unlink()
        other.note([bad(100)])
        one.note([bad(101)])
        with one, other:
            pass
        found = [each.position for each in BadLog(path).known]
        assert sorted(found) == list(range(102))


def test_a_log_without_room_is_told_once_and_raises_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "small"
    log = logging.getLogger("vmamba_dist.test")
    with small_file_system(disk):
        with logging_to(disk / "train.log", 0):
            log.info("begins")
            fill_up(disk, 0)
            for number in range(99):
                log.info("line %d %s", number, "x" * 100)
        assert (disk / "train.log").read_text().splitlines()[0].endswith("begins")
    told = capsys.readouterr()
    assert told.err.count("train.log cannot be written: [Errno 28] No space left on device\n") == 1
    assert "Traceback" not in told.err
    assert "line 98" in told.out  # the terminal has all
