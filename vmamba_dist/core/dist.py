"""Who this process is among the others, and how they agree.

Law: this is the only file that reads RANK and WORLD_SIZE. Every collective is reached by all ranks:
decide with `agree`, then branch.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from vmamba_dist.config.schema import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place: rank of size, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank_and_size() -> tuple[int, int]:
    """(rank, world size) as the launcher gave them; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux, prctl).

    A rank whose launcher was killed would otherwise hold the run's lock for ever. Only for ranks that a
    launcher started: a plain `nohup vmamba train &` must outlive its shell.
    """
    parent = os.getppid()
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


def pick_device(choice: str, local_rank: int) -> torch.device:
    """The device for `precision.device` = auto | cpu | cuda."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "precision.device=cuda, but torch sees no CUDA device; use precision.device=cpu or auto"
        )
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: torch sees {count}; start at most {count} processes here"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def world(device: str = "auto", timeout_s: float = 600.0, *, alone_too: bool = False) -> Iterator[World]:
    """Join the processes that the launcher started, and leave them at the end.

    A single process joins nothing: no process group exists, and the helpers below are the identity. `alone_too`:
    it makes a group of its own, which engines that shard do not work without.
    """
    rank, size = rank_and_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = World(rank, size, local_rank, pick_device(device, local_rank))
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if (size == 1 and not alone_too) or dist.is_initialized():
        yield place
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == size or size == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: nothing needs to leave it
    backend = "cpu:gloo,cuda:nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=os.environ.get("VMAMBA_RENDEZVOUS", "env://") if size > 1 else None,
        store=dist.HashStore() if size == 1 else None,  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=place.device if place.device.type == "cuda" else None,
    )
    try:
        agree(True)  # a rank that fails before all have met would leave the others waiting for it
        yield place
    finally:
        dist.destroy_process_group()


def new_group(timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for a thread that talks while the main one trains; None in a single process.

    Two threads in one group would take each other's messages. A collective.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def is_of_a_collective(error: Exception) -> bool:
    """True for what c10d raises; gloo's errors are plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def agree(ok: bool) -> bool:
    """True where every rank says True. A collective over CPU tensors (syncs)."""
    if not dist.is_initialized():
        return ok
    flag = torch.tensor([int(ok)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order, on every rank. A collective (pickles; syncs)."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_main(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order, on rank 0; nothing on the others. A collective (pickles; syncs)."""
    if not dist.is_initialized():
        return [value]
    is_main = dist.get_rank() == 0
    values: list[T] = [value] * dist.get_world_size() if is_main else []
    dist.gather_object(value, values if is_main else None, dst=0, group=group)
    return values


def from_main(value: T) -> T:
    """Rank 0's value on every rank. A collective (pickles; syncs)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; its value, or its exception, reaches every rank. A collective (syncs)."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    if rank_and_size()[0] == 0:
        try:
            outcome = (action(), None)
        except Exception as error:  # noqa: BLE001 - it is raised again below, on all ranks
            outcome = (None, error)
    value, failure = from_main(outcome)
    if failure is not None:
        raise failure
    return cast("T", value)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise float64 sum over ranks. A collective (syncs)."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(total)
    return [float(v) for v in total]
