"""Batches that a thread brings to the device are those that the loop would have taken without it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch

from distributed.micro import metrics, train, words
from shardsets import make_damaged_set, make_set
from vmamba_dist.config.schema import AugmentConfig, DataConfig, EvalConfig
from vmamba_dist.data.ahead import THREAD, Ahead, ahead_on_device, upload
from vmamba_dist.data.augment import DeviceTransform
from vmamba_dist.data.batch import BadSample, Batch
from vmamba_dist.data.prepare import Decoder
from vmamba_dist.data.reader import DataError
from vmamba_dist.data.shards import Index, read_index
from vmamba_dist.data.stream import TrainStream, eval_batches
from vmamba_dist.data.workers import WorkerError
from vmamba_dist.train.assemble import _shown
from vmamba_dist.train.feed import Feed
from vmamba_dist.train.progress import Progress

CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return read_index(make_set(tmp_path_factory.mktemp("ahead"), 97))


def config(workers: int, decoder: Decoder = "pil") -> DataConfig:
    return DataConfig(image_size=SIZE, global_batch=12, workers=workers, block=4, decoder=decoder)


@contextmanager
def stream(index: Index, workers: int, decoder: Decoder = "pil", pin: bool = False) -> Iterator[TrainStream]:
    made = TrainStream(
        index, config(workers, decoder), AugmentConfig(), seed=5, lanes=6, accumulate=2, pin_memory=pin
    )
    try:
        yield made
    finally:
        made.close()


@contextmanager
def ahead(
    made: TrainStream, offset: int = 0, *, decoder: Decoder = "pil", device: torch.device = CPU
) -> Iterator[Ahead]:
    """As a run on a GPU wires it."""
    batches = made.batches(0, offset)
    found = ahead_on_device(made, batches, config(0, decoder), "bicubic", device)
    try:
        yield found
    finally:
        found.close()
        assert not reading_ahead()


def reading_ahead() -> bool:
    return any(thread.name == THREAD for thread in threading.enumerate())


def plain(index: Index, count: int, decoder: Decoder = "pil") -> list[Batch]:
    with stream(index, 0, decoder) as made:
        return list(islice(made.batches(), count))


def feed_of(
    batches: Iterator[Batch],
    on_bad: Callable[[list[BadSample]], None] = lambda _: None,
    device: torch.device = CPU,
) -> Feed:
    transform = DeviceTransform(AugmentConfig(), 5, 0.1, 0)
    return Feed(batches, transform, device, Progress(device), accumulate=2, on_bad=on_bad)


def assert_same(a: Batch, b: Batch) -> None:
    assert (a.step, a.epoch, a.keys, a.bad) == (b.step, b.epoch, b.keys, b.bad)
    assert torch.equal(a.positions, b.positions)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.images.cpu(), b.images.cpu())
    assert a.images.stride() == b.images.stride()


def eventually(found: Callable[[], bool]) -> bool:
    begin = time.monotonic()
    while not found() and time.monotonic() - begin < 20:
        time.sleep(0.01)
    return found()


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_without_it(index: Index, workers: int, decoder: Decoder) -> None:
    """Over an epoch's end, all of them held to the last: no memory is taken again while a batch lies in it."""
    expected = plain(index, 20, decoder)
    with stream(index, workers, decoder) as made, ahead(made, decoder=decoder) as batches:
        for a, b in zip(list(islice(batches, 20)), expected, strict=True):
            assert_same(a, b)


def test_the_step_gets_the_same_inputs(index: Index) -> None:
    with stream(index, 2) as made, ahead(made) as batches:
        for a, b in zip(feed_of(batches), feed_of(iter(plain(index, 6))), strict=False):
            assert (a.step, a.keys) == (b.step, b.keys)
            for tensor in ("images", "targets", "positions"):
                assert torch.equal(getattr(a, tensor), getattr(b, tensor))


