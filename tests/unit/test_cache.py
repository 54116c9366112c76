"""The cache gives what the source gives, whatever was killed, damaged or evicted before."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.cache import PIECE, Cache, CachedSource, Entry
from vmamba_dist.data.sources import LocalSource, SourceError

SIZE = 10 * PIECE + 1234
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python ≥ 3.12, beside threads


class Counted:
    """Shards of random bytes that count what is read of them."""

    concurrency = 1

    def __init__(self, count: int = 1, size: int = SIZE) -> None:
        self.shards = [random.Random(i).randbytes(size) for i in range(count)]
        self.reads: list[tuple[int, int, int]] = []

    def read(self, shard: int, start: int, end: int) -> bytes:
        self.reads.append((shard, start, end))
        return self.shards[shard][start:end]

    def close(self) -> None:
        self.reads.clear()

    def entries(self, **changes: str) -> list[Entry]:
        return [
            Entry(f"shard {i}", len(data), changes.get("sha256", hashlib.sha256(data).hexdigest()))
            for i, data in enumerate(self.shards)
        ]


def cached(folder: Path, inner: Counted, max_bytes: int = 1 << 30, **changes: str) -> CachedSource:
    return CachedSource(inner, Cache(folder, max_bytes), inner.entries(**changes))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*.shard"))


def test_a_range_is_read_once_and_then_from_the_disk(tmp_path: Path) -> None:
    inner = Counted()
    source = cached(tmp_path, inner)
    data = inner.shards[0]
    assert source.read(0, PIECE + 5, 3 * PIECE - 5) == data[PIECE + 5 : 3 * PIECE - 5]
    assert inner.reads == [(0, PIECE, 3 * PIECE)]
    assert source.read(0, 0, 5 * PIECE) == data[: 5 * PIECE]  # what lies around it
    assert inner.reads[1:] == [(0, 0, PIECE), (0, 3 * PIECE, 5 * PIECE)]
    del inner.reads[:]
    rng = random.Random(0)
    cached(tmp_path, inner).read(0, 0, SIZE)
    del inner.reads[:]
    for _ in range(50):
        start, end = sorted(rng.sample(range(SIZE + 1), 2))
        assert source.read(0, start, end) == data[start:end]
    assert source.read(0, SIZE - 3, SIZE + 99) == data[-3:]
    assert inner.reads == []


def test_sha256_is_checked_once_the_shard_is_whole(tmp_path: Path) -> None:
    inner = Counted()
    source = cached(tmp_path, inner, sha256="0" * 64)
    source.read(0, 0, SIZE - PIECE)
    with pytest.raises(SourceError, match=r"shard 0 has changed or was damaged on its way: its sha256 is"):
        source.read(0, SIZE - PIECE, SIZE)
    assert not list(tmp_path.glob("*.shard"))


def test_a_source_that_gives_too_little_is_an_error(tmp_path: Path) -> None:
    inner = Counted()
    source = cached(tmp_path, inner)
    inner.shards[0] = inner.shards[0][: 5 * PIECE]
    with pytest.raises(SourceError, match="shard 0 has changed: bytes from 0 on end before the index says"):
        source.read(0, 0, SIZE)
    assert source.read(0, 0, 5 * PIECE) == inner.shards[0]


@pytest.mark.parametrize("where", ["data", "sum", "head", "cut"])
def test_damage_is_read_anew(tmp_path: Path, where: str) -> None:
    inner = Counted()
    source = cached(tmp_path, inner)
    source.read(0, 0, SIZE)
    (path,) = tmp_path.glob("*.shard")
    with path.open("r+b") as file:
        if where == "cut":
            file.truncate(path.stat().st_size - 7)
        else:
            file.seek({"data": path.stat().st_size - SIZE + 99, "sum": 64, "head": 5}[where])
            file.write(b"damage")
    del inner.reads[:]
    assert source.read(0, 0, 2 * PIECE) == inner.shards[0][: 2 * PIECE]
    assert inner.reads == [(0, 0, PIECE if where in ("data", "sum") else 2 * PIECE)]
    assert source.read(0, 0, SIZE) == inner.shards[0]


def test_it_never_holds_more_than_it_may_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    inner = Counted(8)
    bound = 3 * (SIZE + 8192) + PIECE
    source = cached(tmp_path, inner, bound)
    paths = {i: tmp_path / entry.name for i, entry in enumerate(inner.entries())}
    for i in (0, 1, 2):
        source.read(i, 0, SIZE)
        os.utime(paths[i], (i + 1, i + 1))
    source.read(0, 0, 10)  # used: its time is now
    source.read(3, 0, SIZE)
    assert [i for i, path in paths.items() if path.exists()] == [0, 3]
    rng = random.Random(1)
    for _ in range(200):
        shard, start = rng.randrange(8), rng.randrange(SIZE)
        end = min(SIZE, start + rng.randrange(4 * PIECE))
        assert source.read(shard, start, end) == inner.shards[shard][start:end]
        assert on_disk(tmp_path) <= bound


def test_a_bound_that_holds_nothing_still_reads(tmp_path: Path) -> None:
    inner = Counted()
    assert cached(tmp_path, inner, 100).read(0, 5, 500) == inner.shards[0][5:500]
    assert on_disk(tmp_path) == 0


def forked(child: Callable[[], bool]) -> int:
    """Run in a fork; returns its pid. It ends with 0 where `child` returns true."""
    pid = os.fork()
    if pid:
        return pid
    status = 2
    try:
        status = 0 if child() else 1
    finally:
        os._exit(status)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@forks
def test_a_full_disk_is_told_once_and_reads_on(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses to write beyond it."""
    inner = Counted(4)
    source = cached(tmp_path, inner)

    def child() -> bool:
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vmamba_dist.data.cache").addHandler(handler)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        right = all(source.read(i, 0, SIZE) == inner.shards[i] for i in range(4))
        return right and len(told) == 1 and "the cache fails" in told[0]

    assert exit_code(forked(child)) == 0


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("pread", errno.EIO),
        ("open", errno.EROFS),
        ("utime", errno.EROFS),
        ("pwrite", errno.EROFS),
        ("ftruncate", errno.EIO),
        ("fstat", errno.ESTALE),
        ("link", errno.EIO),
        ("scandir", errno.EIO),
    ],
)
def test_a_folder_that_fails_is_one_that_has_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    error: int,
) -> None:
    """A worn disk, or one remounted read-only: once that error ended the run. A healthy disk has none to give."""
    inner = Counted(3)
    source = cached(tmp_path, inner, 2 * SIZE)
    source.read(0, 0, SIZE)
    os.utime(tmp_path / inner.entries()[0].name, (1, 1))  # so that the next use is noted

    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        for i in (0, 1, 2, 0):
            assert source.read(i, 7, SIZE - 7) == inner.shards[i][7 : SIZE - 7]
    assert caplog.text.count("the cache fails") == 1
    assert os.strerror(error) in caplog.text
    for i in (0, 1, 2):
        assert source.read(i, 0, SIZE) == inner.shards[i]
    with pytest.raises(SourceError, match="has changed or was damaged"):  # which is an OSError too
        cached(tmp_path / "other", inner, sha256="0" * 64).read(0, 0, SIZE)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir='.*file/below' cannot be used"):
        Cache(tmp_path / "file" / "below", 1 << 20)


