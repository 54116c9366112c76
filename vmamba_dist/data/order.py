"""Which sample comes when, and who reads it.

Law: the sample at position p of epoch e is a pure function of (seed, e, p) and of the set's shard lengths,
lanes and block. Neither the world size nor the number of workers enters, so a run resumed at any world
size goes on in the very same order; they decide only who reads a position.

1. Permute the shards by (seed, e) and lay them end to end.
2. Cut the N samples into `lanes` contiguous segments, numbered in an order permuted by (seed, e); lanes
   numbered below N mod lanes are one longer.
3. Shuffle each lane in blocks, each by (seed, e, lane, block): any block is known without the ones before.
4. Position p is lane p mod lanes, element p div lanes.
5. Update t of an epoch is positions [t·G, (t+1)·G). rank(p) = (p div 2) mod W and
   worker(p) = ((p div 2) div W) mod workers, so positions 2i and 2i+1 are never parted.

NumPy only: nothing here costs more than a few µs a sample, and nothing holds all N positions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vmamba_dist.config.schema import ConfigError

Ints = NDArray[np.int64]
IntOrInts = TypeVar("IntOrInts", int, Ints)

LANES = (2, 4, 12, 24, 48, 120, 240, 480, 960, 1920, 3840, 7680, 15360)
_GIB = 1 << 30
_SHARDS, _LANES, _BLOCK = (zlib.crc32(name) for name in (b"order.shards", b"order.lanes", b"order.block"))


def choose_lanes(
    num_samples: int,
    mean_bytes: float,
    *,
    block: int,
    shuffle_gib: float,
    world: int = 1,
    workers: int = 0,
    lanes: int | None = None,
) -> int:
    """Choose the number of lanes, once a run: it is recorded, and immutable on resume.

    The largest of LANES with num_samples / lanes ≥ 4 · block whose open blocks (lanes · block ·
    mean_bytes, in bytes) fit shuffle_gib over the job; but at least 2 · world · workers where num_samples
    allows, because below that two workers read the same lane. `lanes` overrides the rule.
    Raises ConfigError where even the fewest lanes have no samples.
    """
    if lanes is not None:
        check_lanes(num_samples, lanes)
        return lanes
    check_lanes(num_samples, LANES[0])
    allowed = [n for n in LANES if num_samples >= 4 * block * n] or [LANES[0]]
    fitting = [n for n in allowed if n * block * mean_bytes <= shuffle_gib * _GIB] or allowed[:1]
    readers = 2 * world * max(1, workers)
    enough = [n for n in allowed if n >= readers] or allowed[-1:]
    return max(fitting[-1], enough[0])


def check_lanes(num_samples: int, lanes: int) -> None:
    """Refuse lanes that the set cannot fill. Raises ConfigError."""
    if lanes < 2 or lanes % 2:
        raise ConfigError(
            f"data.lanes={lanes}: pairs of samples need an even number of lanes; use 2, 4, 12, 24, …"
        )
    if lanes > num_samples:
        raise ConfigError(
            f"data.lanes={lanes} is more than the {num_samples} samples of the training set; use at most "
            f"{num_samples - num_samples % 2} lanes, or more samples"
        )


def check_batch(num_samples: int, global_batch: int, world: int, accumulate: int = 1) -> None:
    """Refuse a batch that the set cannot fill or the ranks cannot share. Raises ConfigError, with the numbers."""
    unit = 2 * world * accumulate
    if global_batch < 2 or global_batch % unit:
        below = global_batch - global_batch % unit
        fix = f"{below} or {below + unit}" if below else f"{unit}"
        parts = f"{world} rank{'s' * (world != 1)}" + f" in {accumulate} micro-batches each" * (
            accumulate > 1
        )
        raise ConfigError(
            f"data.global_batch={global_batch} does not divide over {parts}: pairs of samples stay together, so "
            f"it must be a multiple of {unit}; use {fix}, or another number of processes"
        )
    if num_samples < global_batch:
        most = num_samples - num_samples % unit
        fix = (
            f"use data.global_batch={most} or less" if most else f"{world} ranks need at least {unit} samples"
        )
        raise ConfigError(
            f"data.global_batch={global_batch} is more than the {num_samples} samples of the training set: "
            f"no update could be made; {fix}"
        )


def choose_accumulate(global_batch: int, world: int, micro_batch: int | None) -> int:
    """Give the fewest micro-batches a rank that hold at most micro_batch samples each; pairs stay together."""
    check_batch(global_batch, global_batch, world)
    pairs = global_batch // world // 2
    if micro_batch is None or 2 * pairs <= micro_batch:
        return 1
    return next(n for n in range(1, pairs + 1) if pairs % n == 0 and 2 * pairs // n <= micro_batch)


def rank_of(position: IntOrInts, world: int) -> IntOrInts:
    """Tell which rank learns from a position."""
    return (position // 2) % world


def worker_of(position: IntOrInts, world: int, workers: int) -> IntOrInts:
    """Tell which of its rank's workers reads a position; workers ≥ 1."""
    return (position // 2) // world % workers


@dataclass(frozen=True)
class Share:
    """One rank's share of every update of `global_batch` samples, in `accumulate` micro-batches."""

    global_batch: int
    rank: int
    world: int
    accumulate: int = 1

    @property
    def micro_batch(self) -> int:
        return self.global_batch // self.world // self.accumulate

    def positions(self, step: int, micro: int) -> Ints:
        """Return the positions of micro-batch `micro` of the epoch's update `step`, ascending, (micro_batch,)."""
        pairs = self.micro_batch // 2
        first = step * (self.global_batch // 2) + micro * pairs * self.world + self.rank
        pair = first + self.world * np.arange(pairs, dtype=np.int64)
        return (2 * pair[:, None] + np.arange(2)).reshape(-1)


def updates(
    steps_per_epoch: int, epoch: int, step: int, skipped: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[int, int]]:
    """Yield (epoch, step in the epoch) for ever, from the given one on.

    `skipped` are half-open ranges [first, end) of data steps, epoch · steps_per_epoch + step: left out.
    """
    ranges = sorted(skipped)
    t = epoch * steps_per_epoch + step
    while True:
        for first, end in ranges:
            if first <= t < end:
                t = end
        yield divmod(t, steps_per_epoch)
        t += 1


@dataclass(frozen=True)
class Run:
    """`count` samples of a shard that lie behind one another, from `first` on."""

    shard: int
    first: int
    count: int


class Order(Protocol):
    """What a reader asks of an epoch's order. A lane is named by the order's own value for it."""

    epoch: int

    def place(self, position: int) -> tuple[Any, int, int]:
        """Return (lane, block of the lane, slot of the block) of a position."""

    def buffer(self, lane: Any) -> int:
        """Tell which of a reader's open blocks is the lane's."""

    def num_blocks(self, lane: Any) -> int: ...

    def slots(self, lane: Any, block: int) -> list[int]: ...

    def runs(self, lane: Any, block: int) -> list[Run]: ...

    def locate(self, position: int) -> tuple[int, int]: ...


class EpochOrder:
    """The order of one epoch. Holds O(shards + lanes) numbers; a block's order is drawn when asked for."""

    def __init__(
        self, seed: int, epoch: int, shard_lengths: Sequence[int] | Ints, lanes: int, block: int
    ) -> None:
        lengths = np.asarray(shard_lengths, dtype=np.int64)
        self.seed, self.epoch, self.lanes, self.block = seed, epoch, lanes, block
        self.num_samples = int(lengths.sum())
        if not 1 <= lanes <= self.num_samples:  # a mixture's source may have an odd number
            check_lanes(self.num_samples, lanes)
        shards = _rng(seed, _SHARDS, epoch).permutation(len(lengths))
        self._shards: Ints = shards  # arrays: as lists a million of them would take 80 MB
        self._shard_starts: Ints = np.concatenate([[0], np.cumsum(lengths[shards])])
        numbers = _rng(seed, _LANES, epoch).permutation(lanes)  # of the segments, in the order they lie
        ends = np.cumsum(self.num_samples // lanes + (numbers < self.num_samples % lanes))
        starts = np.empty(lanes, np.int64)
        starts[numbers] = np.concatenate([[0], ends[:-1]])
        self._lane_starts: list[int] = starts.tolist()

    def lane_length(self, lane: int) -> int:
        return self.num_samples // self.lanes + (lane < self.num_samples % self.lanes)

    def num_blocks(self, lane: int) -> int:
        return -(-self.lane_length(lane) // self.block)

    def block_length(self, lane: int, block: int) -> int:
        return min(self.block, self.lane_length(lane) - block * self.block)

    def place(self, position: int) -> tuple[int, int, int]:
        """Return (lane, block of the lane, slot of the block) of a position."""
        element, lane = divmod(position, self.lanes)
        return lane, *divmod(element, self.block)

    def buffer(self, lane: int) -> int:
        return lane

    def slots(self, lane: int, block: int) -> list[int]:
        """Return the block's order: slot k takes the slots(…)[k]-th sample of the block as it lies."""
        length = self.block_length(lane, block)
        return _rng(self.seed, _BLOCK, self.epoch, lane, block).permutation(length).tolist()  # type: ignore[no-any-return]

    def runs(self, lane: int, block: int) -> list[Run]:
        """Return where the block's samples lie, in the order they lie: one run a shard."""
        at = self._lane_starts[lane] + block * self.block
        end = at + self.block_length(lane, block)
        runs = []
        i = self._shard_at(at)
        while at < end:
            start, stop = int(self._shard_starts[i]), min(end, int(self._shard_starts[i + 1]))
            if stop > at:  # an empty shard has nothing
                runs.append(Run(int(self._shards[i]), at - start, stop - at))
            at, i = stop, i + 1
        return runs

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, index in the shard) of a position."""
        if not 0 <= position < self.num_samples:
            raise IndexError(f"position {position} is outside an epoch of {self.num_samples} samples")
        lane, block, slot = self.place(position)
        at = self._lane_starts[lane] + block * self.block + self.slots(lane, block)[slot]
        i = self._shard_at(at)
        return int(self._shards[i]), at - int(self._shard_starts[i])

    def _shard_at(self, at: int) -> int:
        """Return the place, in this epoch's order of shards, of the one that holds the epoch's `at`-th sample."""
        return int(np.searchsorted(self._shard_starts, at, side="right")) - 1


def readers_are_apart(lanes: int, world: int, workers: int) -> bool:
    """Tell whether no two readers of the job share a lane; where they do, blocks are read more than once."""
    return (lanes // 2) % (world * max(1, workers)) == 0


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
