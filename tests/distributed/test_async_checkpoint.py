"""Saving while training goes on: what was is saved, a failure stops nothing but its save, a kill is harmless."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed.micro import metrics, train, words
from distributed.test_checkpoint import meta, poisoned, same_bits, values
from distributed.world import ROOT, WorldError, world
from shardsets import make_set
from vmamba_dist.checkpoint import store
from vmamba_dist.checkpoint.chunks import Part, Staging
from vmamba_dist.checkpoint.save import Checkpoints
from vmamba_dist.checkpoint.store import CheckpointError
from vmamba_dist.config.schema import CheckpointConfig
from vmamba_dist.core import dist as core
from vmamba_dist.core.rundir import RunDir, Superseded

pytestmark = pytest.mark.distributed


@contextmanager
def joined(path: Path, *, timeout_s: float = 30, **options: object) -> Iterator[Checkpoints]:
    """The checkpoints of a run directory, for all ranks; closed as a run closes them."""
    with core.world("cpu") as place:
        run = RunDir.acquire(path, wait_s=5) if place.is_main else None
        run = run or RunDir.attach(path, 1)
        run.attempt = core.from_main(run.attempt)
        checkpoints = Checkpoints(run, CheckpointConfig(**options), place, timeout_s=timeout_s)  # type: ignore[arg-type]
        try:
            yield checkpoints
        finally:
            checkpoints.close()
            run.release()


class Gate:
    """Holds a save up at a function of the store, until it is opened; 20 s at most."""

    def __init__(self, name: str) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.function = getattr(store, name)

    def __call__(self, path: Path) -> object:
        self.reached.set()
        assert self.opened.wait(20), "nobody opened the gate"
        return self.function(path)


@contextmanager
def gate(at: str = "describe") -> Iterator[Gate]:
    """A gate before the hashing of what was written, or `at` another function of the store."""
    made = Gate(at)
    setattr(store, at, made)
    try:
        yield made
    finally:
        made.opened.set()
        setattr(store, at, made.function)


def names(path: Path) -> set[str]:
    return {p.name for p in (path / "checkpoints").iterdir()}


def load_newest(path: Path) -> tuple[int, bool]:
    with joined(path) as kept:
        found = kept.newest()
        assert found is not None
        tensors = poisoned()
        kept.load(found, tensors)
        return found.meta.step, same_bits(tensors, values(found.meta.step))


# What is saved


def train_while_saving(path: Path) -> tuple[int, bool, set[str]]:
    """Ten steps with their own collectives before anything is written, and ten while it is."""
    tensors = values(1)
    steps = 0
    with joined(path) as kept, gate("prepare") as before, gate("describe") as during:
        kept.save(tensors, meta(1, kept.world.size), wait=False)
        for gate_of_ten in (before, during):
            for _ in range(10):
                for tensor in tensors.values():
                    tensor.add_(1)
                loss = torch.ones(3)
                dist.all_reduce(loss)
                steps += int(loss[0]) == kept.world.size
            if gate_of_ten is during:
                assert during.reached.wait(10)
                unfinished = names(path)
            gate_of_ten.opened.set()
        kept.drain()
        found = kept.newest()
        assert found is not None
        loaded = poisoned()
        kept.load(found, loaded)
        assert not same_bits(tensors, values(1))
        return steps, same_bits(loaded, values(1)), unfinished


def test_training_goes_on_during_the_write_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    assert world(3).run(train_while_saving, tmp_path) == [(20, True, {"step-000000001.tmp"})] * 3
    assert names(tmp_path) == {"step-000000001"}
    assert world(2).run(load_newest, tmp_path) == [(1, True)] * 2


def save_five_times(path: Path) -> tuple[list[int], int, int]:
    addresses = []
    sizes = set()
    with joined(path, keep=5) as kept:
        kept.reserve(values(1))
        for step in range(1, 6):
            kept.save(values(step), meta(step, kept.world.size), wait=False)
            buffers = kept._staging._buffers
            addresses.append(hash(tuple(sorted(tensor.data_ptr() for tensor in buffers))))
            sizes.add(kept._staging.nbytes)
        (size,) = sizes
        return addresses, size, sum(t.nbytes for t in values(1).values())


def test_buffers_are_used_again_and_hold_only_what_this_rank_writes(tmp_path: Path) -> None:
    for ranks in (1, 4):
        path = tmp_path / str(ranks)
        results = world(ranks).run(save_five_times, path)
        for addresses, size, total in results:
            assert len(set(addresses)) == 1
            assert size <= total / ranks * 1.5 + 64 * len(values(1))
        assert names(path) == {f"step-{step:09d}" for step in range(1, 6)}
        assert world(2).run(load_newest, path) == [(5, True)] * 2


class Net(nn.Module):
    """Rows that no world size divides, some fewer than the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 33)
        self.norm = nn.LayerNorm(5)
        self.outer = nn.Linear(33, 1)
        self.row = nn.Parameter(torch.empty(3, 2, 2))


