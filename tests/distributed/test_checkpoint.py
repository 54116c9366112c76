"""Checkpoints saved and read by several ranks: bit-equal at any world size, damage named, kills harmless."""

import json
import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distributed.world import ROOT, WorldError, world
from vmamba_dist.checkpoint import save, store
from vmamba_dist.checkpoint.save import Checkpoints
from vmamba_dist.checkpoint.store import CheckpointError, Meta
from vmamba_dist.config.schema import CheckpointConfig
from vmamba_dist.core import dist as core
from vmamba_dist.core.dist import World
from vmamba_dist.core.rundir import RunDir, Superseded

pytestmark = pytest.mark.distributed

SHAPES = {
    "model.head.weight": (10, 33),
    "model.blocks.0.A_logs": (500, 1),
    "model.norm.weight": (63,),
    "ema.head.weight": (10, 33),
    "model.empty": (0, 3),
    "model.one": (1,),
    "optim.head.weight.exp_avg": (10, 33),
    "optim.head.weight.step": (),
}


def values(step: int) -> dict[str, Tensor]:
    """A function of the step alone, so that whoever loads knows what was saved."""
    draw = torch.Generator().manual_seed(step)
    made = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    made["model.count"] = torch.tensor(2**40 + step)
    made["model.half"] = torch.randn(7, generator=draw).to(torch.bfloat16)
    made["model.head.weight"][0, 0] = float("nan")
    return made


def poisoned(step: int = 0) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 77) for name, tensor in values(step).items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(x: Tensor) -> bytes:
        return x.reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def meta(step: int, size: int, **metrics: float) -> Meta:
    return Meta(
        step, step * 64, step // 10, {"skipped": []}, size, "ddp", "digest", {"data.block": 16}, metrics
    )


def joined(path: Path, keep: int = 3) -> Checkpoints:
    """The checkpoints of a run directory, for all ranks; rank 0 owns it."""
    with core.world("cpu") as place:
        run = RunDir.acquire(path, wait_s=5) if place.is_main else None
        attempt = core.from_main(run.attempt if run else 0)
        return Checkpoints(
            run or RunDir.attach(path, attempt), CheckpointConfig(keep=keep), place, metric="top1"
        )


def save_steps(path: Path, steps: list[int]) -> list[str]:
    kept = joined(path)
    saved = [kept.save(values(step), meta(step, kept.world.size)).name for step in steps]
    kept.run.release()
    return saved


def load_newest(path: Path) -> tuple[int, bool]:
    kept = joined(path)
    found = kept.newest()
    assert found is not None
    tensors = poisoned()
    kept.load(found, tensors)
    kept.run.release()
    return found.meta.step, same_bits(tensors, values(found.meta.step))


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("four")
    assert world(4).run(save_steps, path, [5, 17]) == [["step-000000005", "step-000000017"]] * 4
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_saved_by_four_and_loaded_by_fewer_is_bit_equal(saved_by_four: Path, size: int) -> None:
    assert world(size).run(load_newest, saved_by_four) == [(17, True)] * size


