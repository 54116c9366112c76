"""Batches are the same for every number of workers; worlds together are one stream; bad samples are replaced alike."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from shardsets import BAD_PLACES, make_damaged_set, make_set, members, picture
from vmamba_dist.config.schema import AugmentConfig, ConfigError, DataConfig, EvalConfig
from vmamba_dist.data import sources
from vmamba_dist.data.augment import TrainTransform
from vmamba_dist.data.badlog import BadLog
from vmamba_dist.data.batch import BadSample, Batch
from vmamba_dist.data.draws import sample_seeds
from vmamba_dist.data.order import EpochOrder
from vmamba_dist.data.reader import DataError
from vmamba_dist.data.shards import Index, read_index
from vmamba_dist.data.sources import RETRY_AFTER_S, LocalSource, SourceError
from vmamba_dist.data.stream import TrainStream, eval_batches
from vmamba_dist.data.workers import Room, WorkerError, Workers

AUGMENT = AugmentConfig()
SIZE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("stream"), 97)


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return read_index(folder)


def config(workers: int = 0, batch: int = 12, **fields: int) -> DataConfig:
    return DataConfig(image_size=SIZE, global_batch=batch, workers=workers, block=4, **fields)


def stream(index: Index, workers: int = 0, batch: int = 12, lanes: int = 6, **options: object) -> TrainStream:
    return TrainStream(index, config(workers, batch), AUGMENT, seed=5, lanes=lanes, **options)  # type: ignore[arg-type]


def take(count: int, made: TrainStream, *begin: object) -> list[Batch]:
    try:
        return list(islice(made.batches(*begin), count))  # type: ignore[arg-type]
    finally:
        made.close()


def assert_same(some: Iterable[Batch], others: Iterable[Batch]) -> None:
    for a, b in zip(some, others, strict=True):
        assert (a.step, a.epoch, a.keys, a.bad) == (b.step, b.epoch, b.keys, b.bad)
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def rows(batches: Iterable[Batch]) -> dict[tuple[int, int], tuple[str, int, bytes]]:
    """(step, position) → what the sample was."""
    found = {}
    for batch in batches:
        for i, position in enumerate(batch.positions.tolist()):
            at = batch.step, position
            assert at not in found
            found[at] = batch.keys[i], int(batch.labels[i]), batch.images[i].numpy().tobytes()
    return found


def test_a_batch_is_the_samples_of_its_positions(index: Index) -> None:
    batches = take(8, stream(index))
    order = EpochOrder(5, 0, index.lengths, 6, 4)
    keys = {
        (shard, i): name.removesuffix(".cls")
        for shard, entry in enumerate(index.shards)
        for i, name in enumerate(
            m.name for m, _ in members(index.root / entry.filename) if m.name.endswith(".cls")
        )
    }
    transform = TrainTransform(AUGMENT, SIZE)
    for step, batch in enumerate(batches):
        assert batch.step == step
        assert batch.positions.tolist() == list(range(12 * step, 12 * step + 12))
        assert batch.keys == [keys[order.locate(p)] for p in batch.positions.tolist()]
        assert batch.labels.tolist() == [int(key) % 5 for key in batch.keys]
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (12, 3, SIZE, SIZE))
    png = next(i for i, key in enumerate(batches[0].keys) if int(key) % 3 == 1)  # lossless
    seed = sample_seeds(5, 0, [png])[0]
    assert torch.equal(batches[0].images[png], transform(picture(int(batches[0].keys[png])), seed))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (2, 1), (3, 2)], ids=str)
def test_batches_are_equal_for_every_number_of_workers(index: Index, world: int, accumulate: int) -> None:
    """Over the end of an epoch; with 5 workers some have no share of a micro-batch."""
    for rank in {0, world - 1}:
        options = {"rank": rank, "world": world, "accumulate": accumulate}
        alone = take(10 * accumulate, stream(index, **options))
        for workers in (1, 2, 3, 5) if rank == 0 else (2,):
            assert_same(alone, take(10 * accumulate, stream(index, workers, **options)))


def test_worlds_together_are_the_single_process(index: Index) -> None:
    alone = rows(take(9, stream(index)))
    for world, accumulate, workers in ((2, 1, 0), (3, 1, 2), (6, 1, 0), (2, 3, 1)):
        together: list[Batch] = []
        for rank in range(world):
            together += take(
                9 * accumulate, stream(index, workers, rank=rank, world=world, accumulate=accumulate)
            )
        assert rows(together) == alone


def test_an_epoch_has_each_sample_once_but_the_remainder(index: Index) -> None:
    made = stream(index)
    assert (made.steps_per_epoch, made.remainder) == (8, 1)
    keys = [key for batch in take(8, made) for key in batch.keys]
    assert len(keys) == len(set(keys)) == 96


def test_a_resume_anywhere_equals_the_tail(index: Index) -> None:
    whole = take(20, stream(index))
    assert [batch.step for batch in whole] == list(range(20))
    assert [batch.epoch for batch in whole] == [0] * 8 + [1] * 8 + [2] * 4
    for step, workers in ((1, 0), (7, 2), (8, 0), (13, 3)):
        epoch, update = divmod(step, 8)
        assert_same(whole[step:], take(20 - step, stream(index, workers), epoch, update * 12))
    assert_same(whole[8:10], take(2, stream(index), 0, 96))  # the end of an epoch is the next one's beginning


def test_skipped_steps_are_left_out(index: Index) -> None:
    whole = take(14, stream(index))
    for workers in (0, 2):
        got = take(9, stream(index, workers), 0, 0, [(2, 5), (7, 9)])
        assert [batch.step for batch in got] == [0, 1, 5, 6, 9, 10, 11, 12, 13]
        assert_same(got, [whole[batch.step] for batch in got])


def test_consumed_counts_and_not_read_ahead(index: Index) -> None:
    """batches() again takes over where it is told, however far the workers were."""
    whole = take(12, stream(index))
    made = stream(index, 2)
    assert_same(whole[:3], islice(made.batches(), 3))
    assert_same(whole[3:12], islice(made.batches(0, 36), 9))
    made.close()


def test_workers_live_from_batches_to_close(index: Index) -> None:
    made = stream(index, 2)
    assert multiprocessing.active_children() == []
    made.batches()
    assert len(multiprocessing.active_children()) == 2
    made.batches()
    assert len(multiprocessing.active_children()) == 2
    made.close()
    made.close()
    assert multiprocessing.active_children() == []


def test_the_callers_random_state_is_untouched(index: Index) -> None:
    before = torch.get_rng_state()
    take(2, stream(index))
    take(2, stream(index, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_taken_again_but_never_while_any_part_is_held(index: Index, workers: int) -> None:
    whole = take(16, stream(index))
    made = stream(index, workers)
    batches = made.batches()
    views = [next(batches).images[3, 1:] for _ in range(4)]
    places = [next(batches).images.data_ptr() for _ in range(8)]
    views += [next(batches).images[3, 1:] for _ in range(4)]
    made.close()
    assert len(set(places)) <= 2
    for view, batch in zip(views, whole[:4] + whole[12:], strict=True):
        assert torch.equal(view, batch.images[3, 1:])


def test_lanes_decide_the_order_and_blocks_may_span_shards(index: Index) -> None:
    orders = {
        tuple(key for b in take(8, stream(index, lanes=lanes)) for key in b.keys) for lanes in (2, 4, 6, 96)
    }
    assert len(orders) == 4


def test_open_files_stay_few(index: Index) -> None:
    made = stream(index)
    before = len(list(Path("/proc/self/fd").iterdir()))
    next(batches := made.batches())
    for _ in islice(batches, 20):
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 16
    made.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 98}, "more than the 97 samples"),
        ({"world": 5}, "does not divide over 5 ranks"),
        ({"lanes": 98}, "more than the 97 samples"),
        ({"accumulate": 4}, "does not divide over 1 rank in 4 micro-batches"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error_before_training(
    index: Index, options: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        stream(index, **options)  # type: ignore[arg-type]


def test_an_offset_between_updates_is_refused(index: Index) -> None:
    for offset in (6, -12, 108):
        with pytest.raises(ConfigError, match="no place between updates"):
            stream(index).batches(0, offset)


def damaged(tmp_path: Path) -> Index:
    index = read_index(make_damaged_set(tmp_path))
    assert "odd-train-000001.tar" in index.warnings[0]
    return index


def replacement(order: EpochOrder, position: int) -> tuple[int, int]:
    """The rule in words of the design, straight from the order: earlier in the block, later, the block before."""
    lane, block, slot = order.place(position)

    def at(block: int, slot: int) -> tuple[int, int]:
        return order.locate((block * order.block + slot) * order.lanes + lane)

    for other in [*range(block, -1, -1), *range(block + 1, order.num_blocks(lane))]:
        last = order.block_length(lane, other) - 1
        near = min(slot, last)
        for candidate in [*range(near, -1, -1), *range(near + 1, last + 1)]:
            if at(other, candidate) not in BAD_PLACES:
                return at(other, candidate)
    raise AssertionError("a lane without good samples")


def test_bad_samples_are_replaced_by_the_rule(tmp_path: Path) -> None:
    index = damaged(tmp_path)
    whole = take(16, stream(index))
    names = [shard.filename for shard in index.shards]
    for epoch in (0, 1):
        order = EpochOrder(5, epoch, index.lengths, 6, 4)
        bad = {b.position: b for batch in whole if batch.epoch == epoch for b in batch.bad}
        assert set(bad) == {p for p in range(96) if order.locate(p) in BAD_PLACES}
        for position, sample in bad.items():
            shard, i = order.locate(position)
            assert (sample.shard, sample.index, sample.epoch) == (names[shard], i, epoch)
            shard, i = replacement(order, position)
            assert (sample.replacement_shard, sample.replacement_index) == (names[shard], i)
        reasons = {(b.shard[-5], b.index): b.reason for b in bad.values()}
        assert reasons["2", 3].startswith("no image member")
        assert reasons["3", 4].startswith("undecodable image")
        assert reasons["4", 0] == "label 9 is outside 0 … 4"
        assert "ends" in reasons["1", 4]
        assert "ends" in reasons["1", 12]
    for batch in whole:
        replaced = {b.position: b.replacement_key for b in batch.bad}
        for position, key in replaced.items():
            assert batch.keys[batch.positions.tolist().index(position)] == key
        assert all(
            int(key) % 5 == label for key, label in zip(batch.keys, batch.labels.tolist(), strict=True)
        )


def test_the_choice_is_the_same_for_every_world_and_worker(tmp_path: Path) -> None:
    index = damaged(tmp_path)
    whole = take(16, stream(index))
    for workers in (1, 2, 3):
        assert_same(whole, take(16, stream(index, workers)))
    assert_same(whole[5:], take(11, stream(index, 2), 0, 60))
    for world, workers in ((2, 0), (3, 2)):
        together: list[Batch] = []
        for rank in range(world):
            together += take(16, stream(index, workers, rank=rank, world=world))
        assert rows(together) == rows(whole)
        bad = sorted((b for batch in together for b in batch.bad), key=lambda b: (b.epoch, b.position))
        assert bad == [b for batch in whole for b in batch.bad]


def test_a_block_of_bad_samples_takes_the_block_before(tmp_path: Path) -> None:
    folder = make_set(tmp_path, 96, samples_per_shard=96)
    bounds = read_index(folder).offsets.bounds(0, 0, 96)
    os.truncate(folder / "odd-train-000000.tar", bounds[60])  # the last 36: whole blocks of a lane of 48
    index = read_index(folder)
    batches = take(8, stream(index, lanes=2))
    order = EpochOrder(5, 0, index.lengths, 2, 4)
    bad = {b.position: b for batch in batches for b in batch.bad}
    assert len(bad) == 36
    lane = next(lane for lane in (0, 1) if order.runs(lane, 0)[0].first == 48)
    assert {p % 2 for p in bad} == {lane}
    for block in range(3, 12):
        for slot in range(4):
            sample = bad[(4 * block + slot) * 2 + lane]
            assert sample.replacement_index == order.locate((4 * 2 + slot) * 2 + lane)[1]


def test_a_lane_without_any_good_sample_stops_the_run(tmp_path: Path) -> None:
    folder = make_set(tmp_path, 96, samples_per_shard=96)
    os.truncate(folder / "odd-train-000000.tar", 512)
    for workers in (0, 2):
        with pytest.raises(DataError, match="no usable sample at all"):
            take(1, stream(read_index(folder), workers))


def test_known_choices_are_used_again(tmp_path: Path) -> None:
    """The samples between a checkpoint and a kill are the same after the resume, although the set was mended."""
    index = damaged(tmp_path)
    whole = take(8, stream(index))
    known = [BadSample(**dataclasses.asdict(b)) for batch in whole for b in batch.bad]
    mended = read_index(make_set(tmp_path / "mended", 97))
    for workers in (0, 2):
        assert_same(whole, take(8, stream(mended, workers, known_bad=known)))
    assert not any(batch.bad for batch in take(8, stream(mended)))


def test_choices_of_another_order_are_no_choices(tmp_path: Path) -> None:
    """A start that left no checkpoint may be followed by one with another seed: its lines replace nothing.

    By epoch and position alone they would put the other order's replacements into this one.
    """
    index = damaged(tmp_path)
    path = tmp_path / "bad.jsonl"
    bad_log = BadLog(path)
    whole = take(8, stream(index))
    for batch in whole:
        bad_log.note(batch.bad)

    def other(workers: int, **options: object) -> list[Batch]:
        made = TrainStream(index, config(workers), AUGMENT, seed=6, lanes=6, **options)  # type: ignore[arg-type]
        return take(8, made)

    fresh = other(0)
    for workers in (0, 2):
        assert_same(fresh, other(workers, known_bad=BadLog(path).known))
    bad_log = BadLog(path)
    for batch in fresh:
        bad_log.note(batch.bad)
        bad_log.note(batch.bad)
    lines = path.read_text().splitlines()
    both = [bad for batch in whole + fresh for bad in batch.bad]
    assert lines == list(dict.fromkeys(json.dumps(dataclasses.asdict(bad)) for bad in both))
    mended = read_index(make_set(tmp_path / "mended", 97))
    assert_same(whole, take(8, stream(mended, known_bad=BadLog(path).known)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same retries, a tenth as long."""
    monkeypatch.setattr(sources, "RETRY_AFTER_S", tuple(wait_s / 10 for wait_s in RETRY_AFTER_S))