LAYOUTS = {"plain": (), "fsdp": (4,), "hsdp": (2, 2)}


def sharded_values(seed: int, layout: tuple[int, ...]) -> dict[str, Tensor]:
    """The same values for every layout: DTensors as FSDP2 makes them, with plain tensors beside them."""
    net = Net()
    draw = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=draw)
    if layout:
        names_of = ("replicate", "shard")[-len(layout) :]
        mesh = init_device_mesh("cpu", layout, mesh_dim_names=names_of)
        fully_shard(net.inner, mesh=mesh)
        fully_shard(net, mesh=mesh)
    tensors = {f"model.{name}": t for name, t in net.state_dict().items()}
    tensors |= {f"optim.{name}.exp_avg": t * 2 for name, t in net.state_dict().items()}
    return tensors | {"optim.step": torch.tensor(float(seed)), "model.plain": torch.full((9,), float(seed))}


def save_sharded(path: Path, layout: str) -> None:
    with joined(path) as kept:
        tensors = sharded_values(5, LAYOUTS[layout])
        if layout != "plain":
            assert isinstance(tensors["model.inner.weight"], DTensor)
        kept.save(tensors, meta(5, kept.world.size), wait=False)
        for tensor in tensors.values():  # the shards themselves change at once
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)


def load_sharded(path: Path) -> list[str]:
    """Names of what is not bit-equal."""
    with joined(path) as kept:
        found = kept.newest()
        assert found is not None
        tensors = sharded_values(6, (kept.world.size,) if kept.world.size > 1 else ())
        kept.load(found, tensors)
        expected = sharded_values(5, ())
        full = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in tensors.items()
        }
        return [name for name in expected if not torch.equal(full[name], expected[name])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_sharded_by_four_and_loaded_by_one_to_four_is_bit_equal(tmp_path: Path, layout: str) -> None:
    world(4).run(save_sharded, tmp_path, layout)
    assert not store.verify_checkpoint(tmp_path / "checkpoints" / "step-000000005")
    for size in (1, 2, 3, 4):
        assert world(size).run(load_sharded, tmp_path) == [[]] * size


def share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every W-th whole tensor, as an engine has it that gathers each on one rank."""
    rank, size = core.rank_and_size()
    return {name: tensors[name] for name in sorted(tensors)[rank::size]}


def save_shares(path: Path) -> None:
    with joined(path) as kept:
        kept.save(share(values(3)), meta(3, kept.world.size), wait=False)


def load_shares(path: Path, change: str = "") -> bool | str:
    with joined(path) as kept:
        found = kept.newest()
        assert found is not None
        mine = share(poisoned())
        if change == "missing" and kept.world.rank == 1:
            mine["model.new"] = torch.zeros(2)
        if change == "unused":
            mine.pop("model.half", None)
        try:
            kept.load(found, mine)
        except CheckpointError as error:
            return str(error)
        return same_bits(mine, share(values(3)))


def test_tensors_that_only_some_ranks_have(tmp_path: Path) -> None:
    world(4).run(save_shares, tmp_path)
    for size in (1, 3):
        assert world(size).run(load_shares, tmp_path) == [True] * size
    # And as whole replicas of everything.
    index = tmp_path / "checkpoints" / "step-000000003"
    assert len(store.read_manifest(index).files) == 5
    for change, told in (("missing", "it lacks model.new"), ("unused", "nothing here takes its model.half")):
        for message in world(3).run(load_shares, tmp_path, change):
            assert told in str(message)


def save_two(path: Path) -> list[set[str]]:
    seen = []
    with joined(path) as kept, gate() as held_up:
        kept.save(values(1), meta(1, kept.world.size), wait=False)
        seen.append(names(path))
        threading.Timer(0.3, held_up.opened.set).start()
        kept.save(values(2), meta(2, kept.world.size), wait=False)
        seen.append(names(path) - {"step-000000002", "step-000000002.tmp"})
    seen.append(names(path))
    return seen


def test_a_second_save_waits_for_the_first_and_close_for_the_second(tmp_path: Path) -> None:
    results = world(2).run(save_two, tmp_path)
    for _, after_second_began, after_close in results:
        assert after_second_began == {"step-000000001"}
        assert after_close == {"step-000000001", "step-000000002"}


def fail_while_saving(path: Path) -> None:
    with joined(path) as kept, gate() as held_up:
        kept.save(values(1), meta(1, kept.world.size), wait=False)
        threading.Timer(0.2, held_up.opened.set).start()
        raise FloatingPointError("the loss is not finite")


def test_an_exception_in_training_lets_the_save_in_flight_finish(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        world(2).run(fail_while_saving, tmp_path)
    assert world(2).run(load_newest, tmp_path) == [(1, True)] * 2


def test_without_async_save_no_copy_is_made(tmp_path: Path) -> None:
    with joined(tmp_path, async_save=False) as kept:
        tensors = values(1)
        kept.save(tensors, meta(1, 1), wait=False)
        assert kept._staging.nbytes == 0
        assert names(tmp_path) == {"step-000000001"}  # written when save returns
    assert load_newest(tmp_path) == (1, True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("images") / "set", count=64)


def train_and_note_memory(args: list[str]) -> list[int]:
    """The bytes that were there for copies when each copy began, and at the end of training."""
    noted = []
    copy, close = Staging.copy, Checkpoints.close

    def noting_copy(self: Staging, parts: Sequence[Part]) -> list[Part]:
        noted.append(self.nbytes)
        return copy(self, parts)

    def noting_close(self: Checkpoints) -> None:
        noted.append(self._staging.nbytes)
        close(self)

    with patch.object(Staging, "copy", noting_copy), patch.object(Checkpoints, "close", noting_close):
        train(args)
    return noted


def test_training_begins_with_the_memory_for_copies_where_it_will_copy(tmp_path: Path, images: Path) -> None:
    """Nothing called `reserve`, so the first save halted training for as long as the system took to find memory."""
    fields = ["data.global_batch=4", "eval.split=train", "eval.every_epochs=0", "schedule.epochs=1"]
    end = "run.max_steps=8"
    saving = train_and_note_memory(words(images, tmp_path / "saving", *fields, end))
    assert len(saving) == 2  # step 4's, and the end
    assert saving[0] > 0
    assert saving[0] == saving[1]
    others = ("checkpoint.every_steps=8", "checkpoint.async_save=false")
    for number, other in enumerate(others):
        assert train_and_note_memory(words(images, tmp_path / str(number), *fields, end, other)) == [0]


# What goes wrong


@contextmanager
def small_file_system(place: Path, size: str = "1m") -> Iterator[None]:
    """A file system of 1 MiB, or `size`, at a new folder; root alone can mount one."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=20).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small"):
        yield tmp_path / "small"


