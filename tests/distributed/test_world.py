"""The pool of workers: what every multi-process test relies on."""

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from distributed.world import WorldError, world
from vmamba_dist.core import dist as core

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Place:
    rank: int
    size: int
    pid: int
    total: float
    threads: int


class Unlucky(RuntimeError):
    pass


def look(bias: float) -> Place:
    with core.world("cpu") as place:
        (total,) = core.sum_over_ranks([place.rank + bias])
        return Place(place.rank, place.size, os.getpid(), total, torch.get_num_threads())


def fail_on(rank: int) -> None:
    if core.rank_and_size()[0] == rank:
        raise Unlucky(f"rank {rank}")
    dist.barrier()


def die_on(rank: int) -> None:
    if core.rank_and_size()[0] == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def sleep() -> None:
    time.sleep(30)


@pytest.mark.parametrize("size", [2, 3, 4, 1])
def test_ranks_see_a_launchers_world(size: int) -> None:
    places = world(size).run(look, 0.5)
    assert [(p.rank, p.size) for p in places] == [(rank, size) for rank in range(size)]
    assert {p.total for p in places} == {sum(range(size)) + 0.5 * size}
    assert {p.threads for p in places} == {1}


def test_workers_are_kept_between_calls() -> None:
    first, second = world(2).run(look, 0.0), world(2).run(look, 0.0)
    assert [p.pid for p in first] == [p.pid for p in second]


def test_the_first_exception_is_raised_with_its_traceback() -> None:
    with pytest.raises(Unlucky, match="rank 1") as caught:
        world(2).run(fail_on, 1)
    assert "in fail_on" in "".join(caught.value.__notes__)
    assert world(2).run(look, 0.0)[1].rank == 1


def test_a_dead_or_hung_rank_fails_the_call_and_the_next_one_works() -> None:
    with pytest.raises(WorldError, match="rank 1 of 2 died with exit code -9"):
        world(2).run(die_on, 1)
    with pytest.raises(WorldError, match=r"ran past 0\.5 s"):
        world(1).run(sleep, timeout_s=0.5)
    assert world(2).run(look, 0.0)[0].size == 2