def test_saved_by_one_process_without_a_group_and_loaded_by_three(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    assert load_newest(tmp_path) == (1, True)
    assert world(3).run(load_newest, tmp_path) == [(1, True)] * 3


def test_ranks_share_the_writing_of_replicated_tensors(saved_by_four: Path) -> None:
    path = saved_by_four / "checkpoints" / "step-000000017"
    manifest = store.read_manifest(path)
    assert {name[:3] for name in manifest.files} == {"__0", "__1", "__2", "__3", ".me"}
    assert {p.name for p in path.iterdir()} == set(manifest.files) | {"manifest.json"}
    payload = sum(t.numel() * t.element_size() for t in values(17).values())
    written = sum(record.bytes for name, record in manifest.files.items() if name.startswith("__"))
    assert payload < written < 2 * payload + 2048 * len(values(17))  # once, with DCP's own kilobyte a tensor
    assert manifest.meta == meta(17, 4)


def save_sharded(path: Path) -> None:
    kept = joined(path)
    kept.save(sharded(3), meta(3, kept.world.size))
    kept.run.release()


def load_sharded(path: Path) -> bool:
    kept = joined(path)
    found = kept.newest()
    assert found is not None
    target = sharded(4)
    kept.load(found, target)
    kept.run.release()
    expected = sharded(3)
    return all(torch.equal(whole(target[name]), whole(expected[name])) for name in expected)


def whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def sharded(seed: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (core.rank_and_size()[1],))
    draw = torch.Generator().manual_seed(seed)
    return {
        f"model.w{rows}": distribute_tensor(torch.randn(rows, 5, generator=draw), mesh, [Shard(0)])
        for rows in (1, 4, 33)
    }


def test_sharded_tensors_load_at_another_world_size(tmp_path: Path) -> None:
    world(3).run(save_sharded, tmp_path)
    assert world(2).run(load_sharded, tmp_path) == [True, True]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def newest_and_log(path: Path) -> tuple[str, list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vmamba_dist").addHandler(handler)
    kept = joined(path)
    try:
        found = kept.newest()
    finally:
        kept.run.release()
        logging.getLogger("vmamba_dist").removeHandler(handler)
    return found.path.name if found else "", messages


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("__2_0.distcp", flip, "__2_0.distcp: sha256 differs"),
        ("__0_0.distcp", cut, "__0_0.distcp: truncated: "),
        ("__1_0.distcp", Path.unlink, "__1_0.distcp: missing"),
        (".metadata", flip, ".metadata: sha256 differs"),
        ("manifest.json", flip, "manifest.json: "),
        ("manifest.json", Path.unlink, "manifest.json: missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_taken(
    tmp_path: Path, file: str, damage: Callable[[Path], None], reason: str
) -> None:
    world(3).run(save_steps, tmp_path, [5, 17])
    damage(tmp_path / "checkpoints" / "step-000000017" / file)
    results = world(2).run(newest_and_log, tmp_path)
    assert [name for name, _ in results] == ["step-000000005"] * 2
    (message,), nothing = (messages for _, messages in results)
    assert nothing == []  # said once, by rank 0
    assert "step-000000017" in message
    assert reason in message
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "step-000000005",
        "step-000000017.corrupt-1",
    }


def test_where_every_checkpoint_is_damaged_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    """To begin at step 1 would cut metrics.jsonl to nothing; the second start must not do it either."""
    save_steps(tmp_path, [5, 17])
    for step in (5, 17):
        flip(tmp_path / "checkpoints" / f"step-{step:09d}" / "__0_0.distcp")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none is whole, only step-000000005\.corrupt-1"):
            world(2).run(newest_and_log, tmp_path)
    assert all("corrupt-1" in p.name for p in (tmp_path / "checkpoints").iterdir())


def find(at: Path) -> str:
    with core.world("cpu") as place:
        return save.find(at, place).path.name


def test_a_named_checkpoint_is_found_and_damage_is_an_error_that_renames_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, [5, 17])
    checkpoints = tmp_path / "checkpoints"
    older = checkpoints / "step-000000005"
    assert world(2).run(find, older) == [older.name] * 2
    for place in (tmp_path, checkpoints):
        assert world(2).run(find, place) == ["step-000000017"] * 2
    flip(checkpoints / "step-000000017" / "__0_0.distcp")
    damaged = r"step-000000017 is damaged: __0_0\.distcp: sha256 differs"
    with pytest.raises(CheckpointError, match=damaged):
        world(2).run(find, checkpoints / "step-000000017")
    assert world(2).run(find, tmp_path) == [older.name] * 2  # a run directory: its newest whole one
    flip(older / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=damaged):
        world(2).run(find, tmp_path)
    assert {p.name for p in checkpoints.iterdir()} == {"step-000000005", "step-000000017"}
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        world(2).run(find, tmp_path / "elsewhere")