def test_an_autopsy_finds_the_last_batches_on_the_host(index: Index) -> None:
    """On the device those of two steps of many micro-batches would take memory that a plan gives to the model."""
    expected = plain(index, 6)
    there = torch.device("meta")  # as far from the host as a device can be without a GPU
    batches = Ahead(iter(expected), lambda batch: upload(batch, there), CPU)
    feed = Feed(
        batches, lambda batch, _: (batch.images, batch.labels), CPU, Progress(CPU), accumulate=2, on_bad=len
    )  # type: ignore[arg-type]
    assert all(inputs.images.is_meta for inputs in islice(feed, 6))
    for a, b in zip(feed.recent, expected[2:], strict=True):
        assert_same(a, b)
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_goes_on_where_the_loop_was_and_not_the_thread(index: Index, workers: int) -> None:
    """12 samples an update of two micro-batches: three updates are 36, however many lie ready."""
    expected = plain(index, 12)
    with stream(index, workers) as made:
        with ahead(made) as batches:
            for a, b in zip(islice(batches, 6), expected[:6], strict=True):
                assert_same(a, b)
        with ahead(made, 36) as batches:
            for a, b in zip(islice(batches, 6), expected[6:], strict=True):
                assert_same(a, b)


def test_it_reads_while_the_step_computes_and_no_further_than_asked(index: Index) -> None:
    """Two lie ready and one is in hand; what the loop has waited is what it waited for, not what the thread took."""
    begun: list[int] = []
    gate = threading.Event()

    def work(batch: Batch) -> Batch:
        begun.append(batch.step)
        assert gate.wait(20)
        return batch

    batches = Ahead(iter(plain(index, 8)), work, CPU)
    feed = feed_of(batches)
    try:
        threading.Timer(0.3, gate.set).start()
        next(feed)
        assert 0.2 < feed.tally()[0] < 10
        assert eventually(lambda: len(begun) == 4)
        time.sleep(0.2)
        assert len(begun) == 4
        gate.clear()  # whoever makes the fifth stands here
        next(feed)
        next(feed)
        assert feed.tally()[0] < 0.2
    finally:
        gate.set()
        batches.close()


def test_no_batch_stays_when_the_next_is_taken(index: Index) -> None:
    """The first is looked at for TensorBoard. Held by that, its images would take a GPU's memory for ever."""
    with stream(index, 0) as made:
        batches = _shown(made.batches(), None, 0)
        first = weakref.ref(next(batches).images)
        next(batches)
        assert first() is None


def test_a_bad_sample_counts_once_its_batch_is_taken(tmp_path: Path) -> None:
    damaged = read_index(make_damaged_set(tmp_path))
    expected = plain(damaged, 32)
    assert sum(bool(batch.bad) for batch in expected) > 3
    noted: list[BadSample] = []
    with stream(damaged, 2) as made, ahead(made) as batches:
        feed = feed_of(batches, noted.extend)
        for i in range(len(expected)):
            assert noted == [bad for batch in expected[:i] for bad in batch.bad]
            next(feed)
            time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_data_are_raised_as_without_it(tmp_path: Path, workers: int) -> None:
    folder = make_set(tmp_path, 96, samples_per_shard=96)
    os.truncate(folder / "odd-train-000000.tar", 512)
    with (
        stream(read_index(folder), workers) as made,
        ahead(made) as batches,
        pytest.raises(DataError, match="no usable sample at all"),
    ):
        next(feed_of(batches))


def test_a_dead_reader_is_an_error_after_the_batches_that_were_read(index: Index) -> None:
    expected = plain(index, 1)
    with stream(index, 2) as made, ahead(made) as batches:
        assert_same(next(batches), expected[0])
        victim = multiprocessing.active_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(WorkerError, match=rf"reader-\d \(pid {victim}\) was killed by signal 9"):
            list(batches)
        with pytest.raises(RuntimeError, match="closed"):
            next(batches)


def test_an_error_of_the_work_is_raised_where_its_batch_would_have_been_taken(index: Index) -> None:
    def fail(batch: Batch) -> Batch:
        if batch.step == 1:
            raise ValueError("in the thread")
        return batch

    with stream(index, 0) as made:
        batches = Ahead(made.batches(), fail, CPU)
        assert [next(batches).step, next(batches).step] == [0, 0]
        with pytest.raises(ValueError, match="in the thread"):
            next(batches)
        batches.close()


@pytest.mark.timeout(60)
@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a machine without CUDA answers")
def test_a_device_that_cannot_be_had_is_an_error_and_no_hang() -> None:
    """The thread's stream is the first thing that a sick device refuses. Its error is raised like any other; were it
    the thread's own, the loop would wait for batches for ever."""
    batches = Ahead(iter([]), lambda batch: batch, torch.device("cuda", 0))
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA|Stream"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_closing_ends_the_thread_however_far_it_is(index: Index, workers: int, taken: int) -> None:
    with stream(index, workers) as made:
        with ahead(made) as batches:
            list(islice(batches, taken))
        assert not reading_ahead()
        batches.close()
    assert multiprocessing.active_children() == []