@pytest.mark.usefixtures("quick")
def test_a_failing_source_replaces_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_set(tmp_path, 97)
    index = read_index(folder)
    (folder / "odd-train-000005.tar").unlink()
    words = r"000005\.tar: bytes \d+ … \d+ could not be read in 4 attempts .* No such file"
    for workers in (0, 1):
        caplog.clear()
        with pytest.raises(SourceError, match=words):
            take(8, stream(index, workers))
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(told) == 3
        assert all("000005.tar" in text and "trying again" in text for text in told)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_comes_back_loses_nothing(tmp_path: Path, index: Index, workers: int) -> None:
    folder = make_set(tmp_path, 97)
    tar, away = folder / "odd-train-000003.tar", folder / "away"
    made = stream(read_index(folder), workers)
    tar.rename(away)
    back = threading.Timer(0.3, away.rename, [tar])
    back.start()
    assert_same(take(8, stream(index)), take(8, made))
    back.join()


def test_a_descriptor_that_went_bad_is_opened_again(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    path = index.root / index.shards[0].filename
    source = LocalSource([path])
    whole = source.read(0, 0, 2000)
    held = [
        int(at.name) for at in Path("/proc/self/fd").iterdir() if at.is_symlink() and at.readlink() == path
    ]
    assert len(held) == 1
    os.close(held[0])
    assert source.read(0, 0, 2000) == whole == path.read_bytes()[:2000]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: bytes 0 … 2000 could not be read ([Errno 9] Bad file descriptor); trying again in 0.1 s"
    ]
    source.close()


