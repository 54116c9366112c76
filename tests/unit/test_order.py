"""Laws of the data order: each position once, the same for every world, and a resume goes on."""

from __future__ import annotations

import time
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.order import (
    LANES,
    EpochOrder,
    Share,
    check_batch,
    check_lanes,
    choose_accumulate,
    choose_lanes,
    rank_of,
    readers_are_apart,
    updates,
    worker_of,
)

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda n: sum(n) >= 2)


@st.composite
def epochs(draw: st.DrawFn) -> EpochOrder:
    shards = draw(lengths)
    lanes = 2 * draw(st.integers(1, sum(shards) // 2))
    return EpochOrder(
        draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, 999)), shards, lanes, draw(st.integers(1, 20))
    )


@st.composite
def shares(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(G, W, workers, accumulate)"""
    world, accumulate = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    return 2 * world * accumulate * draw(st.integers(1, 5)), world, draw(st.integers(1, 5)), accumulate


@settings(deadline=None)
@given(epochs())
def test_every_position_is_another_sample_and_all_are_there(order: EpochOrder) -> None:
    places = sorted(order.locate(p) for p in range(order.num_samples))
    counts = np.bincount([shard for shard, _ in places])
    assert places == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]


@settings(deadline=None)
@given(epochs())
def test_a_lane_is_one_contiguous_piece_of_the_permuted_shards(order: EpochOrder) -> None:
    longer = order.num_samples % order.lanes
    for lane in range(order.lanes):
        runs = [run for block in range(order.num_blocks(lane)) for run in order.runs(lane, block)]
        assert sum(run.count for run in runs) == order.num_samples // order.lanes + (lane < longer)
        for a, b in pairwise(runs):
            assert (b.shard, b.first) == (a.shard, a.first + a.count) or b.first == 0
    for lane in range(order.lanes):
        for block in range(order.num_blocks(lane)):
            slots = order.slots(lane, block)
            assert sorted(slots) == list(range(order.block_length(lane, block)))
            lying = [(run.shard, run.first + i) for run in order.runs(lane, block) for i in range(run.count)]
            first = block * order.block
            read = [order.locate((first + k) * order.lanes + lane) for k in range(len(slots))]
            assert read == [lying[slot] for slot in slots]


@settings(deadline=None)
@given(shares(), st.integers(0, 50))
def test_ranks_and_workers_split_an_update_and_keep_pairs(
    share: tuple[int, int, int, int], step: int
) -> None:
    batch, world, workers, accumulate = share
    seen: list[int] = []
    for rank in range(world):
        own = Share(batch, rank, world, accumulate)
        for micro in range(accumulate):
            positions = own.positions(step, micro)
            assert len(positions) == batch // world // accumulate
            assert (np.diff(positions) > 0).all()
            assert (positions[0::2] % 2 == 0).all()
            assert (positions[1::2] == positions[0::2] + 1).all()
            assert (rank_of(positions, world) == rank).all()
            owner = worker_of(positions, world, workers)
            assert (owner[0::2] == owner[1::2]).all()
            assert set(owner.tolist()) <= set(range(workers))
            seen += positions.tolist()
    assert sorted(seen) == list(range(step * batch, (step + 1) * batch))


@given(epochs(), st.data())
@settings(max_examples=40, deadline=None)
def test_resume_at_any_step_and_world_equals_the_tail(order: EpochOrder, data: st.DataObject) -> None:
    pairs = order.num_samples // 2
    batch = 2 * data.draw(st.integers(1, min(pairs, 24)))
    steps = order.num_samples // batch
    worlds = [w for w in range(1, batch // 2 + 1) if batch // 2 % w == 0]
    skipped = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=3))

    def samples(world: int, epoch: int, step: int, count: int) -> list[tuple[int, list[tuple[int, int]]]]:
        made = []
        for e, t in islice(updates(steps, epoch, step, skipped), count):
            epoch_order = EpochOrder(order.seed, e, order_lengths, order.lanes, order.block)
            positions = np.sort(
                np.concatenate([Share(batch, r, world).positions(t, 0) for r in range(world)])
            )
            made.append((e * steps + t, [epoch_order.locate(p) for p in positions.tolist()]))
        return made

    order_lengths = np.bincount([order.locate(p)[0] for p in range(order.num_samples)]).tolist()
    whole = samples(data.draw(st.sampled_from(worlds)), 0, 0, 8)
    for number in range(1, len(whole)):
        last = whole[number - 1][0] + 1
        resumed = samples(data.draw(st.sampled_from(worlds)), *divmod(last, steps), len(whole) - number)
        assert resumed == whole[number:]


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4),
    st.integers(0, 20),
)
def test_skipped_steps_are_left_out_and_no_others(
    steps: int, skipped: list[tuple[int, int]], begin: int
) -> None:
    got = [e * steps + t for e, t in islice(updates(steps, *divmod(begin, steps), skipped), 40)]
    wanted = (t for t in range(begin, 999) if not any(first <= t < end for first, end in skipped))
    assert got == list(islice(wanted, 40))


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return [EpochOrder(seed, epoch, [50, 50], 4, 8).locate(p) for p in range(100)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(0, 1) == orders[1]


def test_the_order_is_the_one_that_running_checkpoints_rely_on() -> None:
    """A change of this order, also by NumPy, would make resumed runs read some samples twice and others never."""
    order = EpochOrder(7, 3, [5, 0, 9, 4], 4, 3)
    assert [order.locate(p) for p in range(18)] == [
        (0, 0),
        (3, 1),
        (2, 0),
        (2, 5),
        (2, 8),
        (3, 0),
        (2, 1),
        (2, 4),
        (0, 1),
        (0, 4),
        (2, 2),
        (2, 6),
        (0, 3),
        (3, 3),
        (2, 3),
        (2, 7),
        (0, 2),
        (3, 2),
    ]


@pytest.mark.parametrize(
    ("samples", "mean_bytes", "world", "workers", "lanes"),
    [
        (1437, 600, 1, 0, 12),  # the digits
        (1437, 600, 2, 2, 12),
        (1_281_167, 110_000, 1, 4, 1920),  # ImageNet: 4 GiB of 110 kB hold 2,440 blocks of 16
        (1_281_167, 110_000, 128, 16, 7680),  # more readers than that: one lane a reader comes first
        (10**9, 20_000, 1024, 8, 15360),
        (3, 100, 1, 0, 2),
        (2, 100, 4, 4, 2),
    ],
)
def test_lanes_follow_the_rule(samples: int, mean_bytes: float, world: int, workers: int, lanes: int) -> None:
    chosen = choose_lanes(samples, mean_bytes, block=16, shuffle_gib=4.0, world=world, workers=workers)
    assert chosen == lanes


@settings(deadline=None)
@given(
    st.integers(2, 10**7),
    st.floats(1, 1e6),
    st.integers(1, 64),
    st.floats(0.001, 64),
    st.integers(1, 64),
    st.integers(0, 16),
)
def test_lanes_are_the_most_that_samples_and_memory_allow(
    samples: int, mean_bytes: float, block: int, gib: float, world: int, workers: int
) -> None:
    lanes = choose_lanes(samples, mean_bytes, block=block, shuffle_gib=gib, world=world, workers=workers)
    assert lanes in LANES
    assert lanes == 2 or samples >= lanes * 4 * block
    bigger = [n for n in LANES if n > lanes and samples >= n * 4 * block]
    assert all(n * block * mean_bytes > gib * 2**30 for n in bigger)
    assert lanes >= 2 * world * max(1, workers) or not bigger
    smaller = [n for n in LANES if n < lanes]
    fits = lanes * block * mean_bytes <= gib * 2**30
    assert fits or not smaller or smaller[-1] < 2 * world * max(1, workers)


def test_asked_lanes_are_kept() -> None:
    assert choose_lanes(100, 1.0, block=16, shuffle_gib=4, lanes=10) == 10
    with pytest.raises(ConfigError, match=r"data\.lanes=102 is more than the 100 samples"):
        choose_lanes(100, 1.0, block=16, shuffle_gib=4, lanes=102)
    with pytest.raises(ConfigError, match=r"data\.lanes=3: .*even"):
        check_lanes(100, 3)


@pytest.mark.parametrize(
    ("samples", "batch", "world", "accumulate", "words"),
    [
        (1000, 250, 16, 1, ["data.global_batch=250", "16 ranks", "multiple of 32", "use 224 or 256"]),
        (1000, 64, 3, 1, ["64", "3 ranks", "multiple of 6", "60 or 66"]),
        (1000, 8, 8, 1, ["8 ranks", "multiple of 16", "use 16"]),
        (1000, 24, 2, 4, ["2 ranks in 4 micro-batches each", "multiple of 16", "16 or 32"]),
        (63, 64, 1, 1, ["64 is more than the 63 samples", "data.global_batch=62 or less"]),
        (63, 64, 32, 1, ["64 is more than the 63 samples", "32 ranks need at least 64"]),
    ],
)
def test_impossible_batches_are_refused_with_the_numbers(
    samples: int, batch: int, world: int, accumulate: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_batch(samples, batch, world, accumulate)
    for word in words:
        assert word in str(error.value)


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 60), st.integers(2, 64) | st.none())
def test_accumulation_is_the_least_that_fits(world: int, pairs: int, most: int | None) -> None:
    batch = 2 * world * pairs
    number = choose_accumulate(batch, world, most)
    check_batch(batch, batch, world, number)
    assert most is None or batch // world // number <= most
    fewer = [n for n in range(1, number) if pairs % n == 0]
    assert most is None or all(batch // world // n > most for n in fewer)


def test_readers_are_apart_where_they_divide_the_pairs_of_lanes() -> None:
    order = EpochOrder(0, 0, [100] * 12, 24, 4)
    for world in (1, 2, 3, 4, 5):
        for workers in (1, 2, 3):
            lanes: dict[int, set[tuple[int, int]]] = {}
            for p in range(order.num_samples):
                reader = int(rank_of(p, world)), int(worker_of(p, world, workers))
                lanes.setdefault(order.place(p)[0], set()).add(reader)
            assert readers_are_apart(24, world, workers) == all(
                len(readers) == 1 for readers in lanes.values()
            )


def test_a_large_set_costs_little() -> None:
    """10^5 shards of 10^4 samples: nothing that grows with the samples is ever made."""
    begin = time.process_time()
    order = EpochOrder(0, 5, np.full(10**5, 10**4), 15360, 16)
    places = {order.locate(int(p)) for p in np.linspace(0, 10**9 - 1, 2000)}
    assert len(places) == 2000
    assert time.process_time() - begin < 2
