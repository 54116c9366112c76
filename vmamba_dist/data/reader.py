"""Positions → samples: blocks are read, elements decoded, bad ones replaced.

Law: what a position yields depends on the shards and the order alone, never on who reads it or what was read
before. A bad sample is replaced by the nearest earlier good element of its block, else the next one; a block
without any good element is replaced element by element by its lane's previous block (the first block, which has
none, by the next). A fault of the source itself replaces nothing: it is raised.

A reader holds, for each lane it reads, the undecoded bytes of one block. From a source that answers slowly it reads
the blocks that its next samples lie in side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from vmamba_dist.config.schema import UserError
from vmamba_dist.data.batch import BadSample, Encoded
from vmamba_dist.data.decode import DecodeError
from vmamba_dist.data.draws import sample_seeds
from vmamba_dist.data.index import Index, read_samples
from vmamba_dist.data.mixture import Mixture
from vmamba_dist.data.order import Order, Run
from vmamba_dist.data.prepare import Prepare
from vmamba_dist.data.sources import Fault, Raw, Source, parse_label


@dataclass
class Rows:
    """What a reader knows of the samples it has written; their images are in the memory it was given."""

    labels: list[int]
    keys: list[str]
    bad: list[BadSample] = field(default_factory=list)
    encoded: dict[int, Encoded] = field(default_factory=dict)  # rows left to the device, not in that memory


class DataError(UserError, RuntimeError):
    """The training data cannot be used; the message says where."""


@dataclass
class _Block:
    slots: list[int]  # the block's order
    places: list[tuple[int, int]]  # (shard, index in it) of each sample as it lies
    samples: list[Raw | Fault]  # as they lie


@dataclass(frozen=True)
class _Good:
    image: Tensor | Encoded
    label: int
    key: str


class LaneReader:
    """Reads an epoch's positions, in any order; ascending is cheap. Not for use from several threads."""

    def __init__(
        self,
        index: Index | Mixture,
        prepare: Prepare,
        *,
        seed: int,
        lanes: int,
        block: int,
        known_bad: Iterable[BadSample] = (),
    ) -> None:
        self._index = index
        self._lengths = np.asarray(index.lengths, dtype=np.int64)
        self._prepare = prepare
        self._seed, self._lanes, self._block_size = seed, lanes, block
        self._known: dict[tuple[int, int], list[BadSample]] = {}
        for bad in known_bad:
            self._known.setdefault((bad.epoch, bad.position), []).append(bad)
        self._source = index.source()
        self._order: Order | None = None
        self._blocks: dict[int, tuple[Any, int, _Block]] = {}  # by the order's buffer: lane, block, content
        self._all_bad: set[tuple[Any, int]] = set()  # (lane, block) of this epoch
        self._threads: ThreadPoolExecutor | None = None

    def read(self, epoch: int, positions: Sequence[int], images: Tensor) -> Rows:
        """Read and prepare the samples at `positions` of `epoch` into `images`, (n, 3, S, S) uint8, or Rows.encoded.

        Raises DataError where a whole lane has no good sample, SourceError where the source itself fails.
        """
        order = self._begin(epoch)
        if self._source.concurrency > 1:
            self._fetch(order, positions)
        rows = Rows([], [])
        seeds = sample_seeds(self._seed, epoch, positions)
        for i, position in enumerate(positions):
            good, bad = self._at(order, position, seeds[i])
            if isinstance(good.image, Encoded):
                rows.encoded[i] = good.image
            else:
                images[i] = good.image
            rows.labels.append(good.label)
            rows.keys.append(good.key)
            if bad is not None:
                rows.bad.append(bad)
        return rows

    def close(self) -> None:
        self._source.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        self._blocks.clear()

    @cached_property
    def _shard_of(self) -> dict[str, int]:
        """Shards by name; made for the first choice that is used again, since it may have millions of entries."""
        return {shard.filename: i for i, shard in enumerate(self._index.shards)}

    def _begin(self, epoch: int) -> Order:
        if self._order is None or self._order.epoch != epoch:
            self._order = self._index.order(self._seed, epoch, self._lanes, self._block_size)
            self._blocks.clear()
            self._all_bad.clear()
        return self._order

    def _fetch(self, order: Order, positions: Sequence[int]) -> None:
        """Read the blocks that the positions are the first to need, side by side."""
        wanted: dict[int, tuple[Any, int]] = {}
        for position in positions:
            lane, block, _ = order.place(position)
            buffer = order.buffer(lane)
            if buffer not in wanted and not self._holds(buffer, lane, block):
                wanted[buffer] = lane, block
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._source.concurrency, "shards")
        read = self._threads.map(self._read_runs, [order.runs(*place) for place in wanted.values()])
        for (buffer, place), (places, samples) in zip(wanted.items(), read, strict=True):
            self._blocks[buffer] = (*place, _Block(order.slots(*place), places, samples))

    def _holds(self, buffer: int, lane: Any, block: int) -> bool:
        held = self._blocks.get(buffer)
        return held is not None and held[:2] == (lane, block)

    def _at(self, order: Order, position: int, seed: int) -> tuple[_Good, BadSample | None]:
        lane, block, slot = order.place(position)
        known = self._known_at(order, position)
        if known is not None:
            chosen = self._again(known, seed)
            if chosen is not None:
                return chosen, known
        buffer = order.buffer(lane)
        if not self._holds(buffer, lane, block):
            self._blocks[buffer] = (lane, block, self._load(order, lane, block))
        content = self._blocks[buffer][2]
        good = self._good(content, slot, seed)
        if isinstance(good, _Good):
            return good, None
        replacement, (shard, index) = self._replace(order, lane, block, slot, content, seed)
        own_shard, own_index = content.places[content.slots[slot]]
        bad = BadSample(
            epoch=order.epoch,
            position=position,
            shard=self._index.shards[own_shard].filename,
            index=own_index,
            key=good.key,
            reason=good.reason,
            replacement_shard=self._index.shards[shard].filename,
            replacement_index=index,
            replacement_key=replacement.key,
        )
        return replacement, bad

    def _known_at(self, order: Order, position: int) -> BadSample | None:
        """Return the earlier attempts' choice for a position, unless another order has made it.

        A run that has no checkpoint yet may be started anew with another seed, block or set: then a good
        sample stands where the line says that a bad one stood.
        """
        lines = self._known.get((order.epoch, position))
        if lines is None:
            return None
        shard, index = order.locate(position)
        place = (self._index.shards[shard].filename, index)
        return next((bad for bad in lines if (bad.shard, bad.index) == place), None)

    def _load(self, order: Order, lane: Any, block: int) -> _Block:
        return _Block(order.slots(lane, block), *self._read_runs(order.runs(lane, block)))

    def _read_runs(self, runs: Sequence[Run]) -> tuple[list[tuple[int, int]], list[Raw | Fault]]:
        """Read a block: where its samples lie, and what they are."""
        places: list[tuple[int, int]] = []
        samples: list[Raw | Fault] = []
        for run in runs:
            samples += read_samples(self._source, self._index.offsets, run.shard, run.first, run.count)
            places += [(run.shard, run.first + i) for i in range(run.count)]
        return places, samples

    def _good(self, content: _Block, slot: int, seed: int) -> _Good | Fault:
        """Prepare an element of a block; a fault is found once, and kept in the sample's place."""
        at = content.slots[slot]
        good = _made(content.samples[at], self._index.num_classes, self._prepare, seed)
        if isinstance(good, Fault):
            content.samples[at] = good
        return good

    def _replace(
        self, order: Order, lane: Any, block: int, slot: int, content: _Block, seed: int
    ) -> tuple[_Good, tuple[int, int]]:
        for other in (*range(block, -1, -1), *range(block + 1, order.num_blocks(lane))):
            if (lane, other) in self._all_bad:
                continue
            if other != block:
                content = self._load(order, lane, other)
            near = min(slot, len(content.slots) - 1)
            # In another block the element of the same slot comes first; in its own it is the bad one.
            for candidate in (*range(near, -1, -1), *range(near + 1, len(content.slots))):
                good = self._good(content, candidate, seed)
                if isinstance(good, _Good):
                    return good, content.places[content.slots[candidate]]
            self._all_bad.add((lane, other))
        raise DataError(
            f"lane {lane} of epoch {order.epoch} has no usable sample at all in {order.num_blocks(lane)} blocks; "
            "check the set with: vmamba shards verify"
        )

    def _again(self, known: BadSample, seed: int) -> _Good | None:
        """Re-use a choice of an earlier attempt; None where it no longer holds."""
        shard = self._shard_of.get(known.replacement_shard)
        if shard is None or not 0 <= known.replacement_index < self._lengths[shard]:
            return None
        sample = read_samples(self._source, self._index.offsets, shard, known.replacement_index, 1)[0]
        good = _made(sample, self._index.num_classes, self._prepare, seed)
        return good if isinstance(good, _Good) else None


