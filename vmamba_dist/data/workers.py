"""Reader processes beside a training process.

Law: a worker outlives every signal that was meant for its parent, and never the parent. Slurm and terminals
signal every process of a job, and the parent saves before it ends: so a worker ignores SIGINT, SIGTERM, SIGUSR1
and SIGUSR2. It is killed by close(), at the interpreter's end, and by the kernel when the parent is gone,
however it went. A worker that dies first is an error at the next item, never a hang.

Images go through anonymous shared memory, a ring of `prefetch` + 1 slots a worker, which no limit of /dev/shm
touches; the rest of an item is pickled through a pipe, and so is what a worker logs, for the parent to say.

Workers are forked, which takes milliseconds where a fresh interpreter imports for seconds, and that when their
first item is asked for: in a process that by then has threads, and mostly a process group and a CUDA context.
A fork has no thread but its own, and neither group nor context works in it. That is right here because a worker
touches none of them: it reads files and runs Pillow and single-threaded torch on the CPU, calls nothing of CUDA
or of the group, collects no garbage of its parent's (whose end might), takes no lock of its parent's log handlers,
and leaves without its parent's exit handlers, as every child of multiprocessing does.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import mmap
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from vmamba_dist.core.dist import end_with_parent

Order = TypeVar("Order")
Rest = TypeVar("Rest")

HELLO_S = 10.0  # a fork that lives says so within milliseconds
FORKS = 6
PATIENCE_S = 600  # a worker that yields nothing for so long has failed

log = logging.getLogger(__name__)

_HELLO = "ready"

Room = Callable[[], Tensor]  # waits for a free slot and returns its memory
Produce = Callable[[int, Order, Room], Iterator[tuple[int, Rest]]]


class WorkerError(RuntimeError):
    """A reader process died or hangs."""


class Workers(Generic[Order, Rest]):
    """Processes that each run produce(worker, order, room) once begin(order) is called.

    produce calls room() for each item, fills rows of it, (`shape[0]`, …) uint8, and yields (rows filled,
    picklable rest). Iteration takes one item from each worker in turn, until the first that has no more: (images,
    rest), the images valid until that worker's next item. An exception in a worker is raised here.
    """

    def __init__(
        self,
        produce: Produce[Order, Rest],
        count: int,
        prefetch: int,
        shape: Sequence[int],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._pid = os.getpid()
        self._patience_s = patience_s
        slots = prefetch + 1
        memory = mmap.mmap(-1, max(1, count * slots * math.prod(shape)))
        self._memory = torch.frombuffer(memory, dtype=torch.uint8).view(-1)
        self._memory = self._memory[: count * slots * math.prod(shape)].view(count, slots, *shape)
        self._taken = [0] * count  # items taken of each worker
        self._turn = 0
        self._ends: list[Connection] = []
        self._processes: list[ForkProcess] = []
        _open.add(self)
        for worker in range(count):
            self._fork(produce, worker)

    def _fork(self, produce: Produce[Order, Rest], worker: int) -> None:
        """Start one worker and hear from it; a child that stays silent is ended and forked anew.

        CPython 3.11 takes a lock in the child that another thread of the parent may have held at the fork
        (PyOS_AfterFork_Child, before it renews the lock): one fork in some hundreds then never returns.
        """
        context = multiprocessing.get_context("fork")
        for _ in range(FORKS):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run,
                args=(produce, worker, self._memory[worker], theirs, [*self._ends, ours], self._pid),
                name=f"reader-{worker}",
                daemon=True,
            )
            with warnings.catch_warnings():
                # Python ≥ 3.12 warns of any fork beside threads; above is why it is right here.
                warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
                process.start()
            theirs.close()  # before the next fork: a pipe that only its worker holds ends with it
            if _greeted(ours):
                self._ends.append(ours)
                self._processes.append(process)
                return
            log.warning(
                "%s (pid %s) did not begin in %g s: forking it anew", process.name, process.pid, HELLO_S
            )
            process.kill()
            process.join()
            ours.close()
        raise WorkerError(f"reader-{worker} did not begin in {FORKS} tries of {HELLO_S:g} s")

    def begin(self, order: Order) -> None:
        for end in self._ends:
            end.send(order)

    def __iter__(self) -> Iterator[tuple[Tensor, Rest]]:
        return self

    def __next__(self) -> tuple[Tensor, Rest]:
        if not self._ends:
            raise WorkerError("the workers are closed")
        worker, self._turn = self._turn, (self._turn + 1) % len(self._ends)
        item = self._receive(worker)
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        rows, rest = item
        slot = self._taken[worker] % self._memory.shape[1]
        self._taken[worker] += 1
        return self._memory[worker, slot, :rows], rest

    def _receive(self, worker: int) -> tuple[int, Rest] | BaseException | None:
        end, process = self._ends[worker], self._processes[worker]
        cause: Exception | None = None
        try:
            if self._taken[worker]:
                end.send(True)  # the slot of the item before is free
            while True:
                # Any of them: one may die while another, whose turn it is, waits for its source.
                ready = wait([end, *(each.sentinel for each in self._processes)], timeout=self._patience_s)
                if not ready:
                    name = f"{process.name} (pid {process.pid})"
                    raise WorkerError(f"{name} has yielded nothing for {self._patience_s:g} s")
                if end not in ready and not end.poll():
                    process = next(each for each in self._processes if each.sentinel in ready)
                    break
                item = end.recv()
                if not isinstance(item, logging.LogRecord):
                    return item  # type: ignore[no-any-return]
                logging.getLogger(item.name).handle(item)
        except (EOFError, ConnectionError) as error:
            cause = error  # its end of the pipe closed as it died
        process.join(5)  # its pipes close a little before it can be waited for
        code = process.exitcode
        killed = code is not None and code < 0
        how = f"was killed by signal {-code}" if killed and code else f"ended with exit code {code}"
        message = f"{process.name} (pid {process.pid}) {how}; its own message, if any, is on stderr"
        raise WorkerError(message) from cause

    def kill(self) -> None:
        """End the workers, who only read; whoever waits for an item in another thread gets a WorkerError."""
        if os.getpid() != self._pid:
            return  # a fork of the owner
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Kill the workers and forget them; no other thread waits for an item."""
        if os.getpid() != self._pid:
            return
        self.kill()
        for process in self._processes:
            process.join()
            process.close()
        for end in self._ends:
            end.close()
        self._processes, self._ends = [], []


