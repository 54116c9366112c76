"""Micro-batches brought to the device ahead of the step that learns from them.

Law: a batch is what it would be without, and so is their order; an error is raised where its batch would have been
taken. How far the thread has read is nobody's state.

Putting a micro-batch together from its readers' shares takes the host milliseconds of copying, during which Python's
lock is free. A thread does that, and starts the copy to the device, or the decoding there, on a CUDA stream of its own:
neither the loop nor the training stream waits for the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, Full, Queue

import torch

from vmamba_dist.config.schema import DataConfig
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.ondevice import DeviceDecoder
from vmamba_dist.data.pixels import Interpolation
from vmamba_dist.data.stream import TrainStream

THREAD = "feed-ahead"
_POLL_S = 0.2


def ahead_on_device(
    stream: TrainStream,
    batches: Iterator[Batch],
    data: DataConfig,
    interpolation: Interpolation,
    device: torch.device,
) -> Ahead:
    """The stream's `batches` with their images on the device: decoded there with data.decoder=gpu, else copied."""
    work: Callable[[Batch], Batch] = partial(upload, device=device)
    if data.decoder == "gpu":
        work = DeviceDecoder(data.image_size, interpolation, device, stream.read_on_host)
    return Ahead(batches, work, device, interrupt=stream.interrupt)


def upload(batch: Batch, device: torch.device) -> Batch:
    """A micro-batch with its images on the device; labels and positions, which the host looks at too, stay.

    From pinned memory this waits for nothing: torch notes the stream of the copy, and gives the memory to another
    batch only once that stream has passed it.
    """
    return replace(batch, images=batch.images.to(device, non_blocking=True), on_host=batch.images)


class Ahead:
    """An iterator whose items are made by `work` from those of `batches`, `depth` of them ahead, in a thread.

    On a CUDA device the work has a stream of its own; the consumer's current stream waits for it, the host does not.
    An exception of the thread is raised here. close() ends the thread; it waits for the work under way, and
    `interrupt` ends the wait for a next item of `batches`.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        work: Callable[[Batch], Batch],
        device: torch.device,
        depth: int = 2,
        *,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._batches, self._work, self._device, self._interrupt = batches, work, device, interrupt
        self._ready: Queue[tuple[Batch, torch.cuda.Event | None] | BaseException] = Queue(depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._take()
        if isinstance(item, BaseException):
            self._closing.set()
            raise item
        batch, done = item
        if done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(done)
            batch.images.record_stream(stream)
        return batch

    def close(self) -> None:
        self._closing.set()
        self._interrupt()
        self._thread.join()

    def _take(self) -> tuple[Batch, torch.cuda.Event | None] | BaseException:
        while True:
            try:
                return self._ready.get(timeout=_POLL_S)
            except Empty:
                if self._closing.is_set():
                    raise RuntimeError("the batches read ahead are closed") from None

    def _run(self) -> None:
        try:
            stream = self._own_stream()
            for batch in self._batches:
                if self._closing.is_set():
                    return
                made = self._work(batch)
                self._put((made, stream.record_event() if stream is not None else None))
            self._put(StopIteration())
        except BaseException as error:  # noqa: BLE001  it is raised where the batches are taken
            self._put(error)

    def _own_stream(self) -> torch.cuda.Stream | None:
        """Set this thread to a stream of its own, and so to its device: a thread begins at the first GPU.

        For good: torch's context manager would go back there at the end, to memory that is another rank's.
        """
        if self._device.type != "cuda":
            return None
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(stream)
        return stream

    def _put(self, item: tuple[Batch, torch.cuda.Event | None] | BaseException) -> None:
        while not self._closing.is_set():
            with suppress(Full):
                self._ready.put(item, timeout=_POLL_S)
                return
