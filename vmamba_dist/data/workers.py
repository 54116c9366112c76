"""Reader processes beside a training process.

Law: a worker outlives every signal that was meant for its parent, and never the parent. Slurm and terminals
signal every process of a job: the parent saves and then ends its workers, which until then ignore SIGINT,
SIGUSR1, SIGUSR2 and SIGTERM (a worker that died first would turn the save into an error). When the parent is
gone, however it went, the kernel kills its workers.

Workers are forked: that takes milliseconds where a fresh interpreter imports for seconds, and they run only
Pillow and single-threaded torch on the CPU. Start them before the process group and CUDA where possible.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from ctypes import c_bool
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vmamba_dist.core.dist import end_with_parent

T = TypeVar("T")

PATIENCE_S = 600  # a worker that yields nothing for so long has failed


class Workers(Generic[T]):
    """Processes that each run produce(worker); iteration takes one item from each in turn.

    A worker that raises, raises here; one that dies is a RuntimeError within 5 s. To be made and used in the
    main thread, and closed.
    """

    def __init__(self, produce: Callable[[int], Iterator[T]], count: int, prefetch: int) -> None:
        closing = multiprocessing.RawValue(c_bool, False)
        with warnings.catch_warnings():
            # Python ≥ 3.12 warns of any fork beside threads; the module's docstring says why it is right here.
            warnings.filterwarnings(
                "ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning
            )
            # How many workers there are is the user's choice, and cores are shared by ranks.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            loader = DataLoader(
                _Produced(produce),
                batch_size=None,
                num_workers=count,
                prefetch_factor=prefetch,
                collate_fn=_as_it_is,
                worker_init_fn=_Settle(os.getpid(), closing),
                multiprocessing_context="fork",
                timeout=PATIENCE_S,
                generator=torch.Generator(),  # else each start would draw from the caller's random state
            )
            self._items: Iterator[T] | None = iter(loader)
        # Also at the interpreter's end, before multiprocessing ends and joins what is left.
        self._allow_end = weakref.finalize(self, _set, closing)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._items is None:
            raise RuntimeError("the workers are closed")
        return next(self._items)

    def close(self) -> None:
        """End the workers; waits for the sample they are at, 5 s at most."""
        self._allow_end()
        self._items = None  # the loader's iterator joins them as it goes


class _Produced(IterableDataset[Any]):
    def __init__(self, produce: Callable[[int], Iterator[Any]]) -> None:
        self._produce = produce

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        return self._produce(info.id)


class _Settle:
    """What a worker does first."""

    def __init__(self, parent: int, closing: Any) -> None:
        self._parent = parent
        self._closing = closing

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, self._end_when_closing)
        for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(ignored, signal.SIG_IGN)
        end_with_parent()
        if os.getppid() != self._parent:  # it went before we could ask to go with it
            os._exit(1)
        torch.set_num_threads(1)

    def _end_when_closing(self, number: int, frame: object) -> None:
        if self._closing.value:
            os._exit(0)


def _as_it_is(item: T) -> T:
    return item


def _set(flag: Any) -> None:
    flag.value = True