def test_closing_does_not_wait_for_readers_that_stand_still(index: Index) -> None:
    """A stalled source would hold a stop, its checkpoint saved, for minutes: longer than Slurm waits."""
    with stream(index, 2) as made:
        with ahead(made) as batches:
            next(batches)
            readers = [process.pid for process in multiprocessing.active_children()]
            signal_all(readers, signal.SIGSTOP)
            while comes_soon(batches):  # what was read ahead
                next(batches)
            go_on = threading.Timer(20, signal_all, (readers, signal.SIGCONT))  # else a failure is a hang
            go_on.start()
            begin = time.monotonic()
        assert time.monotonic() - begin < 5
        go_on.cancel()
    assert multiprocessing.active_children() == []


def signal_all(pids: list[int | None], number: signal.Signals) -> None:
    for pid in pids:
        assert pid is not None
        os.kill(pid, number)


def comes_soon(batches: Ahead) -> bool:
    for _ in range(50):
        if not batches._ready.empty():
            return True
        time.sleep(0.01)
    return False


def test_evaluation_forks_readers_of_its_own_meanwhile(index: Index) -> None:
    """Its readers are forked while the thread lives, and read what they read without it."""
    evaluate = EvalConfig(batch=16)
    expected = list(eval_batches(index, evaluate, SIZE))
    with stream(index, 2) as made, ahead(made) as batches:
        next(batches)
        for a, b in zip(eval_batches(index, evaluate, SIZE, workers=2), expected, strict=True):
            assert_same(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    cuda = torch.device("cuda", 0)

    @pytest.mark.parametrize("decoder", ["pil", "torchvision"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_and_inputs_are_those_without_it(
        self, index: Index, workers: int, decoder: Decoder
    ) -> None:
        expected = plain(index, 20, decoder)
        with stream(index, workers, decoder, pin=True) as made:
            inputs = [each.images for each in islice(feed_of(made.batches(), device=self.cuda), 20)]
        with (
            stream(index, workers, decoder, pin=True) as made,
            ahead(made, decoder=decoder, device=self.cuda) as batches,
        ):
            feed = feed_of(batches, device=self.cuda)
            for i, each in enumerate(islice(feed, 20)):
                assert_same(feed.recent[-1], expected[i])
                assert torch.equal(each.images, inputs[i])
                assert torch.equal(feed.prepare(feed.recent[-1]).images, inputs[i])
        with (
            stream(index, workers, decoder, pin=True) as made,
            ahead(made, decoder=decoder, device=self.cuda) as batches,
        ):
            for batch, there in zip(expected, batches, strict=False):
                assert there.images.is_cuda
                assert_same(batch, there)

    def test_no_memory_is_taken_again_before_its_copy_has_ended(self, index: Index) -> None:
        """The device is made late: the copies by 20 ms each, the step by 20 ms more; the host waits for neither."""
        expected = plain(index, 24)

        def late(batch: Batch) -> Batch:
            torch.cuda._sleep(40_000_000)
            return upload(batch, self.cuda)

        with stream(index, 2, pin=True) as made:
            batches = Ahead(made.batches(), late, self.cuda, interrupt=made.interrupt)
            kept = []
            for batch in islice(batches, 24):
                torch.cuda._sleep(40_000_000)
                kept.append(batch.images.int() + 1)  # the batch itself goes, and its memory to another
                del batch
            batches.close()
        for a, b in zip(kept, expected, strict=True):
            assert torch.equal(a.cpu(), b.images.int() + 1)

    def test_a_run_leaves_no_thread_and_goes_on_as_if_unbroken(self, tmp_path: Path) -> None:
        images = make_set(tmp_path / "images", count=64, num_classes=7)
        few = ["data.global_batch=4", "eval.split=train", "data.workers=2"]
        assert train(words(images, tmp_path / "unbroken", *few, "run.max_steps=4")) == "paused"
        assert not reading_ahead()
        for last in (2, 4):
            assert train(words(images, tmp_path / "stopped", *few, f"run.max_steps={last}")) == "paused"
            assert not reading_ahead()
        assert [line["loss"] for line in metrics(tmp_path / "stopped")] == [
            line["loss"] for line in metrics(tmp_path / "unbroken")
        ]
