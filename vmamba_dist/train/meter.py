"""What a step reports: one small asynchronous all-reduce, read at the next step.

Law: metrics.jsonl has each step once, in order; its lines up to s are on disk before checkpoint s is published,
and a start cuts the file after the step that it loads. A disk without room delays lines and loses none.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vmamba_dist.core.dist import World
from vmamba_dist.core.gpus import peak_tflops_of
from vmamba_dist.core.lines import WaitingLines
from vmamba_dist.core.rundir import sync_directory
from vmamba_dist.parallel.engine import Update
from vmamba_dist.train.probe import Probe
from vmamba_dist.train.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """One step as all ranks saw it. `loss` is the mean over the global batch."""

    step: int
    data_step: int  # which of the data order it learned from
    epoch: int
    seen: int  # samples of the epoch, this step's included
    samples: int
    lr: float
    loss: float
    grad_norm: float
    applied: bool
    stop: bool  # some rank was asked to stop
    bad: int  # samples replaced in this step, over all ranks
    data_wait: float  # share of the step's time that the mean rank waited for samples
    step_time: float  # seconds between two records on this rank; ranks meet in every step
    samples_per_s: float
    waits: tuple[float, ...]  # seconds that each rank waited for samples
    own: tuple[float, ...]  # seconds that each rank worked on its own in the step before; 0 where unknown
    product: tuple[float, ...]  # seconds that each rank took for the probe's product; 0 where none was timed


@dataclass
class _Pending:
    step: int
    data_step: int
    epoch: int
    seen: int
    samples: int
    batch: int
    lr: float
    update: Update
    sums: Tensor
    work: dist.Work | None
    step_time: float


class Meter:
    """Collects a step's numbers and gives back the ones of the step before."""

    def __init__(self, world: World, progress: Progress, probe: Probe | None) -> None:
        self._world = world
        self._progress = progress
        self._probe = probe
        self._pending: _Pending | None = None
        self._last = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave out what happened since the last record (an evaluation, a save) from the next step's time."""
        self._last = time.perf_counter()

    def record(
        self,
        *,
        step: int,
        data_step: int,
        epoch: int,
        seen: int,
        samples: int,
        batch: int,
        lr: float,
        losses: list[Tensor],
        update: Update,
        waited: float,
        bad: int,
        stop: bool,
    ) -> Report | None:
        """Start reducing this step's numbers; return the step before, if one is unread. A collective."""
        now = time.perf_counter()
        step_time, self._last = now - self._last, now
        before = self.drain()
        rank, size, device = self._world.rank, self._world.size, self._world.device
        loss = torch.stack(losses).double().mean()
        host = torch.zeros(
            2 + 3 * size, dtype=torch.float64
        )  # a sum in which each rank has places of its own
        host[0], host[1] = bad, stop
        host[2 + rank], host[2 + size + rank] = waited, self._progress.own_time()
        if self._probe is not None:
            # As the step before, it has ended: its loss was read.
            host[2 + 2 * size + rank] = self._probe.read()
            self._probe.run(step)
        sums = torch.cat([loss.reshape(1), host.to(device, non_blocking=True)])
        work = dist.all_reduce(sums, async_op=True) if dist.is_initialized() else None
        self._pending = _Pending(
            step, data_step, epoch, seen, samples, batch, lr, update, sums, work, step_time
        )
        return before

    def drain(self) -> Report | None:
        """Read the pending step (syncs host and device), or None."""
        p, self._pending = self._pending, None
        if p is None:
            return None
        self._progress.at("report", p.step)
        if p.work is not None:
            p.work.wait()
        size = self._world.size
        loss, bad, stop, *times = p.sums.tolist()
        waits, own, product = (tuple(times[i * size : (i + 1) * size]) for i in range(3))
        return Report(
            step=p.step,
            data_step=p.data_step,
            epoch=p.epoch,
            seen=p.seen,
            samples=p.samples,
            lr=p.lr,
            loss=loss / size,
            grad_norm=float(p.update.grad_norm),
            applied=bool(p.update.applied),
            stop=stop > 0,
            bad=int(bad),
            data_wait=sum(waits) / size / p.step_time,
            step_time=p.step_time,
            samples_per_s=p.batch / p.step_time,
            waits=waits,
            own=own,
            product=product,
        )


def peak_tflops(device: torch.device, configured: float, compute: torch.dtype) -> float | None:
    """Peak of one device for MFU: the configured one, or the table's for bfloat16; None where unknown."""
    if configured > 0:
        return configured
    if device.type != "cuda" or compute != torch.bfloat16:
        return None
    return peak_tflops_of(torch.cuda.get_device_name(device))


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the allocator's on a GPU, the resident set's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsLog(WaitingLines):
    """metrics.jsonl: one JSON object a step. Lines wait in memory while they cannot be written."""

    MOST_BYTES = 2**24  # that wait; about 40,000 steps

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Open for appending after step `after_step`, cutting later lines and a torn last one."""
        _cut(path, after_step)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        sync_directory(path.parent)
        self._synced = os.fstat(self._file).st_size  # bytes that are on the disk, and after them:
        self._lines = bytearray()  # what followed since, of which
        self._written = 0  # so many bytes have been written, perhaps a part of a line
        self._failing = False

    @property
    def num_waiting(self) -> int:
        return self._lines.count(b"\n", self._written)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; where there is no room it is written with a later one. Raises OSError past MOST_BYTES."""
        self._lines += json.dumps(line).encode() + b"\n"
        try:
            self._write()
            if len(self._lines) > self.MOST_BYTES:
                self.sync()
        except OSError as error:
            if len(self._lines) > self.MOST_BYTES:
                raise
            if not self._failing:
                log.warning(
                    "%s cannot be written: %s; its lines wait in memory until there is room",
                    self._path,
                    error,
                )
            self._failing = True

    def sync(self) -> None:
        """Put every line on the disk (fsync). Raises OSError naming the file; the lines are kept."""
        try:
            self._write()
            os.fsync(self._file)
        except OSError as error:
            # The system may drop what it could not sync, and the next fsync would be silent.
            self._written = 0
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._synced += len(self._lines)
        self._lines.clear()
        self._written = 0

    def close(self) -> None:
        """Put every line on the disk, and let go of the file also where that fails."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _write(self) -> None:
        while self._written < len(self._lines):
            with memoryview(self._lines)[self._written :] as rest:
                self._written += os.pwrite(self._file, rest, self._synced + self._written)
        if self._failing:
            self._failing = False
            log.warning("%s is written again, and nothing of it is missing", self._path)


def _cut(path: Path, after_step: int) -> None:
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                step = json.loads(raw)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if step > after_step:
                break
            keep += len(raw)
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())
