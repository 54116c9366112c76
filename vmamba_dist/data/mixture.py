"""Several sets as one: whose sample comes when.

Law: as order.py's. The sample at position p of epoch e is a pure function of (seed, e, p), the sets' shard lengths,
the weights, lanes, block and the batch; and each source gives each of its samples once in each of its own epochs,
however often those end within one of the mixture's.

An epoch of a mixture is as many samples as its sources have together, cut to whole batches. Source s has the share
w_s of them, in lanes: of the L lanes it owns L_s, by largest remainders, so that a share is held to 1 / L, in every
row of L positions. Which lanes are whose is permuted by (seed, e). The samples of s are counted through, over all
epochs of the mixture; the k-th is element k mod N_s of its own epoch k div N_s, whose order is order.py's with L_s
lanes. So a lane of the mixture follows one lane of a source, and whoever reads the one reads the other: what
order.py says of ranks, workers and resuming holds for mixtures too.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.index import Column, Index, Shard
from vmamba_dist.data.order import EpochOrder, Run, check_lanes
from vmamba_dist.data.sources import Source

log = logging.getLogger(__name__)

_LANES, _LAST_ROW, _SOURCE = (
    zlib.crc32(name) for name in (b"mixture.lanes", b"mixture.last", b"mixture.source")
)
_FAR = 0.1  # of its share: a source that is further from it is told


class Lane(NamedTuple):
    """A lane of a source's epoch, and the lane of the mixture that follows it."""

    buffer: int
    source: int
    epoch: int  # of the source
    lane: int

    def __str__(self) -> str:
        return f"{self.lane} of source {self.source}"


@dataclass(frozen=True)
class Mixture:
    """Sets that are read as one, each with its weight. Shards are numbered through; their names tell whose they are."""

    parts: tuple[Index, ...]
    weights: tuple[float, ...]
    global_batch: int

    def __post_init__(self) -> None:
        """Raises ConfigError where a source is empty, or two of them number their classes differently."""
        for i, part in enumerate(self.parts):
            if part.num_samples == 0:
                raise ConfigError(f"data.train[{i}].path={part.place!r}: split {part.split!r} has no samples")
        named = [(i, part) for i, part in enumerate(self.parts) if part.class_names]
        for i, part in named[1:]:
            first, other = named[0][1].class_names, part.class_names
            wrong = next((n for n, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), None)
            if wrong is not None:
                raise ConfigError(
                    f"data.train[{i}].path={part.place!r}: class {wrong} is {other[wrong]!r} there and "
                    f"{first[wrong]!r} in data.train[{named[0][0]}]; pack the sets with the same classes"
                )

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch of the mixture."""
        total = sum(part.num_samples for part in self.parts)
        return total // self.global_batch * self.global_batch or total

    @cached_property
    def shares(self) -> tuple[float, ...]:
        return tuple(weight / sum(self.weights) for weight in self.weights)

    @cached_property
    def shards(self) -> Sequence[Shard]:
        part_of, first = _numbered(self.parts)

        def shard(i: int) -> Shard:
            part = int(part_of[i])
            own = self.parts[part].shards[i - first[part]]
            return replace(own, filename=f"{part}:{own.filename}")

        return Column(len(part_of), shard)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.concatenate([np.asarray(part.lengths, dtype=np.int64) for part in self.parts])

    @property
    def mean_bytes(self) -> float:
        return sum(share * part.mean_bytes for share, part in zip(self.shares, self.parts, strict=True))

    @property
    def num_classes(self) -> int:
        return max(part.num_classes for part in self.parts)

    @cached_property
    def offsets(self) -> MixedBounds:
        return MixedBounds(self.parts)

    def fingerprint(self) -> str:
        """Hash what the sources hold, in order, and their shares. Hex, 64 digits."""
        lines = (
            f"{share!r} {part.fingerprint()}\n" for share, part in zip(self.shares, self.parts, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def source(self) -> Source:
        """Return a reader of all the shards' bytes, for one process."""
        return MixedSource(self.parts)

    def lanes_of(self, lanes: int) -> tuple[int, ...]:
        """Return how many of the lanes each source owns."""
        return apportion(lanes, self.shares)

    def check_lanes(self, lanes: int) -> None:
        """Refuse lanes that the sources cannot fill or share. Raises ConfigError."""
        check_lanes(self.num_samples, lanes)
        for i, (own, part, share) in enumerate(
            zip(self.lanes_of(lanes), self.parts, self.shares, strict=True)
        ):
            if own == 0:
                raise ConfigError(
                    f"data.train[{i}].weight: a share of {share:.2%} is less than one of {lanes} lanes; use "
                    f"data.lanes={2 * round(0.5 / share + 0.5)} or more, or a larger weight"
                )
            if own > part.num_samples:
                raise ConfigError(
                    f"data.train[{i}].path={part.place!r} has {part.num_samples} samples, fewer than its {own} of "
                    f"{lanes} lanes; use fewer data.lanes, or a smaller weight"
                )

    def order(self, seed: int, epoch: int, lanes: int, block: int) -> MixtureOrder:
        """Return the order of an epoch."""
        return MixtureOrder(
            seed,
            epoch,
            [np.asarray(part.lengths, dtype=np.int64) for part in self.parts],
            self.lanes_of(lanes),
            self.num_samples,
            block,
        )

    def log(self, lanes: int) -> None:
        """Say how much of each source an epoch holds."""
        for i, (own, part, share) in enumerate(
            zip(self.lanes_of(lanes), self.parts, self.shares, strict=True)
        ):
            count = self.num_samples * own / lanes
            log.info(
                "data.train[%d]: %s has %d samples and %d of %d lanes: %.1f %% of an epoch, %.2f epochs of its own",
                *(i, part.place, part.num_samples, own, lanes, 100 * own / lanes, count / part.num_samples),
            )
            if abs(own / lanes - share) > _FAR * share:
                log.warning(
                    "data.train[%d]: its weight asks for %.2f %%; more data.lanes than %d would hold it closer",
                    *(i, 100 * share, lanes),
                )


