"""A bounded folder of shards' bytes on a machine's own disk, shared by its processes.

Law: what is read from the cache is what the source gave, or it is fetched again. Every piece carries a checksum,
which is written after it; so a kill, a crash or a full disk at any byte leaves at worst a piece that does not
count. A shard whose pieces are all there is held against its index's sha256, once, before it counts as whole. The
folder never holds more than it may. A folder that fails, whatever in it, is one that has nothing: never a fault of the
run.

A shard is one sparse file, published by a link when its head stands:
    64 bytes            `VMCACHE1`, u64 size of the shard, u64 1 once its sha256 was checked
    u64 × pieces        the first 8 bytes of each piece's sha256; 0: the piece is not there
    from a multiple of 4096 on: the shard's bytes, in pieces of 64 KiB
Pieces, and not whole shards, because an epoch begins inside hundreds of shards at once.

`usage` counts the bytes in the folder, under its flock. Where room is needed, the shards that were used least
recently go; whoever reads one at that moment holds it open, and reads on.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmamba_dist.config.addresses import redact
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.sources import Source, SourceError

log = logging.getLogger(__name__)

PIECE = 1 << 16  # bytes: small against a block of samples, so that little is read beyond it
_MAGIC = b"VMCACHE1"
_HEAD = 64
_WHOLE_AT = 16
_PAGE = 4096
_KEEP = 0.9  # of the bound stays after an eviction, so that the next one is not due at once
_TOUCH_S = 1.0  # between two notes of a use
_STALE_S = 3600.0  # files of a process that was killed at work


@dataclass(frozen=True)
class Entry:
    """A shard as the cache knows it. `version` tells two shards of one address apart; sha256 may be ""."""

    address: str
    size: int
    sha256: str = ""
    version: str = ""

    @property
    def name(self) -> str:
        known = self.sha256 or f"{self.address} {self.size} {self.version}"
        return hashlib.sha256(known.encode()).hexdigest()[:40] + ".shard"


class Cache:
    """The folder. Holds nothing open between reads, so that threads and forks may share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises ConfigError where the folder cannot be made or written."""
        self.folder = folder
        self.max_bytes = max_bytes
        self._told = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._usage() as (used, write):
                write(used)
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir={str(folder)!r} cannot be used ({error.strerror}); give a folder on a local disk that "
                "every rank may write"
            ) from error

    def read(self, entry: Entry, start: int, end: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Read bytes [start, end) of a shard; fetch(start, end) gives those that are not here.

        Raises SourceError where the shard, once whole, is not what its sha256 says; and what fetch raises.
        """
        end = min(end, entry.size)
        if start >= end:
            return b""
        file = self._open(entry)
        if file is None:
            return fetch(start, end)
        try:
            return self._read(file, entry, start, end, fetch)
        finally:
            with suppress(OSError):  # what fails to be written may fail to be closed
                os.close(file)

    def _read(
        self, file: int, entry: Entry, start: int, end: int, fetch: Callable[[int, int], bytes]
    ) -> bytes:
        first, stop = start // PIECE, -(-end // PIECE)
        sums = self._get(file, 8 * (stop - first), _HEAD + 8 * first) or b""
        base = _data_at(entry.size)
        parts: list[bytes | None] = []
        for i in range(first, stop):
            have = None
            sum_ = sums[8 * (i - first) : 8 * (i - first) + 8]
            if any(sum_):
                have = self._get(file, min(PIECE, entry.size - i * PIECE), base + i * PIECE)
                if have is not None and _sum(have) != sum_:
                    log.warning(
                        "%s: piece %d of %s is damaged; reading it anew",
                        self.folder,
                        i,
                        redact(entry.address),
                    )
                    have = None
            parts.append(have)
        added = False
        for low, high in _gaps(parts):
            at = (first + low) * PIECE
            data = fetch(at, min((first + high) * PIECE, entry.size))
            if len(data) != min((high - low) * PIECE, entry.size - at):
                raise SourceError(
                    f"{redact(entry.address)} has changed: bytes from {at} on end before the index says; "
                    "put the old one back, or pack the set again"
                )
            for i in range(low, high):
                parts[i] = data[(i - low) * PIECE : (i - low + 1) * PIECE]
            added |= self._store(file, first + low, data, base)
        try:
            _touch(file)
            if added:
                self._finish(file, entry, base)
        except SourceError:
            raise
        except OSError as error:
            self._fail(error)
        whole = b"".join(part for part in parts if part is not None)
        return whole[start - first * PIECE : end - first * PIECE]

    def _get(self, file: int, count: int, at: int) -> bytes | None:
        """Read what is in a shard's file; None where the disk does not give it."""
        try:
            return os.pread(file, count, at)
        except OSError as error:
            self._fail(error)
            return None

    def _open(self, entry: Entry) -> int | None:
        """Open a shard's file, made if needed; None where there is no room."""
        path = self.folder / entry.name
        try:
            for _ in range(2):
                try:
                    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    pass
                else:
                    if self._has_form(file, entry.size):
                        return file
                    log.warning(
                        "%s: %s is no file of this cache's form; making it anew", self.folder, path.name
                    )
                    path.unlink(missing_ok=True)
                if not self._make(path, entry.size):
                    return None
        except OSError as error:
            self._fail(error)
        return None

    def _has_form(self, file: int, size: int) -> bool:
        """Tell whether a file is of this cache's form; closes it where it is not."""
        has_form = False
        try:
            has_form = (
                os.pread(file, 16, 0) == _MAGIC + struct.pack("<Q", size)
                and os.fstat(file).st_size == _data_at(size) + size
            )
        finally:
            if not has_form:
                os.close(file)
        return has_form

    def _make(self, path: Path, size: int) -> bool:
        head = _data_at(size)
        if not self._reserve(head):
            return False
        beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(file, (_MAGIC + struct.pack("<QQ", size, 0)).ljust(head, b"\0"), 0)
                os.ftruncate(file, head + size)
            finally:
                os.close(file)
            with suppress(FileExistsError):  # another process was first
                os.link(beside, path)
        finally:
            with suppress(OSError):  # what fails to be written may fail to be removed
                beside.unlink(missing_ok=True)
        return True

    def _store(self, file: int, first: int, data: bytes, base: int) -> bool:
        if not self._reserve(len(data)):
            return False
        try:
            _write_all(file, data, base + first * PIECE)
            sums = b"".join(_sum(data[at : at + PIECE]) for at in range(0, len(data), PIECE))
            _write_all(file, sums, _HEAD + 8 * first)
        except OSError as error:
            self._fail(error)
            return False
        return True

    def _finish(self, file: int, entry: Entry, base: int) -> None:
        """Hold a shard that has all its pieces against its sha256, once."""
        pieces = -(-entry.size // PIECE)
        sums = os.pread(file, 8 * pieces, _HEAD)
        if any(sums[at : at + 8] == bytes(8) for at in range(0, len(sums), 8)):
            return
        fcntl.flock(file, fcntl.LOCK_EX)  # let go as the file is closed
        if any(os.pread(file, 8, _WHOLE_AT)):
            return
        if entry.sha256:
            digest = hashlib.sha256()
            for at in range(0, entry.size, 1 << 20):
                digest.update(os.pread(file, min(1 << 20, entry.size - at), base + at))
            if digest.hexdigest() != entry.sha256:
                with suppress(OSError):
                    (self.folder / entry.name).unlink()
                raise SourceError(
                    f"{redact(entry.address)} has changed or was damaged on its way: its sha256 is "
                    f"{digest.hexdigest()[:12]}…, the index says {entry.sha256[:12]}…; put the old one back, or pack "
                    "the set again"
                )
        os.pwrite(file, struct.pack("<Q", 1), _WHOLE_AT)

    def _reserve(self, count: int) -> bool:
        """Take room for `count` bytes, of others if need be; False where there is none."""
        try:
            with self._usage() as (used, write):
                if used + count > self.max_bytes:
                    used = self._evict(count)
                if used + count > self.max_bytes:
                    return False
                write(used + count)
        except OSError as error:
            self._fail(error)
            return False
        return True

    def _evict(self, count: int) -> int:
        """Remove the shards that were used least recently until `count` more bytes fit; returns what is used then."""
        found = sorted(self._files(), key=lambda at: at[0])
        used = sum(size for _, size, _ in found)
        for _, size, path in found:
            if used + count <= _KEEP * self.max_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (time of the last use in ns, bytes on the disk, path); remove what killed processes left."""
        with os.scandir(self.folder) as found:
            for at in found:
                with suppress(FileNotFoundError):
                    stat = at.stat()
                    if at.name.endswith(".tmp") and time.time() - stat.st_mtime > _STALE_S:
                        Path(at.path).unlink()
                    elif at.name.endswith(".shard"):
                        yield stat.st_mtime_ns, stat.st_blocks * 512, Path(at.path)

    @contextmanager
    def _usage(self) -> Iterator[tuple[int, Callable[[int], None]]]:
        """Hold the count of bytes: (bytes, how to write another number)."""
        file = os.open(self.folder / "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = os.pread(file, 8, 0)
            used = struct.unpack("<Q", held)[0] if len(held) == 8 else sum(at[1] for at in self._files())
            yield used, lambda now: _write_all(file, struct.pack("<Q", now), 0)
        finally:
            os.close(file)

    def _fail(self, error: OSError) -> None:
        """Say once that the folder fails: it is done without, and a full disk fails at every read."""
        if not self._told:
            log.warning(
                "%s: the cache fails (%s); what it does not give is read from the source", self.folder, error
            )
            self._told = True


class CachedSource:
    """A source behind a cache."""

    def __init__(self, inner: Source, cache: Cache, entries: Sequence[Entry]) -> None:
        self._inner = inner
        self._cache = cache
        self._entries = entries
        self.concurrency = inner.concurrency

    def read(self, shard: int, start: int, end: int) -> bytes:
        return self._cache.read(
            self._entries[shard], start, end, lambda low, high: self._inner.read(shard, low, high)
        )

    def close(self) -> None:
        self._inner.close()


def _data_at(size: int) -> int:
    return -(-(_HEAD + 8 * -(-size // PIECE)) // _PAGE) * _PAGE


def _sum(piece: bytes) -> bytes:
    return hashlib.sha256(piece).digest()[:8]


def _gaps(parts: Sequence[bytes | None]) -> Iterator[tuple[int, int]]:
    """Yield the runs [low, high) of what is missing."""
    low = None
    for i, part in enumerate([*parts, b""]):
        if part is None:
            low = i if low is None else low
        elif low is not None:
            yield low, i
            low = None


def _touch(file: int) -> None:
    """Note a use in the file's time; at most once a second."""
    if time.time() - os.fstat(file).st_mtime > _TOUCH_S:
        os.utime(file)


def _write_all(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done
