"""Laws of a mixture's order: each source once in each of its epochs, in its share, the same for every world."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servers import shelf
from shardsets import make_set, members, rewrite
from vmamba_dist.config.schema import AugmentConfig, ConfigError, DataConfig
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.mixture import Lane, Mixture, MixtureOrder, apportion
from vmamba_dist.data.order import EpochOrder, readers_are_apart, worker_of
from vmamba_dist.data.sets import open_set
from vmamba_dist.data.shards import read_index
from vmamba_dist.data.sources import LocalSource
from vmamba_dist.data.stream import TrainStream

SIZE = 8


@st.composite
def mixtures(draw: st.DrawFn) -> list[MixtureOrder]:
    """The first epochs of a mixture."""
    count = draw(st.integers(1, 4))
    shards = st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(lambda n: sum(n) >= 4)
    lengths = [draw(shards) for _ in range(count)]
    lanes_of = [draw(st.integers(1, min(6, sum(own)))) for own in lengths]
    if sum(lanes_of) % 2:
        lanes_of[0] += 1 if lanes_of[0] < sum(lengths[0]) else -1
    lanes_of = [max(1, own) for own in lanes_of]
    samples = draw(st.integers(sum(lanes_of), 150))
    seed, block = draw(st.integers(0, 2**31 - 1)), draw(st.integers(1, 9))
    return [MixtureOrder(seed, e, lengths, lanes_of, samples, block) for e in range(draw(st.integers(1, 4)))]


@given(mixtures())
@settings(deadline=None, max_examples=60)
def test_each_source_gives_each_sample_once_in_each_of_its_epochs(epochs: list[MixtureOrder]) -> None:
    order = epochs[0]
    counted: dict[int, list[int]] = {}
    located: dict[int, list[tuple[int, int]]] = {}
    for epoch in epochs:
        for p in range(epoch.num_samples):
            source, count = epoch.count(p)
            counted.setdefault(source, []).append(count)
            located.setdefault(source, []).append(epoch.locate(p))
    for source, counts in counted.items():
        assert sorted(counts) == list(range(len(counts)))
        size, first = order._sizes[source], order._first_shard[source]
        every = sorted((first + s, i) for s, n in enumerate(order._lengths[source]) for i in range(n))
        by_count = [place for _, place in sorted(zip(counts, located[source], strict=True))]
        for at in range(0, len(by_count) - size + 1, size):
            assert sorted(by_count[at : at + size]) == every


@given(mixtures())
@settings(deadline=None, max_examples=60)
def test_an_epoch_holds_each_source_by_its_lanes(epochs: list[MixtureOrder]) -> None:
    """In every row of as many positions as there are lanes, and in the whole within one."""
    order = epochs[-1]
    sources = [order.count(p)[0] for p in range(order.num_samples)]
    rows = order.num_samples // order.lanes
    for row in range(rows):
        of_row = Counter(sources[row * order.lanes : (row + 1) * order.lanes])
        assert [of_row[s] for s in range(len(order._lanes_of))] == order._lanes_of
    for source, own in enumerate(order._lanes_of):
        assert abs(sources.count(source) - order.num_samples * own / order.lanes) < 1


@given(mixtures())
@settings(deadline=None, max_examples=60)
def test_a_place_is_the_located_sample_and_a_lane_follows_one_lane(epochs: list[MixtureOrder]) -> None:
    for order in epochs:
        follows: dict[tuple[int, int], set[Lane]] = {}
        for p in range(order.num_samples):
            lane, block, slot = order.place(p)
            places = [(run.shard, run.first + i) for run in order.runs(lane, block) for i in range(run.count)]
            assert places[order.slots(lane, block)[slot]] == order.locate(p)
            assert 0 <= block < order.num_blocks(lane)
            if p // order.lanes < order.num_samples // order.lanes:  # the last, short row is drawn anew
                follows.setdefault((order.buffer(lane), lane.epoch), set()).add(lane)
        assert all(len(lanes) == 1 for lanes in follows.values())


def test_readers_share_no_lane_of_a_source_but_where_an_epoch_ends() -> None:
    world, workers = 4, 3
    order = MixtureOrder(3, 0, [[500] * 40, [300] * 20], (36, 12), 20_000, 16)
    assert readers_are_apart(48, world, workers)
    readers: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
    for p in range(order.num_samples // 48 * 48):
        lane, _, _ = order.place(p)
        key = lane.source, lane.epoch, lane.lane
        readers.setdefault(key, set()).add((p // 2 % world, worker_of(p, world, workers)))
    assert {len(found) for found in readers.values()} == {1}


def test_the_order_is_its_own_and_stays() -> None:
    """Another seed, epoch or source is another order; sources of one shape are not read in step."""
    args = ([[40, 40], [40, 40]], (4, 4), 160, 4)

    def places(seed: int, epoch: int) -> list[tuple[int, int]]:
        return [MixtureOrder(seed, epoch, *args).locate(p) for p in range(160)]

    assert places(0, 0) == places(0, 0)
    assert len({tuple(places(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    order = MixtureOrder(0, 0, *args)
    own = [[order.locate(p) for p in range(160) if order.count(p)[0] == s] for s in (0, 1)]
    assert own[0] != [(shard - 2, i) for shard, i in own[1]]


def test_a_mixture_of_one_is_as_long_as_its_source() -> None:
    order = MixtureOrder(5, 1, [[10, 20, 30]], (6,), 60, 4)
    plain = EpochOrder(order._seeds[0], 1, [10, 20, 30], 6, 4)
    assert sorted(order.locate(p) for p in range(60)) == sorted(plain.locate(p) for p in range(60))


@settings(deadline=None)
@given(st.integers(0, 500), st.lists(st.integers(1, 100), min_size=1, max_size=9))
def test_shares_are_whole_numbers_within_one(total: int, weights: list[int]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = apportion(total, shares)
    assert sum(counts) == total
    assert all(abs(count - total * share) < 1 for count, share in zip(counts, shares, strict=True))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    return mixed(read_index(make_set(folder / "a", 97)), read_index(make_set(folder / "b", 31)))


def mixed(*parts: object, weights: tuple[float, ...] = (2.0, 1.0)) -> Mixture:
    return Mixture(parts, weights, 12)  # type: ignore[arg-type]


def stream(mixture: Mixture, workers: int = 0, **options: object) -> TrainStream:
    data = DataConfig(image_size=SIZE, global_batch=12, workers=workers, block=4)
    return TrainStream(mixture, data, AugmentConfig(), seed=5, lanes=6, **options)  # type: ignore[arg-type]


def take(count: int, made: TrainStream, *begin: object) -> list[Batch]:
    try:
        return list(islice(made.batches(*begin), count))  # type: ignore[arg-type]
    finally:
        made.close()


def rows(batches: list[Batch]) -> dict[tuple[int, int], tuple[str, int, bytes]]:
    return {
        (batch.step, p): (batch.keys[i], int(batch.labels[i]), batch.images[i].numpy().tobytes())
        for batch in batches
        for i, p in enumerate(batch.positions.tolist())
    }


def test_batches_are_the_same_for_every_world_and_worker_and_a_resume(mixture: Mixture) -> None:
    """25 batches: two epochs of the mixture and a half, in which the small source ends several times."""
    assert (mixture.num_samples, mixture.lanes_of(6)) == (120, (4, 2))
    alone = take(25, stream(mixture))
    assert rows(take(25, stream(mixture, 3))) == rows(alone)
    for world in (2, 3):
        together = [
            batch
            for rank in range(world)
            for batch in take(25, stream(mixture, rank, rank=rank, world=world))
        ]
        assert rows(together) == rows(alone)
    tail = take(14, stream(mixture), 1, 12)
    assert [batch.step for batch in tail] == list(range(11, 25))
    assert rows(tail) == rows(alone[11:])


def test_bad_samples_are_replaced_within_their_source_and_named_with_it(tmp_path: Path) -> None:
    a, b = make_set(tmp_path / "a", 97), make_set(tmp_path / "b", 31)
    path = b / "odd-train-000001.tar"
    rewrite(path, [(m, b"junk" if m.name.endswith(("jpg", "png")) else d) for m, d in members(path)])
    (b / "_info.json").write_text((b / "_info.json").read_text().replace('"bytes"', '"old_bytes"'))
    mixture = mixed(read_index(a), read_index(b))
    batches = take(25, stream(mixture))
    bad = [bad for batch in batches for bad in batch.bad]
    assert len(bad) > 10
    assert {found.shard for found in bad} == {"1:odd-train-000001.tar"}
    assert all(found.replacement_shard.startswith("1:") for found in bad)
    again = take(25, stream(mixture, 2, known_bad=bad))
    assert rows(again) == rows(batches)
    assert [found for batch in again for found in batch.bad] == bad


class Alone(LocalSource):
    """A local source that is read by one thread at a time, or fails."""

    busy: threading.Lock

    def read(self, shard: int, start: int, end: int) -> bytes:
        assert self.busy.acquire(blocking=False)
        try:
            time.sleep(0.005)
            return super().read(shard, start, end)
        finally:
            self.busy.release()


def test_a_local_source_keeps_no_store_to_one_request_at_a_time(mixture: Mixture, tmp_path: Path) -> None:
    """Once a mixture with one local source read its stores a block at a time: min(1, 16)."""
    a, b = mixture.parts

    def opened() -> Alone:
        source = Alone([b.root / shard.filename for shard in b.shards])
        source.busy = threading.Lock()
        return source

    with shelf(a.root) as server:
        store = open_set(server.url, "train", data=DataConfig(), keep=tmp_path)
        mixed_here = mixed(store, dataclasses.replace(b, opener=opened))
        server.wait_s = 0.05
        batches = take(2, stream(mixed_here))
        assert server.most_at_once >= 3  # of its four lanes
    assert rows(batches) == rows(take(2, stream(mixture)))


def test_what_cannot_be_mixed_is_named(mixture: Mixture, tmp_path: Path) -> None:
    a, b = mixture.parts
    with pytest.raises(
        ConfigError, match=r"data\.train\[1\]\.weight: a share of 0\.10% is less than one of 6 lanes"
    ):
        stream(mixed(a, b, weights=(999, 1)))
    with pytest.raises(
        ConfigError, match=r"data\.train\[1\]\.path=.* has 31 samples, fewer than its 37 of 40 lanes"
    ):
        mixed(a, b, weights=(1, 11)).check_lanes(40)
    named = [
        dataclasses.replace(part, class_names=names)
        for part, names in ((a, ("cat", "dog")), (b, ("cat", "cow")))
    ]
    with pytest.raises(ConfigError, match=r"class 1 is 'cow' there and 'dog' in data\.train\[0\]"):
        mixed(*named)
    assert mixed(a, b).fingerprint() == mixed(a, b, weights=(4, 2)).fingerprint()
    others = (mixed(b, a), mixed(a, b, weights=(1, 1)), mixed(a, a))
    assert len({made.fingerprint() for made in (mixture, *others)}) == 4


def test_the_images_are_the_sources_own(mixture: Mixture) -> None:
    """Keys tell which sample it is: 97 of one source, 31 of the other."""
    batches = take(10, stream(mixture))
    keys = Counter(key for batch in batches for key in batch.keys)
    order = mixture.order(5, 0, 6, 4)
    sources = Counter(order.count(p)[0] for p in range(120))
    assert sources == {0: 80, 1: 40}
    assert sum(keys.values()) == 120
    assert max(keys.values()) <= 3  # 31 samples 40 times, and 80 of 97
    assert all(
        torch.equal(batch.labels, torch.tensor([int(key) % 5 for key in batch.keys])) for batch in batches
    )
    assert np.isclose(
        mixture.mean_bytes,
        sum(part.mean_bytes * w for part, w in zip(mixture.parts, (2 / 3, 1 / 3), strict=True)),
    )