class MixtureOrder:
    """The order of one epoch of a mixture; as EpochOrder, with lanes that are a `Lane`."""

    def __init__(
        self,
        seed: int,
        epoch: int,
        lengths: Sequence[Sequence[int] | NDArray[np.int64]],
        lanes_of: Sequence[int],
        num_samples: int,
        block: int,
    ) -> None:
        """`lengths` are the shards' of each source, `lanes_of` the lanes that each owns, all ≥ 1."""
        self.seed, self.epoch, self.block = seed, epoch, block
        self.lanes = sum(lanes_of)
        self.num_samples = num_samples
        self._lengths = [np.asarray(own, dtype=np.int64) for own in lengths]
        self._sizes = [int(own.sum()) for own in self._lengths]
        self._first_shard = [0, *np.cumsum([len(own) for own in lengths]).tolist()]
        self._lanes_of = list(lanes_of)
        self._rows, rest = divmod(num_samples, self.lanes)
        in_last = apportion(rest, [own / self.lanes for own in lanes_of])
        self._whose, self._nth = _pattern((seed, _LANES, epoch), lanes_of)
        self._whose_last, self._nth_last = _pattern((seed, _LAST_ROW, epoch), in_last)
        self._begun = [epoch * (self._rows * own + last) for own, last in zip(lanes_of, in_last, strict=True)]
        self._seeds = [
            int(np.random.SeedSequence((seed, _SOURCE, i)).generate_state(1, np.uint64)[0] >> np.uint64(1))
            for i in range(len(lengths))
        ]
        self._orders: OrderedDict[tuple[int, int], EpochOrder] = OrderedDict()

    def count(self, position: int) -> tuple[int, int]:
        """Return (source, how many of its samples came before, in all epochs) of a position."""
        row, lane = divmod(position, self.lanes)
        last = row == self._rows
        source = (self._whose_last if last else self._whose)[lane]
        nth = (self._nth_last if last else self._nth)[lane]
        return source, self._begun[source] + row * self._lanes_of[source] + nth

    def place(self, position: int) -> tuple[Lane, int, int]:
        """Return (lane, block of the lane, slot of the block) of a position."""
        source, count = self.count(position)
        epoch, own = divmod(count, self._sizes[source])
        lane, block, slot = self._of(source, epoch).place(own)
        return Lane(position % self.lanes, source, epoch, lane), block, slot

    def buffer(self, lane: Lane) -> int:
        return lane.buffer

    def num_blocks(self, lane: Lane) -> int:
        return self._of(lane.source, lane.epoch).num_blocks(lane.lane)

    def slots(self, lane: Lane, block: int) -> list[int]:
        return self._of(lane.source, lane.epoch).slots(lane.lane, block)

    def runs(self, lane: Lane, block: int) -> list[Run]:
        first = self._first_shard[lane.source]
        found = self._of(lane.source, lane.epoch).runs(lane.lane, block)
        return [Run(first + run.shard, run.first, run.count) for run in found]

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, index in the shard) of a position."""
        if not 0 <= position < self.num_samples:
            raise IndexError(f"position {position} is outside an epoch of {self.num_samples} samples")
        source, count = self.count(position)
        epoch, own = divmod(count, self._sizes[source])
        shard, index = self._of(source, epoch).locate(own)
        return self._first_shard[source] + shard, index

    def _of(self, source: int, epoch: int) -> EpochOrder:
        """A source's own epoch; two of a source are open where one passes into the next."""
        order = self._orders.get((source, epoch))
        if order is None:
            if len(self._orders) >= 3 * len(self._sizes):
                self._orders.popitem(last=False)
            order = self._orders[source, epoch] = EpochOrder(
                self._seeds[source], epoch, self._lengths[source], self._lanes_of[source], self.block
            )
        self._orders.move_to_end((source, epoch))
        return order


