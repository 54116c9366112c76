"""The training loop's samples, and evaluation's.

Law: the state is (epoch, samples of it consumed, skipped step ranges), and it counts samples consumed, not
samples read ahead. Batches are bit-equal for every number of workers, 0 included, and a world's batches together
are the same positions with the same pixels whatever its size.

Each worker yields uint8 sub-batches, its share of one micro-batch; the consumer takes one from each and puts
them into position order.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba_dist.config.schema import AugmentConfig, ConfigError, DataConfig, EvalConfig
from vmamba_dist.data import order
from vmamba_dist.data.augment import EvalTransform
from vmamba_dist.data.batch import BadSample, Batch
from vmamba_dist.data.decode import decode
from vmamba_dist.data.index import Index
from vmamba_dist.data.mixture import Mixture
from vmamba_dist.data.prepare import Decoder, TrainPreparation
from vmamba_dist.data.reader import LaneReader, Rows, read_in_file_order
from vmamba_dist.data.sources import Source
from vmamba_dist.data.workers import Room, Workers

log = logging.getLogger(__name__)

_MIB = 1 << 20
_From = tuple[int, int, tuple[tuple[int, int], ...]]  # epoch, step of it, skipped ranges


class TrainStream:
    """One rank's micro-batches, for ever.

    `lanes` is order.choose_lanes' answer, chosen once a run and recorded. `known_bad` are the lines of
    bad.jsonl: their choices are used again. Raises ConfigError where the set, the batch and the world do not fit.
    """

    def __init__(
        self,
        index: Index | Mixture,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lanes: int,
        accumulate: int = 1,
        known_bad: Iterable[BadSample] = (),
        pin_memory: bool = False,
    ) -> None:
        order.check_batch(index.num_samples, data.global_batch, world, accumulate)
        index.check_lanes(lanes)
        self.index = index
        self.lanes = lanes
        self.share = order.Share(data.global_batch, rank, world, accumulate)
        self.steps_per_epoch = index.num_samples // data.global_batch
        self.remainder = (
            index.num_samples % data.global_batch
        )  # samples at an epoch's end that none learns from
        self._data = data
        self._pin = pin_memory  # torch keeps pinned memory for the next batch by itself
        self._memory = _Recycled((self.share.micro_batch, data.image_size, data.image_size, 3))
        self._new_reader = partial(
            self._make_reader, augment, seed=seed, lanes=lanes, known_bad=tuple(known_bad)
        )
        self._reader = self._new_reader(data.decoder)
        self._again: LaneReader | None = None
        self._workers: Workers[_From, Rows] | None = None
        if rank == 0:
            self._log()

    def _make_reader(
        self,
        augment: AugmentConfig,
        decoder: Decoder,
        *,
        seed: int,
        lanes: int,
        known_bad: Sequence[BadSample],
    ) -> LaneReader:
        prepare = TrainPreparation(augment, self._data.image_size, decoder)
        return LaneReader(
            self.index, prepare, seed=seed, lanes=lanes, block=self._data.block, known_bad=known_bad
        )

    def _log(self) -> None:
        readers = max(1, self._data.workers)
        world = self.share.world
        apart = order.readers_are_apart(self.lanes, world, self._data.workers)
        open_lanes = self.lanes // (world * readers) if apart else self.lanes
        block_mib = open_lanes * self._data.block * self.index.mean_bytes / _MIB
        slots = (self._data.prefetch + 1) * (self._data.workers > 0)
        ahead_mib = slots * self._max_rows() * 3 * self._data.image_size**2 / _MIB
        log.info(
            "data: %d samples in %d shards, %d lanes of blocks of %d; %d updates an epoch, %d samples of it unused; "
            "%d reader%s a rank, %d lanes open in each, %.1f MiB of blocks and %.1f MiB read ahead",
            *(self.index.num_samples, len(self.index.shards), self.lanes, self._data.block),
            *(self.steps_per_epoch, self.remainder),
            *(readers, "s" * (readers > 1), open_lanes, block_mib, ahead_mib),
        )
        if isinstance(self.index, Mixture):
            self.index.log(self.lanes)
        if not apart:
            log.info(
                "data: %d ranks × %d readers do not divide the %d pairs of lanes, so blocks are read by several "
                "readers: the same samples, read more slowly",
                *(world, readers, self.lanes // 2),
            )

    def _max_rows(self) -> int:
        """Most rows of a micro-batch that one worker reads."""
        return 2 * math.ceil(self.share.micro_batch / 2 / max(1, self._data.workers))

    def batches(
        self, epoch: int = 0, offset: int = 0, skipped: Sequence[tuple[int, int]] = ()
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches from `offset` samples into `epoch` on, over epochs without end.

        An update is `accumulate` of them, together with those of the other ranks. `skipped` are half-open
        ranges [first, end) of data steps (epoch · steps_per_epoch + update) to leave out. The call forks the
        workers, which read ahead from then on; another call ends them and takes over from it. Raises ConfigError
        for an offset that is no whole number of updates, DataError and SourceError as LaneReader does,
        WorkerError for a dead worker.
        """
        if (
            offset % self.share.global_batch
            or not 0 <= offset <= self.steps_per_epoch * self.share.global_batch
        ):
            raise ConfigError(
                f"{offset} samples into an epoch is no place between updates of {self.share.global_batch} samples "
                f"({self.steps_per_epoch} an epoch)"
            )
        begin = (epoch, offset // self.share.global_batch, tuple((first, end) for first, end in skipped))
        if not self._data.workers:
            return self._read_here(begin)
        self.close()
        shape = (self._max_rows(), self._data.image_size, self._data.image_size, 3)
        self._workers = Workers(self._produce, self._data.workers, self._data.prefetch, shape)
        self._workers.begin(begin)
        return self._gather(begin, self._workers)

    def interrupt(self) -> None:
        """Kill the workers: a thread that waits for their batches gets a WorkerError and waits no longer."""
        if self._workers is not None:
            self._workers.kill()

    def close(self) -> None:
        """End the workers and close the files; batches() starts them anew."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        for reader in (self._reader, self._again):
            if reader is not None:
                reader.close()

    def read_on_host(self, epoch: int, position: int) -> tuple[Tensor, Rows]:
        """Read one position anew and decode it with Pillow: (3, S, S) uint8, and what Rows says of it.

        For a sample that the device could not decode; where Pillow cannot either, it is replaced as any bad one.
        """
        if self._again is None:
            self._again = self._new_reader("pil")
        images = torch.empty((1, 3, self._data.image_size, self._data.image_size), dtype=torch.uint8)
        rows = self._again.read(epoch, [position], images)
        return images[0], rows

    def _schedule(self, begin: _From) -> Iterator[tuple[int, int, order.Ints]]:
        """Yield (epoch, step of it, positions) of each of this rank's micro-batches."""
        for epoch, step in order.updates(self.steps_per_epoch, *begin):
            for micro in range(self.share.accumulate):
                yield epoch, step, self.share.positions(step, micro)

    def _produce(self, worker: int, begin: _From, room: Room) -> Iterator[tuple[int, Rows]]:
        for epoch, _, positions in self._schedule(begin):
            mine = positions[self._rows_of(positions, worker)].tolist()
            yield len(mine), self._reader.read(epoch, mine, channels_first(room()))

    def _rows_of(self, positions: order.Ints, worker: int) -> order.Ints:
        """Return a micro-batch's rows that a worker reads."""
        return np.flatnonzero(order.worker_of(positions, self.share.world, self._data.workers) == worker)

    def _read_here(self, begin: _From) -> Iterator[Batch]:
        for epoch, step, positions in self._schedule(begin):
            images = self._empty(len(positions))
            yield self._batch(
                epoch, step, positions, images, self._reader.read(epoch, positions.tolist(), images)
            )

    def _gather(self, begin: _From, workers: Workers[_From, Rows]) -> Iterator[Batch]:
        for epoch, step, positions in self._schedule(begin):
            images = self._empty(len(positions))
            rows = Rows([0] * len(positions), [""] * len(positions))
            for worker in range(self._data.workers):
                part_images, part = next(workers)
                at = self._rows_of(positions, worker)
                # Whole pairs, every so many of them: a strided copy, which is several times faster than an indexed one.
                # NumPy's, by one thread: the readers have the cores, and torch cuts a copy among as many threads as it
                # finds and waits for the last to be let on (16 cores beside an H200: 950 images/s instead of 3,050).
                if len(part.encoded) < len(at):
                    share = _pairs(channels_first(part_images)).numpy()
                    _pairs(images).numpy()[at[0] // 2 :: self._data.workers] = share
                for i, label, key in zip(at.tolist(), part.labels, part.keys, strict=True):
                    rows.labels[i], rows.keys[i] = label, key
                rows.encoded.update((int(at[i]), encoded) for i, encoded in part.encoded.items())
                rows.bad += part.bad
            rows.bad.sort(key=lambda bad: bad.position)
            yield self._batch(epoch, step, positions, images, rows)

    def _empty(self, rows: int) -> Tensor:
        if not self._pin:
            return channels_first(self._memory.take())
        size = self._data.image_size
        return channels_first(torch.empty((rows, size, size, 3), dtype=torch.uint8, pin_memory=True))

    def _batch(self, epoch: int, step: int, positions: order.Ints, images: Tensor, rows: Rows) -> Batch:
        return Batch(
            images=images,
            labels=torch.tensor(rows.labels),
            positions=torch.from_numpy(positions),
            keys=rows.keys,
            step=epoch * self.steps_per_epoch + step,
            epoch=epoch,
            bad=rows.bad,
            encoded=rows.encoded,
        )


class _Recycled:
    """Memory for batches, taken again when nobody holds any part of it: fresh memory costs a fault a page."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = shape
        self._free: list[NDArray[np.uint8]] = []

    def take(self) -> Tensor:
        block = self._free.pop() if self._free else np.empty(self._shape, np.uint8)
        lease = block[...]  # lives as long as the tensor's storage does
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.from_numpy(lease)


def channels_first(images: Tensor) -> Tensor:
    """(B, S, S, 3) → (B, 3, S, S), the same memory: pixels stay as the decoder wrote them."""
    return images.permute(0, 3, 1, 2)


def _pairs(images: Tensor) -> Tensor:
    return images.unflatten(0, (-1, 2))  # type: ignore[no-untyped-call, no-any-return]


def eval_batches(
    index: Index,
    evaluate: EvalConfig,
    image_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    interpolation: str = "bicubic",
) -> Iterator[Batch]:
    """Yield one rank's share of an evaluation: over all ranks every sample exactly once, as they lie.

    Every rank yields the same number of batches of the same shapes. Batch.mask is false for padding (position
    -1) and for a bad sample, which also stands in Batch.bad. Workers are forked for each evaluation.
    """
    transform = EvalTransform(image_size, evaluate.crop, interpolation)

    def prepare(data: bytes, _: int) -> Tensor:
        return transform(decode(data))

    share = math.ceil(index.num_samples / world)
    num_batches = math.ceil(share / evaluate.batch)

    def rows_of(i: int) -> int:
        return min(evaluate.batch, share - i * evaluate.batch)

    def count_of(i: int) -> int:
        return max(0, min(rows_of(i), index.num_samples - rank * share - i * evaluate.batch))

    def read(source: Source, i: int, images: Tensor) -> tuple[Rows, list[bool]]:
        first = rank * share + i * evaluate.batch
        return read_in_file_order(index, source, prepare, first, count_of(i), images)

    def batch(i: int, images: Tensor, rows: Rows, good: list[bool]) -> Batch:
        first = rank * share + i * evaluate.batch
        positions = torch.full((len(images),), -1, dtype=torch.int64)
        positions[: count_of(i)] = torch.arange(first, first + count_of(i))
        labels, mask = torch.tensor(rows.labels), torch.tensor(good)
        return Batch(images, labels, positions, rows.keys, step=i, epoch=0, mask=mask, bad=rows.bad)

    if not workers:
        with closing(index.source()) as source:
            for i in range(num_batches):
                images = channels_first(
                    torch.empty((rows_of(i), image_size, image_size, 3), dtype=torch.uint8)
                )
                yield batch(i, images, *read(source, i, images))
        return
    workers = min(workers, num_batches)

    def produce(worker: int, _: None, room: Room) -> Iterator[tuple[int, tuple[Rows, list[bool]]]]:
        with closing(index.source()) as source:
            for i in range(worker, num_batches, workers):
                yield rows_of(i), read(source, i, channels_first(room()[: rows_of(i)]))

    pool = Workers(produce, workers, prefetch, (rows_of(0), image_size, image_size, 3))
    try:
        pool.begin(None)
        for i, (images, rest) in enumerate(pool):
            yield batch(i, channels_first(images.clone()), *rest)
    finally:
        pool.close()
