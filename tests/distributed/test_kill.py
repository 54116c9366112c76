"""A run that is killed in any way at any moment and started again ends as if it had never been killed."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distributed.launcher import Launcher, Start
from distributed.micro import metrics, words
from distributed.world import world
from vmamba_dist.checkpoint.save import Checkpoints
from vmamba_dist.checkpoint.store import list_checkpoints, step_of, verify_checkpoint
from vmamba_dist.config.schema import CheckpointConfig
from vmamba_dist.core.dist import World
from vmamba_dist.core.rundir import RunDir, last_attempt

pytestmark = pytest.mark.distributed
RANKS = 4
LIMIT_S = 120.0  # for one start, on a busy machine


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    server = Launcher()
    yield server
    server.close()


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    start = launcher.start(RANKS, words(digits, run_dir), run_dir.parent / "out.txt")
    launcher.wait(start, LIMIT_S)
    return run_dir


@dataclass
class Attempt:
    kind: str
    newest: int  # step of the newest whole checkpoint when it started
    exact: bool  # nobody could save after we looked
    number: int = 0  # as the run counts; 0 where it was killed before it owned the run


def newest_whole(run_dir: Path) -> int:
    steps = [
        step_of(path) or 0
        for path in list_checkpoints(run_dir / "checkpoints")
        if not verify_checkpoint(path)
    ]
    return max(steps, default=0)


def last_listed(run_dir: Path) -> int:
    return max((step_of(path) or 0 for path in list_checkpoints(run_dir / "checkpoints")), default=0)


def last_number(run_dir: Path) -> int:
    last = last_attempt(run_dir)
    return last.attempt if last else 0


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def mtime(path: Path) -> float:
    """When a directory that may be renamed at any moment was changed; 0 once it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def wait_for_moment(
    kind: str, rng: random.Random, run_dir: Path, start: Start, newest: int, *, after_a_save: bool
) -> None:
    """Wait until the start has made a few steps, and for a save in progress where the kind asks for one.

    Some wait for a published checkpoint first: by chance alone ten starts in a row may all die before one.
    """
    deadline, begin = time.monotonic() + LIMIT_S, time.time()
    steps = rng.randrange(-1, 8)
    while steps >= 0 and count_lines(run_dir / "metrics.jsonl") < newest + steps and start.alive():
        assert time.monotonic() < deadline, (run_dir.parent / "out.txt").read_text()[-3000:]
        time.sleep(0.005)
    while after_a_save and start.alive() and last_listed(run_dir) <= newest:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    if kind == "save":
        while start.alive() and not any(mtime(p) > begin for p in (run_dir / "checkpoints").glob("*.tmp")):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.03)
    else:
        time.sleep(rng.random() * 0.3)


def kill_and_resume(
    launcher: Launcher, args: list[str], run_dir: Path, *, kills: int, seed: int
) -> list[Attempt]:
    rng = random.Random(seed)
    kinds = ["rank", "save", "rank 0", "launcher", "all", "save"]
    attempts: list[Attempt] = []
    start: Start | None = None
    exact = True
    for i in range(kills):
        kind = kinds[i % len(kinds)]
        newest = newest_whole(run_dir) if run_dir.exists() else 0
        start = launcher.start(RANKS, args, run_dir.parent / "out.txt")
        attempts.append(Attempt(kind, newest, exact))
        known = last_number(run_dir)
        wait_for_moment(kind, rng, run_dir, start, newest, after_a_save=i % 3 == 0)
        if kind in ("rank", "save"):
            start.kill(rng.choice(start.ranks))
        elif kind == "rank 0":
            start.kill(start.ranks[0])
        elif kind == "all":
            for pid in [start.launcher, *start.ranks]:
                start.kill(pid)
        else:
            start.kill(start.launcher)  # and the next start comes at once, with the ranks still ending
        exact = kind != "launcher"
        if exact:
            launcher.wait(start, LIMIT_S)
        if last_number(run_dir) > known:
            attempts[-1].number = last_number(run_dir)
    attempts.append(Attempt("none", newest_whole(run_dir), exact))
    launcher.wait(launcher.start(RANKS, args, run_dir.parent / "out.txt"), 3 * LIMIT_S)
    attempts[-1].number = last_number(run_dir)
    return attempts