def big(step: int) -> dict[str, Tensor]:
    """64 KiB in one tensor, beside the small ones."""
    return values(step) | {"model.big": torch.full((128, 128), float(step))}


def fill_up(path: Path, room: int) -> None:
    """Leave `room` bytes on the file system."""
    free = os.statvfs(path)
    with (path / "ballast").open("wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))


def messages_of(logger: str) -> tuple[list[str], logging.Handler]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    return messages, handler


def save_on_a_full_disk(path: Path, room: int) -> tuple[list[int], list[str], str, str]:
    """(failures after each save, what was logged, the error at the third in a row, that of a final save)."""
    counts = []
    logged, handler = messages_of("vmamba_dist")
    with joined(path / "run", max_failures=3) as kept:
        size = kept.world.size

        def save(step: int, *, full: bool) -> None:
            if kept.world.is_main:
                (path / "ballast").unlink(missing_ok=True)
                if full:
                    fill_up(path, room)
            core.gather(None)
            kept.save(big(step), meta(step, size), wait=False)
            kept.drain()
            counts.append(kept.failures)
            if kept.world.is_main:  # it is rank 0 that cleans up
                left = names(path / "run")
                assert "step-000000001" in left
                assert not any(name.endswith(".tmp") for name in left)

        for step, full in ((1, False), (2, True), (3, True), (4, False), (5, True), (6, True)):
            save(step, full=full)
        stopped = final = ""
        try:
            save(7, full=True)
        except CheckpointError as error:
            stopped = str(error)
        try:  # it is worth a try all the same
            kept.save(big(8), meta(8, size), wait=True)
        except CheckpointError as error:
            final = str(error)
        if kept.world.is_main:
            (path / "ballast").unlink()
        core.gather(None)
        kept.save(big(9), meta(9, size), wait=True)
        counts.append(kept.failures)
    logging.getLogger("vmamba_dist").removeHandler(handler)
    return counts, logged, stopped, final


@pytest.mark.parametrize("room", [0, 40_000], ids=["at-once", "within-a-tensor"])
def test_a_full_disk_stops_the_save_and_nothing_else_until_too_many(small_disk: Path, room: int) -> None:
    results = world(2).run(save_on_a_full_disk, small_disk, room)
    for counts, _, stopped, final in results:
        assert counts == [0, 1, 2, 0, 1, 2, 0]
        for part in ("No space left on device", "free space there", "/run/checkpoints", "rank "):
            assert part in final
            assert part in stopped
        assert "could not" in final
        assert "3 saves in a row failed, and checkpoint.max_failures=3" in stopped
    told = results[0][1]
    assert [line.split(":")[0] for line in told[:2]] == [
        "step 2 was not saved (failure 1 in a row; the run stops at checkpoint.max_failures=3)",
        "step 3 was not saved (failure 2 in a row; the run stops at checkpoint.max_failures=3)",
    ]
    assert results[1][1] == []  # said once, by rank 0
    assert names(small_disk / "run") == {f"step-{step:09d}" for step in (1, 4, 9)}


@pytest.mark.parametrize(
    ("fields", "steps", "words_of_it"),
    [
        (["run.max_steps=9", "checkpoint.max_failures=2"], 6, "2 saves in a row failed"),
        (["run.max_steps=9", "checkpoint.max_failures=9"], 9, "rank 0 could not write"),
    ],
    ids=["too-many", "the-last"],
)
def test_a_run_whose_disk_is_full_trains_on_until_too_many_failed_or_it_ends(
    tmp_path: Path, images: Path, fields: list[str], steps: int, words_of_it: str
) -> None:
    """A checkpoint every 2 steps, and no room for one: the third save learns of two failures."""
    run_dir = tmp_path / "run"
    few = [
        "checkpoint.every_steps=2",
        "data.global_batch=4",
        "eval.split=train",
        "eval.every_epochs=0",
        "schedule.epochs=2",
    ]
    with small_file_system(run_dir / "checkpoints"):
        with pytest.raises(CheckpointError, match=words_of_it) as caught:
            train(words(images, run_dir, *few, *fields))
        assert "No space left on device; free space there" in str(caught.value)
        assert names(run_dir) == set()
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, steps + 1))
    assert (run_dir / "train.log").read_text().count("was not saved (failure 1 in a row") == 1