def save_where_rank_one_cannot_write(path: Path) -> str:
    """Rank 1's files may not grow beyond 600 bytes: a full disk, as the process sees it."""
    kept = joined(path)
    kept.save(values(5), meta(5, kept.world.size))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if kept.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        kept.save(values(17), meta(17, kept.world.size))
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        kept.run.release()
    return "saved"


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_the_earlier_one(tmp_path: Path) -> None:
    messages = world(3).run(save_where_rank_one_cannot_write, tmp_path)
    assert len(set(messages)) == 1
    for words in ("rank 1", "step-000000017.tmp", "File too large"):
        assert words in messages[0]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000000005"}
    assert world(2).run(load_newest, tmp_path) == [(5, True)] * 2
    assert world(2).run(save_steps, tmp_path, [17]) == [["step-000000017"]] * 2


def save_as_superseded(path: Path) -> str:
    kept = joined(path)
    kept.save(values(5), meta(5, kept.world.size))
    later = None
    if kept.world.is_main:
        kept.run.lock.unlink()
        later = RunDir.acquire(path, wait_s=0)
    core.gather(None)
    try:
        kept.save(values(6), meta(6, kept.world.size))
    except Superseded as error:
        return str(error)
    finally:
        kept.run.release()
        if later is not None:
            later.release()
    return "saved"


def test_a_superseded_attempt_saves_nothing(tmp_path: Path) -> None:
    messages = world(2).run(save_as_superseded, tmp_path)
    assert len(set(messages)) == 1
    assert "attempt 2" in messages[0]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000000005"}


class OvertakenWhileWriting(dict[str, Tensor]):
    """Tensors of a slow save: as they are written, a later attempt begins."""

    def __init__(self, run: RunDir) -> None:
        super().__init__(values(6))
        self.run = run
        self.later: RunDir | None = None

    def items(self):  # type: ignore[no-untyped-def]
        self.run.lock.unlink()
        self.later = RunDir.acquire(self.run.path, wait_s=0)
        return super().items()


def test_an_attempt_overtaken_while_it_writes_does_not_publish(tmp_path: Path) -> None:
    kept = joined(tmp_path)
    tensors = OvertakenWhileWriting(kept.run)
    with pytest.raises(Superseded, match="attempt 2"):
        kept.save(tensors, meta(6, 1))
    assert store.list_checkpoints(tmp_path / "checkpoints") == []
    kept.run.release()
    assert tensors.later is not None
    tensors.later.release()


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    kept = joined(tmp_path)
    kept.save(values(1), meta(5, 1))
    path = kept.save(values(5), meta(5, 1, top1=0.5))
    found = kept.newest()
    assert found is not None
    assert found.path == path
    assert found.meta.metrics == {"top1": 0.5}
    tensors = poisoned()
    kept.load(found, tensors)
    kept.run.release()
    assert same_bits(tensors, values(5))


def load_changed(path: Path, change: str) -> str:
    kept = joined(path)
    found = kept.newest()
    assert found is not None
    tensors = poisoned()
    if change == "missing":
        tensors["model.new"] = torch.zeros(3)
    elif change == "unused":
        tensors = {name: t for name, t in tensors.items() if not name.startswith(("optim.", "ema."))}
    elif change == "shape":
        tensors["model.norm.weight"] = torch.zeros(64)
    elif change == "dtype":
        tensors["model.norm.weight"] = torch.zeros(63, dtype=torch.float64)
    try:
        kept.load(found, tensors)
    except CheckpointError as error:
        return str(error)
    finally:
        kept.run.release()
    return "loaded"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", ["lacks model.new"]),
        ("unused", ["ema.head.weight", "optim.head.weight.exp_avg", "optim.head.weight.step"]),
        ("shape", ["model.norm.weight is (63,) float32, here (64,) float32"]),
        ("dtype", ["model.norm.weight is (63,) float32, here (63,) float64"]),
    ],
)
def test_loading_is_strict(saved_by_four: Path, change: str, words: list[str]) -> None:
    messages = world(2).run(load_changed, saved_by_four, change)
    assert len(set(messages)) == 1
    assert all(word in messages[0] for word in [*words, "step-000000017"])


def test_an_evaluation_may_leave_the_optimizer_unread(saved_by_four: Path) -> None:
    place = World(0, 1, 0, torch.device("cpu"))
    found = save.find(saved_by_four, place)
    model = {name: t for name, t in poisoned().items() if name.startswith("model.")}
    save.load(found, model, place, allow_unused=("optim.", "ema."))
    assert same_bits(model, {name: t for name, t in values(17).items() if name in model})