def _greeted(end: Connection) -> bool:
    try:
        return end.poll(HELLO_S) and end.recv() == _HELLO
    except (EOFError, ConnectionError):
        return False


class _ToParent(QueueHandler):
    """Sends a worker's log records to its parent: a fork may find its console locked for ever."""

    def __init__(self, end: Connection) -> None:
        logging.Handler.__init__(self)
        self._end = end

    def enqueue(self, record: logging.LogRecord) -> None:
        self._end.send(record)


def _run(
    produce: Produce[Order, Rest],
    worker: int,
    memory: Tensor,
    end: Connection,
    others: list[Connection],
    parent: int,
) -> None:
    """Be a worker: wait for the order, then produce until the parent has gone."""
    gc.freeze()  # what the parent left to collect may own CUDA memory or a process group
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    end_with_parent()
    if os.getppid() != parent:  # it went before we could ask to go with it
        return
    for other in others:
        other.close()
    logger = logging.getLogger(__package__.partition(".")[0])
    logger.handlers, logger.propagate = [_ToParent(end)], False
    torch.set_num_threads(1)
    end.send(_HELLO)
    made = 0

    def room() -> Tensor:
        nonlocal made
        slot = made % len(memory)
        if made >= len(memory):
            end.recv()
        made += 1
        return memory[slot]

    try:
        order = end.recv()
        try:
            for item in produce(worker, order, room):
                end.send(item)
            end.send(None)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001  it is raised in the parent
            error.add_note(f"in {multiprocessing.current_process().name}")
            end.send(error)
        while True:  # an end of ours that closes with unread tokens would take our last item along
            end.recv()
    except (EOFError, ConnectionError):
        return  # the parent has closed its ends


_open: WeakSet[Workers[Any, Any]] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Kill what was not closed, before multiprocessing would join it for ever."""
    for workers in list(_open):
        workers.close()