def save_to_a_full_device(path: Path) -> str:
    """Rank 1's file is /dev/full: every byte is refused, for whatever user runs this."""
    prepare = store.prepare

    def with_full_device(final: Path) -> Path:
        made = prepare(final)
        (made / "__1_0.distcp").symlink_to("/dev/full")
        return made

    with joined(path) as kept:
        kept.save(values(1), meta(1, kept.world.size))
        store.prepare = with_full_device
        try:
            kept.save(values(2), meta(2, kept.world.size), wait=False)
            kept.drain()
            return f"{kept.failures} {kept._failure}"
        finally:
            store.prepare = prepare


def test_the_rank_whose_disk_is_full_is_named(tmp_path: Path) -> None:
    for message in world(3).run(save_to_a_full_device, tmp_path):
        assert message.startswith(f"1 rank 1 could not write {tmp_path}")
        assert "No space left on device; free space there" in message
    assert names(tmp_path) == {"step-000000001"}


def save_twice_around(path: Path, spoil: Callable[[Path], None], mend: Callable[[Path], None]) -> list[str]:
    told = []
    with joined(path) as kept:
        kept.save(values(1), meta(1, kept.world.size))
        for step, change in ((2, spoil), (3, mend)):
            if kept.world.is_main:
                change(path / "checkpoints")
            core.gather(None)
            kept.save(values(step), meta(step, kept.world.size), wait=False)
            kept.drain()
            told.append(f"{kept.failures} {kept._failure}")
    return told