class MixedBounds:
    """Where the samples of all sources lie, by the shard's number in the mixture."""

    def __init__(self, parts: Sequence[Index]) -> None:
        self._parts = parts
        self._part_of, self._first = _numbered(parts)

    def bounds(self, shard: int, first: int, count: int) -> list[int]:
        part = int(self._part_of[shard])
        return self._parts[part].offsets.bounds(shard - self._first[part], first, count)


class MixedSource:
    """The bytes of all sources, by the shard's number in the mixture."""

    def __init__(self, parts: Sequence[Index]) -> None:
        self._sources = [part.source() for part in parts]
        self._part_of, self._first = _numbered(parts)
        # One that several threads may not use is read by one at a time; the others' answers are waited for meanwhile.
        self._locks: list[AbstractContextManager[object]] = [
            threading.Lock() if source.concurrency == 1 else nullcontext() for source in self._sources
        ]
        self.concurrency = max(source.concurrency for source in self._sources)

    def read(self, shard: int, start: int, end: int) -> bytes:
        part = int(self._part_of[shard])
        with self._locks[part]:
            return self._sources[part].read(shard - self._first[part], start, end)

    def close(self) -> None:
        for source in self._sources:
            source.close()


def apportion(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Divide `total` by shares (of sum 1) in whole numbers, by largest remainders; the first of equal ones first."""
    exact = [total * share for share in shares]
    counts = [int(part) for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def _numbered(parts: Sequence[Index]) -> tuple[NDArray[np.int32], list[int]]:
    """Return each shard's part, and each part's first shard."""
    counts = [len(part.shards) for part in parts]
    return np.repeat(np.arange(len(parts), dtype=np.int32), counts), [0, *np.cumsum(counts).tolist()]


def _pattern(key: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return whose each lane of a row is, permuted, and which of its owner's lanes it is."""
    whose = np.random.default_rng(key).permutation(np.repeat(np.arange(len(counts)), counts))
    nth = np.empty_like(whose)
    for source, count in enumerate(counts):
        nth[whose == source] = np.arange(count)
    return whose.tolist(), nth.tolist()