class Intruder:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.target,)


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """DCP's .metadata is a pickle; a checkpoint from elsewhere must not be a way in."""
    save_steps(tmp_path, [5])
    path = tmp_path / "checkpoints" / "step-000000005"
    (path / ".metadata").write_bytes(pickle.dumps(Intruder(tmp_path / "was-here")))
    manifest = store.read_manifest(path)
    files = {name: store.describe(path / name) for name in manifest.files}
    store.write_manifest(path, store.Manifest(manifest.meta, files))
    place = World(0, 1, 0, torch.device("cpu"))
    found = save.find(path, place)
    with pytest.raises(CheckpointError, match="refuses"):
        save.load(found, poisoned(), place)
    assert not (tmp_path / "was-here").exists()


def save_for_ever(path: Path, reports: int | None = None) -> None:
    """Go on from the newest checkpoint, saving every step, until killed."""
    kept = joined(path, keep=2)
    found = kept.newest()
    step = found.meta.step if found else 0
    if found:
        tensors = poisoned()
        kept.load(found, tensors)
        assert same_bits(tensors, values(step))
    while True:
        step += 1
        kept.save(values(step), meta(step, kept.world.size))
        if reports is not None:
            os.write(reports, f"{step}\n".encode())


def kill_rounds(path: Path, rounds: int, seed: int) -> dict[str, int]:
    """Fork a saver, SIGKILL it at a random moment, look at what it left; many times over."""
    draw = random.Random(seed)
    count = {"inside_save": 0, "last": 0}
    for _ in range(rounds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(path, writing)
        os.close(writing)
        with os.fdopen(reading) as stream:
            first = stream.readline() if draw.random() < 0.7 else "0"  # else it may die in its start
            time.sleep(draw.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported = max(int(line) for line in [first, *stream])
        checkpoints = path / "checkpoints"
        count["inside_save"] += checkpoints.is_dir() and any(
            p.suffix == ".tmp" for p in checkpoints.iterdir()
        )
        kept = joined(path, keep=2)
        found = kept.newest()
        newest = found.meta.step if found else 0
        assert newest >= max(reported, count["last"]), f"step {reported} was saved, {newest} is found"
        if found:
            tensors = poisoned()
            kept.load(found, tensors)
            assert same_bits(tensors, values(newest))
        kept.run.release()
        # Nor did a kill while an old one was deleted leave a directory that looks like a checkpoint.
        assert not any("corrupt" in p.name for p in checkpoints.iterdir())
        listed = store.list_checkpoints(checkpoints)
        assert not any(store.verify_checkpoint(p) for p in listed)
        assert len(listed) <= 3  # two kept, one that was to go
        count["last"] = newest
    return count


def test_a_kill_at_any_moment_of_a_save_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    script = (
        "import json, sys; from pathlib import Path; from distributed.test_checkpoint import kill_rounds;"
        "print(json.dumps(kill_rounds(Path(sys.argv[1]), 60, seed=3)))"
    )
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    count = json.loads(done.stdout)
    assert count["inside_save"] >= 10, count
    assert count["last"] >= 20, count  # most rounds got on


def save_until_one_is_killed(path: Path, victim: int, after_ms: int) -> None:
    kept = joined(path)
    found = kept.newest()
    step = found.meta.step if found else 0
    while True:
        step += 1
        kept.save(values(step), meta(step, kept.world.size))
        if step == 1 and kept.world.rank == victim:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, after_ms / 1000)


@pytest.mark.parametrize(("victim", "after_ms"), [(0, 50), (1, 73)])
def test_a_rank_killed_inside_a_collective_save_leaves_a_whole_checkpoint(
    tmp_path: Path, victim: int, after_ms: int
) -> None:
    with pytest.raises(WorldError, match=f"rank {victim} of 2 died"):
        world(2).run(save_until_one_is_killed, tmp_path, victim, after_ms)
    step, same = load_newest(tmp_path)
    assert step >= 1
    assert same