def put_a_file_in_its_place(checkpoints: Path) -> None:
    checkpoints.rename(checkpoints.with_name("aside"))
    checkpoints.write_text("a file")


def put_it_back(checkpoints: Path) -> None:
    checkpoints.unlink()
    checkpoints.with_name("aside").rename(checkpoints)


def mount_read_only(checkpoints: Path) -> None:
    for options in (
        ["--bind", str(checkpoints), str(checkpoints)],
        ["-o", "remount,ro,bind", str(checkpoints)],
    ):
        subprocess.run(["mount", *options], check=True, timeout=20)


def unmount(checkpoints: Path) -> None:
    subprocess.run(["umount", str(checkpoints)], check=True, timeout=20)


@pytest.mark.parametrize(
    ("spoil", "mend", "words"),
    [
        (put_a_file_in_its_place, put_it_back, "something else has a directory's place there"),
        pytest.param(
            mount_read_only,
            unmount,
            "Read-only file system",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount"),
        ),
    ],
    ids=["a-file-in-its-place", "read-only"],
)
def test_a_directory_that_cannot_be_written_is_a_clear_error(
    tmp_path: Path, spoil: Callable[[Path], None], mend: Callable[[Path], None], words: str
) -> None:
    try:
        results = world(2).run(save_twice_around, tmp_path, spoil, mend)
    finally:
        if (tmp_path / "checkpoints").is_mount():
            unmount(tmp_path / "checkpoints")
    for failed, mended in results:
        assert failed.startswith("1 rank 0 could not prepare")
        assert words in failed
        assert mended == "0 None"
    assert names(tmp_path) == {"step-000000001", "step-000000003"}


def save_until_overtaken(path: Path) -> list[str]:
    told = []
    with joined(path) as kept, gate() as held_up:
        kept.save(values(1), meta(1, kept.world.size), wait=False)
        later = None
        if kept.world.is_main:
            kept.run.lock.unlink()
            later = RunDir.acquire(path, wait_s=0)
        core.gather(None)
        held_up.opened.set()
        for step in (2, 3):
            try:
                kept.save(values(step), meta(step, kept.world.size), wait=False)
            except Superseded as error:
                told.append(str(error))
        if later is not None:
            later.release()
    return told


