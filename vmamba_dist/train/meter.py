"""What a step reports: one small asynchronous all-reduce, read at the next step.

Law: metrics.jsonl has each step once, in order; its lines up to s are on disk before checkpoint s is published,
and a start cuts the file after the step that it loads.
"""

from __future__ import annotations

import json
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
from vmamba_dist.core.rundir import sync_directory
from vmamba_dist.parallel.engine import Update
from vmamba_dist.train.probe import Probe
from vmamba_dist.train.progress import Progress


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
            host[2 + 2 * size + rank] = (
                self._probe.read()
            )  # as the step before, it has ended: its loss was read
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


class MetricsLog:
    """metrics.jsonl: one JSON object a step."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Open for appending after step `after_step`, cutting later lines and a torn last one."""
        _cut(path, after_step)
        self._file = path.open("a", encoding="utf-8")
        sync_directory(path.parent)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Put every line on the disk (fsync)."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


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
