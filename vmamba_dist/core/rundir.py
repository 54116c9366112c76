"""The run directory: where things lie, who owns it, and how often it has been started.

Law: one living process writes a run. It holds `flock` on `lock` for its whole life, whatever else happens
to it, and a forked child never keeps that lock alive. Each start has a number, `attempt`, one above every
earlier one; whoever publishes asks first whether a later attempt has begun.

The counter lives in `attempts.jsonl`, a line a start, appended and fsynced before the owner is named in
`lock`. A line torn by a kill is no line, so a crash at any byte leaves the earlier numbers readable, and
the counter survives a `lock` that somebody deleted. `lock` itself is never renamed or truncated, since a
lock on a replaced file protects nothing: its one JSON object is overwritten in a single padded write.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vmamba_dist.config.schema import UserError

_log = logging.getLogger(__name__)

LOCK_BYTES = 1024  # `lock` always has this size, so that one write replaces all of it
POLL_S = 0.1

_held: set[int] = set()  # descriptors of locks that this process owns


def _let_go_in_child() -> None:
    # flock belongs to the open file, which fork shares: a DataLoader worker that outlives its trainer would
    # keep the run locked. Closing (never LOCK_UN, which would unlock the parent too) leaves it to the parent.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


class RunBusy(UserError, RuntimeError):
    """Another living process owns the run directory."""


class Superseded(UserError, RuntimeError):
    """A later attempt has started on the run directory: this one may publish nothing more."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    attempt: int
    host: str
    pid: int
    job: str  # Slurm's or submitit's id, "" without one
    started: str  # UTC, ISO 8601

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"attempt {self.attempt} (host {self.host}, pid {self.pid}{job}, since {self.started})"


@dataclass
class RunDir:
    """Layout of a run directory, and this process's claim on it."""

    path: Path
    attempt: int
    _lock: int | None = None  # descriptor; only the owner has one

    @classmethod
    def acquire(cls, path: str | Path, *, wait_s: float = 20.0) -> RunDir:
        """Own the run directory, made if needed, as its next attempt. Rank 0 only.

        Waits up to wait_s seconds for a living owner: the ranks of a killed launcher take a moment to end.
        Raises RunBusy naming that owner.
        """
        root = Path(path).absolute()
        root.mkdir(parents=True, exist_ok=True)
        descriptor = _lock_file(root / "lock", wait_s)
        try:
            run = cls(root, 0, descriptor)
            run.checkpoints.mkdir(exist_ok=True)
            run.attempt = _begin_attempt(root, descriptor)  # puts the names in the root on the disk
        except BaseException:
            _close(descriptor)
            raise
        return run

    @classmethod
    def attach(cls, path: str | Path, attempt: int) -> RunDir:
        """Join a run directory that rank 0 owns as `attempt`; takes no lock and makes nothing."""
        return cls(Path(path).absolute(), attempt)

    def check_attempt(self) -> None:
        """Raise Superseded if a later attempt has started, or this one's record is gone. Reads a file."""
        last = last_attempt(self.path)
        if last is None or last.attempt < self.attempt:
            raise Superseded(
                f"attempt {self.attempt} of {self.path} is no longer in its {self.attempts.name}: "
                "the run directory was removed or replaced while the run went on"
            )
        if last.attempt > self.attempt:
            raise Superseded(f"attempt {self.attempt} of {self.path} ends here: {last} has taken over")

    def release(self) -> None:
        """Give up the lock; nothing happens where none is held."""
        if self._lock is not None:
            _close(self._lock)
            self._lock = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad(self) -> Path:
        return self.path / "bad.jsonl"

    @property
    def rollbacks(self) -> Path:
        return self.path / "rollbacks.jsonl"

    @property
    def alive(self) -> Path:
        return self.path / "alive"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"


def attempts(path: str | Path) -> list[Attempt]:
    """Return every recorded start of the run directory, oldest first; torn lines are left out."""
    try:
        text = (Path(path) / "attempts.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [found for line in text.splitlines() if (found := _parse(line)) is not None]


def last_attempt(path: str | Path) -> Attempt | None:
    """Return the start with the highest number, or None before the first."""
    return max(attempts(path), key=lambda a: a.attempt, default=None)


def job_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return the id of the Slurm or local submitit job that this process belongs to, or "".

    An array's element is ARRAY_INDEX: the last element's own number is that of the array, and would cancel them all.
    """
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and index:
        return f"{array}_{index}"
    return environ.get("SLURM_JOB_ID") or environ.get("SUBMITIT_LOCAL_JOB_ID") or ""


def sync_directory(path: Path) -> None:
    """fsync a directory: names made, renamed or removed in it are then on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(line: bytes) -> Attempt | None:
    try:
        fields = json.loads(line)
        return Attempt(
            int(fields["attempt"]),
            str(fields["host"]),
            int(fields["pid"]),
            str(fields["job"]),
            str(fields["started"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _lock_file(path: Path, wait_s: float) -> int:
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _held.add(descriptor)  # before the lock is taken: a fork in between must not share it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(path, descriptor):
                return descriptor
            problem = f"{path} was replaced while it was being locked"
        except BlockingIOError:
            owner = _parse(os.pread(descriptor, LOCK_BYTES, 0))
            problem = f"{path.parent} is in use by {owner or 'a process that has not named itself yet'}"
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)
        if time.monotonic() >= deadline:
            raise RunBusy(f"{problem}; stop it first, or give this run another run.dir (waited {wait_s:g} s)")
        if not told:
            _log.warning("%s; waiting up to %g s for it to end", problem, wait_s)
            told = True
        time.sleep(POLL_S)


def _names(path: Path, descriptor: int) -> bool:
    """True where `path` is still the file behind the descriptor."""
    try:
        at_path, opened = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)


def _begin_attempt(root: Path, lock: int) -> int:
    earlier = last_attempt(root)
    in_lock = _parse(os.pread(lock, LOCK_BYTES, 0))
    number = 1 + max(a.attempt if a else 0 for a in (earlier, in_lock))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = Attempt(number, socket.gethostname(), os.getpid(), job_id(), now)
    line = json.dumps(record.__dict__).encode()
    with (root / "attempts.jsonl").open("ab") as log:
        # The newline in front ends a line that a kill tore.
        log.write((b"\n" if log.tell() else b"") + line + b"\n")
        log.flush()
        os.fsync(log.fileno())
    os.pwrite(lock, line.ljust(LOCK_BYTES - 1) + b"\n", 0)
    os.fsync(lock)
    sync_directory(root)
    return number


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)