def children(batches: Iterator[Batch]) -> list[int]:
    next(batches)
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_a_dead_worker_is_an_error_and_not_a_hang(index: Index) -> None:
    made = stream(index, 2)
    batches = made.batches()
    victim = children(batches)[0]
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=rf"reader-\d \(pid {victim}\) was killed by signal 9"):
        _kill_and_read(victim, batches)
    made.close()
    assert time.monotonic() - begin < 20
    assert multiprocessing.active_children() == []


def _kill_and_read(victim: int, batches: Iterator[Batch]) -> None:
    os.kill(victim, signal.SIGKILL)
    for _ in batches:
        time.sleep(0.001)


def test_workers_outlive_the_signals_of_their_parent(index: Index) -> None:
    whole = take(8, stream(index))
    made = stream(index, 2)
    batches = made.batches()
    first = next(batches)
    for pid in [process.pid for process in multiprocessing.active_children()]:
        assert pid is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(pid, number)
    assert_same(whole, [first, *islice(batches, 7)])
    begin = time.monotonic()
    made.close()
    assert time.monotonic() - begin < 4
    assert multiprocessing.active_children() == []


PARENT = """
import os, sys, time
sys.path[:0] = [{root!r}]
from vmamba_dist.config.schema import AugmentConfig, DataConfig
from vmamba_dist.data.shards import read_index
from vmamba_dist.data.stream import TrainStream
import multiprocessing
data = DataConfig(image_size=8, global_batch=12, workers=2, block=4)
made = TrainStream(read_index({folder!r}), data, AugmentConfig(), seed=0, lanes=6)
batches = made.batches()
next(batches)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
if sys.argv[1] == "end":
    raise SystemExit(3)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["killed", "end"])
def test_workers_never_outlive_their_parent(folder: Path, how: str) -> None:
    """Killed, it takes its workers along; at an end that did not close them it does not wait for ever."""
    code = PARENT.format(root=str(Path(__file__).parents[2]), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    if how == "killed":
        process.kill()
    assert process.wait(30) == (-signal.SIGKILL if how == "killed" else 3)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def produce(worker: int, order: int, room: Room) -> Iterator[tuple[int, int]]:
    """Three items of 0, 1 and 2 rows, then what the order says."""
    for i in range(3):
        room()[:i] = 10 * worker + i
        yield i, order + i
    if order:
        raise KeyError("no such thing")


def test_items_come_from_each_worker_in_turn_until_there_are_no_more() -> None:
    pool = Workers(produce, 2, 1, (2, 5))
    pool.begin(0)
    got = [(rest, images.clone()) for images, rest in pool]
    assert [rest for rest, _ in got] == [0, 0, 1, 1, 2, 2]
    assert [images.shape for _, images in got] == [(i, 5) for i in (0, 0, 1, 1, 2, 2)]
    assert [int(images.max()) for _, images in got[2:]] == [1, 11, 2, 12]
    pool.close()


class _Owned:
    """What must end in its own process, like CUDA memory; garbage that only the collector finds."""

    def __init__(self, ended: Path) -> None:
        self.itself = self
        self.ended = ended

    def __del__(self) -> None:
        with self.ended.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_a_worker_collects_no_garbage_of_its_parent(tmp_path: Path) -> None:
    def collect(worker: int, _: None, room: Room) -> Iterator[tuple[int, int]]:
        room()
        yield 1, gc.collect()

    ended = tmp_path / "ended"
    gc.disable()
    try:
        _Owned(ended)
        pool = Workers(collect, 1, 1, (1, 1))
        pool.begin(None)
        next(pool)
        pool.close()
        assert not ended.exists()
    finally:
        gc.enable()
    gc.collect()
    assert ended.read_text() == f"{os.getpid()}\n"


def test_a_worker_logs_through_its_parent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("vmamba_dist.data.test")

    def speak(worker: int, _: None, room: Room) -> Iterator[tuple[int, int]]:
        room()
        log.warning("read %d", 7)
        yield 1, os.getpid()

    pool = Workers(speak, 1, 1, (1, 1))
    pool.begin(None)
    _, pid = next(pool)
    pool.close()
    assert [(record.getMessage(), record.process) for record in caplog.records] == [("read 7", pid)]


def test_an_error_of_a_worker_is_raised_here() -> None:
    pool = Workers(produce, 2, 4, (2, 5))
    pool.begin(7)
    assert [rest for _, rest in islice(pool, 6)] == [7, 7, 8, 8, 9, 9]
    with pytest.raises(KeyError, match="no such thing") as error:
        next(pool)
    assert error.value.__notes__ == ["in reader-0"]
    pool.close()
    with pytest.raises(WorkerError, match="closed"):
        next(pool)


@pytest.mark.parametrize(
    ("world", "batch", "workers"), [(1, 10, 0), (1, 97, 0), (2, 10, 2), (3, 7, 1), (4, 500, 0)], ids=str
)
def test_evaluation_has_each_sample_once_and_ranks_go_in_step(
    index: Index, world: int, batch: int, workers: int
) -> None:
    ranks = [
        list(eval_batches(index, EvalConfig(batch=batch), SIZE, rank=rank, world=world, workers=workers))
        for rank in range(world)
    ]
    shapes = [[tuple(b.images.shape) for b in batches] for batches in ranks]
    assert all(rank == shapes[0] for rank in shapes)
    seen = []
    for b in (b for batches in ranks for b in batches):
        assert b.mask is not None
        assert not b.bad
        assert torch.equal(b.mask, b.positions >= 0)
        assert not b.images[~b.mask].any()
        for i in b.mask.nonzero().flatten().tolist():
            seen.append((int(b.positions[i]), b.keys[i]))
            assert int(b.labels[i]) == int(b.keys[i]) % 5
    assert sorted(p for p, _ in seen) == list(range(97))
    assert len({key for _, key in seen}) == 97


def test_evaluation_is_the_same_for_every_world_and_worker(index: Index) -> None:
    def images(world: int, workers: int) -> dict[str, bytes]:
        return {
            key: b.images[i].numpy().tobytes()
            for rank in range(world)
            for b in eval_batches(index, EvalConfig(batch=9), SIZE, rank=rank, world=world, workers=workers)
            for i, key in enumerate(b.keys)
            if key
        }

    assert images(1, 0) == images(1, 2) == images(3, 1)


def test_more_ranks_than_samples_still_go_in_step(tmp_path: Path) -> None:
    few = read_index(make_set(tmp_path, 3))
    batches = [list(eval_batches(few, EvalConfig(batch=4), SIZE, rank=rank, world=5)) for rank in range(5)]
    assert [len(b) for b in batches] == [1] * 5
    assert [int(b.mask.sum()) for (b,) in batches if b.mask is not None] == [1, 1, 1, 0, 0]


def test_bad_evaluation_samples_are_masked_and_named(tmp_path: Path) -> None:
    index = damaged(tmp_path)
    for world, workers in ((1, 0), (2, 2)):
        bad: list[BadSample] = []
        good = 0
        for rank in range(world):
            for b in eval_batches(index, EvalConfig(batch=16), SIZE, rank=rank, world=world, workers=workers):
                assert b.mask is not None
                good += int(b.mask.sum())
                bad += b.bad
        assert good == 97 - len(BAD_PLACES)
        names = [shard.filename for shard in index.shards]
        assert {(b.shard, b.index) for b in bad} == {(names[shard], i) for shard, i in BAD_PLACES}
        assert len(bad) == len(BAD_PLACES)
        assert all(b.position == sum(index.lengths[: names.index(b.shard)]) + b.index for b in bad)
        assert all(b.reason and not b.replacement_shard for b in bad)


def test_a_fork_that_never_returns_is_forked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that another thread held at the fork stopped a worker for ever, and its run with it (CPython 3.11)."""
    stuck = tmp_path / "stuck"

    def hang_once() -> None:
        if stuck.exists():
            stuck.unlink()
            threading.Event().wait()

    os.register_at_fork(after_in_child=hang_once)  # cannot be taken back; does nothing without the file
    monkeypatch.setattr("vmamba_dist.data.workers.HELLO_S", 1.0)
    stuck.touch()

    def produce(worker: int, order: int, room: Room) -> Iterator[tuple[int, str]]:
        room()[:1] = order + worker
        yield 1, f"from {worker}"

    with caplog.at_level(logging.WARNING, logger="vmamba_dist"):
        pool = Workers(produce, 2, 1, (2, 5))
    try:
        pool.begin(7)
        assert [(int(images[0, 0]), rest) for images, rest in islice(pool, 2)] == [
            (7, "from 0"),
            (8, "from 1"),
        ]
    finally:
        pool.close()
    assert "reader-0" in caplog.text
    assert "forking it anew" in caplog.text