def _made(sample: Raw | Fault, num_classes: int, prepare: Prepare, seed: int) -> _Good | Fault:
    if isinstance(sample, Fault):
        return sample
    label = parse_label(sample, num_classes)
    if isinstance(label, Fault):
        return label
    try:
        return _Good(prepare(sample.image, seed), label, sample.key)
    except DecodeError as error:
        return Fault(str(error), sample.key)


def read_in_file_order(
    index: Index, source: Source, prepare: Prepare, first: int, count: int, images: Tensor
) -> tuple[Rows, list[bool]]:
    """Read `count` samples from the set's `first`-th on, as they lie, into `images`; for evaluation.

    Returns the rows, as many as `images` has, and which of them hold a sample: the others, padding and bad
    samples, are zeros.
    """
    rows = Rows([0] * len(images), [""] * len(images))
    good_rows = [False] * len(images)
    images.zero_()
    for row, (shard, at, sample) in enumerate(_samples_from(index, source, first, count)):
        good = _made(sample, index.num_classes, prepare, seed=0)
        if isinstance(good, Fault):
            name = index.shards[shard].filename
            rows.keys[row] = good.key
            rows.bad.append(BadSample(0, first + row, name, at, good.key, good.reason))
            continue
        assert isinstance(good.image, Tensor), "evaluation decodes on the host"
        images[row] = good.image
        rows.labels[row], rows.keys[row], good_rows[row] = good.label, good.key, True
    return rows, good_rows


def _samples_from(
    index: Index, source: Source, first: int, count: int, at_once: int = 32
) -> Iterator[tuple[int, int, Raw | Fault]]:
    end = first + count
    start = 0
    for shard, length in enumerate(index.lengths):
        low, high = max(first - start, 0), min(end - start, length)
        for at in range(low, high, at_once):
            chunk = read_samples(source, index.offsets, shard, at, min(at_once, high - at))
            for i, sample in enumerate(chunk):
                yield shard, at + i, sample
        start += length