def test_a_save_overtaken_while_it_is_written_ends_the_run(tmp_path: Path) -> None:
    """Both at the next save, which learns what became of the one in flight, and at one that begins too late."""
    for told in world(2).run(save_until_overtaken, tmp_path):
        assert len(told) == 2
        assert all("attempt 2" in message for message in told)
    assert store.list_checkpoints(tmp_path / "checkpoints") == []


def test_a_defect_in_the_background_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def broken(file: Path) -> store.FileRecord:
        raise LookupError(file.name)

    describe = store.describe
    with joined(tmp_path) as kept:
        store.describe = broken
        try:
            kept.save(values(1), meta(1, 1), wait=False)
            with pytest.raises(LookupError, match="__0_0"):
                kept.save(values(2), meta(2, 1), wait=False)
        finally:
            store.describe = describe
        assert kept.failures == 0


@contextmanager
def slow(at: str, seconds: float, rank: int) -> Iterator[None]:
    """One rank takes so long for a function of the store."""
    function = getattr(store, at)

    def slowly(*args: Path) -> object:
        if core.rank_and_size()[0] == rank:
            time.sleep(seconds)
        return function(*args)

    setattr(store, at, slowly)
    try:
        yield
    finally:
        setattr(store, at, function)


def save_slowly(
    path: Path, at: str, seconds: float, rank: int, wait: bool
) -> tuple[list[int], list[str], str]:
    """(failures after the saves, what was logged, the error of the slow save where it was waited for)."""
    logged, handler = messages_of("vmamba_dist")
    failures = []
    raised = ""
    with joined(path, timeout_s=3, keep=5) as kept:
        kept.save(values(1), meta(1, kept.world.size))
        # What training itself waits for has the same limit.
        dist.set_timeout(timedelta(seconds=3), dist.group.WORLD)
        with slow(at, seconds, rank):
            try:
                kept.save(values(2), meta(2, kept.world.size), wait=wait)
                kept.drain()
            except CheckpointError as error:
                raised = str(error)
            failures.append(kept.failures)
        for step in (3, 4):
            kept.save(values(step), meta(step, kept.world.size), wait=False)
            kept.drain()
            failures.append(kept.failures)
    logging.getLogger("vmamba_dist").removeHandler(handler)
    return failures, logged, raised


@pytest.mark.parametrize(
    ("at", "rank", "wait"),
    [
        ("describe", 2, False),
        pytest.param("describe", 0, True, marks=pytest.mark.slow),
        pytest.param("publish", 0, False, marks=pytest.mark.slow),
    ],
)
def test_a_save_slower_than_the_limit_is_a_counted_failure_that_names_the_slow_rank(
    tmp_path: Path, at: str, rank: int, wait: bool
) -> None:
    """gloo's error used to end the run, uncounted and without a name, and no later save had a group to talk in."""
    results = world(3).run(save_slowly, tmp_path, at, 4.5, rank, wait)
    for failures, _, raised in results:
        assert failures == [1, 0, 0]
        assert bool(raised) == wait
        assert raised in results[0][1][-1]
    told = results[0][1]
    assert [line.split(":")[0] for line in told][-1].startswith("step 2 was not saved (failure 1 in a row")
    assert re.search(
        rf": rank {rank} took [4-6](\.\d+)? s to (write|publish) {tmp_path}/checkpoints/\S+, "
        r"and the others wait no longer than parallel.timeout_s=3: look at the storage there",
        told[-1],
    )
    assert results[1][1] == []
    assert names(tmp_path) - {"step-000000002"} == {"step-000000001", "step-000000003", "step-000000004"}
    assert not (tmp_path / "checkpoints" / "step-000000002").exists() or at == "publish"