def check(attempts: list[Attempt], run_dir: Path, unbroken: Path) -> None:
    log = (run_dir / "train.log").read_text(encoding="utf-8")
    begun = {int(a): int(s) for a, s in re.findall(r"attempt (\d+) begins at step (\d+)", log)}
    assert metrics(run_dir) == metrics(unbroken), (run_dir.parent / "out.txt").read_text()[-3000:]
    for attempt in attempts:
        if attempt.number in begun:  # else it was killed before it had loaded anything
            first = begun[attempt.number]
            assert first == attempt.newest + 1 if attempt.exact else first > attempt.newest, (attempt, begun)
    assert begun[attempts[-1].number] > 1


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    launcher: Launcher, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    assert [line["step"] for line in metrics(unbroken)] == list(range(1, 45))
    run_dir = tmp_path / "run"
    seed = int(time.time())
    print("seed", seed)  # shown where it fails: the same kills can be tried again
    attempts = kill_and_resume(launcher, words(digits, run_dir), run_dir, kills=12, seed=seed)
    check(attempts, run_dir, unbroken)
    begun = [a.newest for a in attempts if a.number]
    assert len(begun) >= 10
    assert sum(newest > 0 for newest in begun) > len(begun) / 2


def test_with_readers_of_its_own_it_ends_the_same(
    launcher: Launcher, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    args = words(digits, run_dir, "data.workers=1")
    attempts = kill_and_resume(launcher, args, run_dir, kills=3, seed=1)
    check(attempts, run_dir, unbroken)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_two_hundred_kills(
    seed: int, launcher: Launcher, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    attempts = kill_and_resume(launcher, words(digits, run_dir), run_dir, kills=10, seed=seed)
    check(attempts, run_dir, unbroken)


def perturb(run_dir: Path) -> None:
    """Add a little to one weight of the newest checkpoint, and publish it again under the same step."""
    run = RunDir.acquire(run_dir)
    checkpoints = Checkpoints(run, CheckpointConfig(), World(0, 1, 0, torch.device("cpu")))
    found = checkpoints.newest()
    assert found is not None
    stored = FileSystemReader(found.path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype)
        for name, kept in stored.items()
        if isinstance(kept, TensorStorageMetadata)
    }
    checkpoints.load(found, tensors)
    tensors["model.backbone.classifier.head.weight"][0] += 1e-3  # one class: softmax ignores what all share
    checkpoints.save(tensors, found.meta)
    run.release()


def test_the_tail_comes_from_the_checkpoint(
    launcher: Launcher, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    """Replaying from step 0 would pass the kill test too; a perturbed checkpoint must change what follows."""
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    for path in list_checkpoints(run_dir / "checkpoints"):
        if (step_of(path) or 0) > 36:
            shutil.rmtree(path)
    world(1).run(perturb, run_dir)
    launcher.wait(launcher.start(RANKS, words(digits, run_dir), tmp_path / "out.txt"), LIMIT_S)
    ours, theirs = metrics(run_dir), metrics(unbroken)
    assert ours[:36] == theirs[:36]
    assert all(a["loss"] != b["loss"] for a, b in zip(ours[36:], theirs[36:], strict=True))


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    damage: str, launcher: Launcher, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    *_, before, newest = list_checkpoints(run_dir / "checkpoints")
    file = newest / "__1_0.distcp"
    if damage == "flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    else:
        file = newest / "manifest.json"
        file.unlink()
    launcher.wait(launcher.start(RANKS, words(digits, run_dir), tmp_path / "out.txt"), LIMIT_S)
    assert metrics(run_dir) == metrics(unbroken)
    log = (run_dir / "train.log").read_text(encoding="utf-8")
    assert f"attempt 2 begins at step {(step_of(before) or 0) + 1}" in log
    assert file.name in log
    assert (run_dir / "checkpoints" / f"{newest.name}.corrupt-1").is_dir()


def test_a_changed_config_is_refused_by_name_unless_allowed(
    launcher: Launcher, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    out = tmp_path / "out.txt"
    launcher.wait(launcher.start(1, words(digits, run_dir, "optim.weight_decay=0.1"), out), LIMIT_S)
    assert "optim.weight_decay was 0.05, now 0.1" in out.read_text()
    assert metrics(run_dir) == metrics(unbroken)
    more = ("optim.weight_decay=0.1", "schedule.epochs=2", "run.allow_changes=true", "run.max_steps=46")
    launcher.wait(launcher.start(1, words(digits, run_dir, *more), out), LIMIT_S)
    assert [line["step"] for line in metrics(run_dir)][-2:] == [45, 46]


def test_a_finished_run_says_so_and_changes_nothing(
    launcher: Launcher, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    out = tmp_path / "out.txt"
    launcher.wait(launcher.start(2, words(digits, run_dir), out), LIMIT_S)
    assert "this run is finished" in out.read_text()
    assert metrics(run_dir) == metrics(unbroken)
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