def test_a_shard_of_another_version_is_another_one(tmp_path: Path) -> None:
    made = Cache(tmp_path, 1 << 30)
    first, other = (Entry("s3://b/x.tar", 4, "", tag) for tag in ("one", "two"))
    assert made.read(first, 0, 4, lambda low, high: b"aaaa"[low:high]) == b"aaaa"
    assert made.read(other, 0, 4, lambda low, high: b"bbbb"[low:high]) == b"bbbb"
    assert Entry("a", 4, "5" * 64).name == Entry("b", 4, "5" * 64).name  # the same content, wherever it lies


@forks
def test_many_processes_share_it_and_kills_leave_it_right(tmp_path: Path) -> None:
    """Readers at a bound that evicts; three are killed at work, and every read of the others is checked."""
    inner = Counted(6)
    bound = 4 * SIZE

    def reading(seed: int, rounds: int) -> int:
        def child() -> bool:
            source, rng = cached(tmp_path, inner, bound), random.Random(seed)
            for _ in range(rounds):
                shard, start = rng.randrange(6), rng.randrange(SIZE)
                end = min(SIZE, start + rng.randrange(5 * PIECE))
                if source.read(shard, start, end) != inner.shards[shard][start:end]:
                    return False
            return True

        return forked(child)

    victims = [reading(seed, 10**9) for seed in range(3)]
    readers = [reading(seed, 300) for seed in range(10, 13)]
    for victim in victims:
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        assert exit_code(victim) == -signal.SIGKILL
    assert [exit_code(reader) for reader in readers] == [0, 0, 0]
    assert exit_code(reading(99, 100)) == 0
    assert on_disk(tmp_path) <= bound


def test_what_a_killed_process_was_making_is_removed(tmp_path: Path) -> None:
    inner = Counted(4)
    left = tmp_path / "x.shard.1.2.tmp"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    source = cached(tmp_path, inner, 2 * SIZE)
    for i in range(4):
        source.read(i, 0, SIZE)
    assert not left.exists()


def test_a_local_file_that_changes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"a" * 1000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = LocalSource([path], sizes=[1000], sha256=[digest])
    unknown = LocalSource([path], sizes=[1000])
    assert known.read(0, 0, 5) == unknown.read(0, 0, 5) == b"aaaaa"
    os.utime(path, (1, 1))  # touched, or copied again
    assert known.read(0, 0, 5) == b"aaaaa"
    with pytest.raises(SourceError, match="was written again, and its index has no sha256"):
        unknown.read(0, 0, 5)
    with path.open("r+b") as file:
        file.write(b"b")
    os.utime(path, (2, 2))
    with pytest.raises(SourceError, match=r"a\.tar has changed: its sha256 is not its index's any more"):
        known.read(0, 0, 5)
    begun = LocalSource([path], sizes=[1000], written=[2], sha256=[digest])  # as it was, and is no more
    with pytest.raises(SourceError, match=r"a\.tar has changed: its sha256 is not its index's any more"):
        begun.read(0, 0, 5)
    path.write_bytes(b"a" * 999)
    with pytest.raises(SourceError, match="it has 999 bytes, and had 1000"):
        known.read(0, 0, 5)
    for source in (known, unknown, begun):
        source.close()