def save_and_never_come(path: Path) -> str:
    """A rank whose storage hangs for longer than anybody waits."""
    with joined(path, timeout_s=1) as kept, slow("describe", 6, 1):
        kept.save(values(1), meta(1, kept.world.size), wait=False)
        try:
            kept.save(values(2), meta(2, kept.world.size), wait=False)
        except CheckpointError as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_a_rank_that_never_ends_its_part_ends_the_run_and_is_named(tmp_path: Path) -> None:
    told = world(3).run(save_and_never_come, tmp_path)
    assert len(set(told)) == 1
    assert re.match(
        rf"rank 1 is still at work on {tmp_path}/checkpoints/step-000000001, [\d.]+ s after others gave up",
        told[0],
    )
    assert "raise parallel.timeout_s=1" in told[0]


# Kills


def save_and_hang(path: Path, reports: int, step: int) -> None:
    """Save one checkpoint, then hold the next one up in the background for ever."""
    with joined(path) as kept:
        kept.save(values(step), meta(step, 1))
        with gate() as held_up:
            kept.save(values(step + 1), meta(step + 1, 1), wait=False)
            assert held_up.reached.wait(20)
            os.write(reports, b"writing\n")
            signal.pause()


def kill_during_write(path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_and_hang(path, writing, 4)
    os.close(writing)
    with os.fdopen(reading) as stream:
        assert stream.readline() == "writing\n"
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_kill_during_the_write_leaves_the_one_before_and_the_next_start_goes_on(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from distributed.test_async_checkpoint import kill_during_write;"
        "kill_during_write(Path(sys.argv[1]))"
    )
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60, env=environ)
    assert names(tmp_path) == {"step-000000004", "step-000000005.tmp"}
    assert load_newest(tmp_path) == (4, True)
    with joined(tmp_path) as kept:
        kept.save(values(5), meta(5, 1), wait=False)
    assert names(tmp_path) == {"step-000000004", "step-000000005"}
    assert load_newest(tmp_path) == (5, True)


def die_while_both_write(path: Path, victim: int) -> None:
    with joined(path) as kept:
        kept.save(values(1), meta(1, 2), wait=False)
        kept.drain()
        with gate() as held_up:
            kept.save(values(2), meta(2, 2), wait=False)
            assert held_up.reached.wait(20)
            if kept.world.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            held_up.opened.set()
            dist.barrier()  # as training would: it fails when the other one is gone


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_all_write_leaves_the_one_before(tmp_path: Path, victim: int) -> None:
    with pytest.raises((WorldError, RuntimeError)):
        world(2).run(die_while_both_write, tmp_path, victim)
    assert load_newest(tmp_path) == (1, True)


# On a GPU


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_before_the_steps_that_follow(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    run = RunDir.acquire(tmp_path)
    kept = Checkpoints(run, CheckpointConfig(), core.World(0, 1, 0, device))
    weights = {"model.w": torch.arange(2**24, dtype=torch.float32, device=device)}
    for step in (1, 2):
        with gate() as held_up:
            expected = weights["model.w"].cpu()
            torch.cuda._sleep(10**8)  # the copy is queued behind work, and work behind the copy
            kept.save(weights, meta(step, 1), wait=False)
            for _ in range(10):
                weights["model.w"].add_(1)
            held_up.opened.set()
        kept.drain()
        loaded = {"model.w": torch.zeros(2**24, device=device)}
        found = kept.newest()
        assert found is not None
        kept.load(found, loaded)
        assert torch.equal(loaded["model.w"].cpu(), expected)
        assert not torch.equal(weights["model.w"].cpu(), expected)
    assert kept._staging._pinned
    kept.close()
    run.release()


def test_every_known_cause_has_its_fix() -> None:
    from vmamba_dist.checkpoint.save import _told

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR):
        text = _told(OSError(number, os.strerror(number), "/runs/a"))
        assert "/runs/a" in text
        assert "; " in text
