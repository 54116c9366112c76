"""Worlds of 1 to 4 live gloo processes, started once and used by every test.

Law: a call runs one module-level function on all ranks of a fresh process group, as a launcher would have
started them (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), and returns every rank's result in rank
order. Whatever goes wrong is an error of that call alone: a hung or dead worker is killed, and the next
call starts a new one. Workers die with the process that uses them.

    def total(start):                       # at module level: the workers import it by name
        ...
    assert world(3).run(total, 5) == [18, 18, 18]

Starting a worker means importing torch, 2 to 4 s each on a core; a call with its new group takes 40 ms at
two ranks and 60 ms at four. So the processes are kept and the groups are not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0  # a worker imports torch; six processes may share two cores
GRACE_S = 10.0  # for the other ranks once one has failed


class WorldError(AssertionError):
    """A call that did not come back: a rank died or ran past its time."""


@dataclass(frozen=True)
class World:
    """Some ranks of the pool."""

    size: int

    def run(self, function: Callable[..., T], *args: Any, timeout_s: float = 60.0) -> list[T]:
        """Return [function(*args) on rank 0, on rank 1, …]; arguments and results are pickled.

        Raises the exception of the rank that failed first, with its traceback as a note, or WorldError.
        """
        return _pool.run(self.size, function, args, timeout_s)


def world(size: int) -> World:
    """Return a world of `size` processes; they start when first used."""
    return World(size)


def close() -> None:
    """End all workers."""
    _pool.kill(_pool.workers)


class _Worker:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from distributed.world import serve; serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.ready = False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class _Pool:
    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def run(self, size: int, function: Callable[..., T], args: tuple[Any, ...], timeout_s: float) -> list[T]:
        module = sys.modules[function.__module__]
        body = pickle.dumps(args)
        while len(self.workers) < size:
            self.workers.append(_Worker())
        workers = self.workers[:size]
        try:
            self._await_start(workers)
            with tempfile.TemporaryDirectory(prefix="world-") as folder:
                call = (
                    size,
                    f"file://{folder}/store",
                    module.__name__,
                    module.__file__,
                    function.__qualname__,
                )
                for rank, worker in enumerate(workers):
                    worker.connection.send((rank, *call, body, timeout_s))
                return self._collect(workers, timeout_s)
        except _Failed as failed:
            raise failed.first.rebuilt() from None
        except BaseException:
            self.kill(workers)  # a rank may hang in a collective, or still be at work
            raise

    def _await_start(self, workers: list[_Worker]) -> None:
        deadline = time.monotonic() + START_S
        for worker in workers:
            if not worker.ready:
                if not worker.connection.poll(max(0.0, deadline - time.monotonic())):
                    raise WorldError(f"a worker has not started within {START_S:g} s")
                worker.connection.recv()
                worker.ready = True

    def _collect(self, workers: list[_Worker], timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[_Failure] = []
        deadline = time.monotonic() + timeout_s
        pending = {worker.connection: rank for rank, worker in enumerate(workers)}
        while pending:
            answered = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not answered:
                self.kill(workers)
                if failures:
                    break
                raise WorldError(
                    f"ranks {sorted(pending.values())} of {len(workers)} ran past {timeout_s:g} s"
                )
            for connection in [c for c in pending if c in answered]:
                rank = pending.pop(connection)
                try:
                    value, failure = connection.recv()
                except (EOFError, ConnectionError):
                    code = workers[rank].process.wait()
                    raise WorldError(f"rank {rank} of {len(workers)} died with exit code {code}") from None
                if failure is None:
                    results[rank] = pickle.loads(value)
                else:
                    failures.append(failure)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise _Failed(min(failures, key=lambda failure: failure.at))
        return [results[rank] for rank in range(len(workers))]

    def kill(self, workers: list[_Worker]) -> None:
        self.workers = [worker for worker in self.workers if worker not in workers]
        for worker in workers:
            worker.kill()


@dataclass(frozen=True)
class _Failure:
    at: float  # monotonic, one clock for all processes: the first is the cause of the others
    rank: int
    body: bytes | None  # the pickled exception
    text: str  # its traceback

    def rebuilt(self) -> BaseException:
        plain = RuntimeError(self.text.strip().splitlines()[-1])
        error: BaseException = plain if self.body is None else pickle.loads(self.body)
        error.add_note(f"on rank {self.rank}:\n{self.text}")
        return error


class _Failed(Exception):
    """A function raised on some rank; the workers themselves are well, or have been killed."""

    def __init__(self, first: _Failure) -> None:
        super().__init__(first.text)
        self.first = first


_pool = _Pool()


def serve(descriptor: int) -> None:
    """Answer calls until the other end closes."""
    from vmamba_dist.core.dist import end_with_parent

    end_with_parent()
    import torch

    torch.set_num_threads(1)
    connection = Connection(descriptor)
    connection.send("ready")
    while True:
        try:
            rank, size, store, name, file, qualname, body, timeout_s = connection.recv()
        except EOFError:
            return
        connection.send(_answer(rank, size, store, name, file, qualname, body, timeout_s))


def _answer(
    rank: int, size: int, store: str, name: str, file: str, qualname: str, body: bytes, timeout_s: float
) -> tuple[bytes | None, _Failure | None]:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    try:
        if size > 1:  # a single process joins no group
            dist.init_process_group(
                "gloo", store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
            )
            # Without it a rank may fail and leave while another still connects, which then hangs.
            dist.barrier()
        function: Any = _module(name, file)
        for part in qualname.split("."):
            function = getattr(function, part)
        return pickle.dumps(function(*pickle.loads(body))), None
    except BaseException as error:  # noqa: BLE001  whatever it is, the test has to see it
        # Timed before the group goes, which makes the other ranks fail too.
        return None, _Failure(time.monotonic(), rank, _portable(error), traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _portable(error: BaseException) -> bytes | None:
    """The pickled exception, or None for one that cannot make the way there and back."""
    try:
        body = pickle.dumps(error)
        pickle.loads(body)
    except Exception:  # noqa: BLE001  a foreign class's own __reduce__ may raise anything
        return None
    return body


def _module(name: str, file: str) -> ModuleType:
    """The test's module under the name that pytest gave it, so that its classes pickle both ways."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
