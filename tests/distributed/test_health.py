"""A run in trouble: it goes back past bad data, names a slow rank, and ends with the names of those who hang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distributed.launcher import Launcher
from distributed.micro import metrics, train, words
from distributed.world import WorldError, world
from vmamba_dist.checkpoint.store import list_checkpoints, read_manifest
from vmamba_dist.config import load as load_config
from vmamba_dist.core.dist import is_of_a_collective
from vmamba_dist.core.dist import world as joined
from vmamba_dist.data.batch import Batch
from vmamba_dist.objectives.base import Inputs, LossTerms
from vmamba_dist.parallel.plan import parallelize
from vmamba_dist.train import rollback
from vmamba_dist.train.assemble import build_objective
from vmamba_dist.train.health import TrainingStoppedError, autopsy

pytestmark = pytest.mark.distributed
ENGINES = {
    "ddp": ["parallel.engine=ddp"],
    "fsdp": ["parallel.engine=fsdp"],
    "hsdp, selective": ["parallel.engine=fsdp", "parallel.shard_size=1", "parallel.recompute=selective"],
    "zero-2": ["parallel.engine=deepspeed", "parallel.zero_stage=2"],
    "zero-3": ["parallel.engine=deepspeed", "parallel.zero_stage=3", "parallel.recompute=block"],
}
SLOW = {"hsdp, selective", "zero-2", "zero-3"}


def short(digits: Path, run_dir: Path, *more: str) -> list[str]:
    """26 steps without an evaluation but the last, a checkpoint every 4."""
    fields = ("run.max_steps=26", "eval.every_epochs=0", "run.loss_spike=4", "run.max_rollbacks=1")
    return words(digits, run_dir, *fields, *more)


@contextmanager
def poisoned(factors: dict[int, float], seen: list[int]) -> Iterator[None]:
    """Multiply the loss of these data steps; note each data step that is learned from."""
    from vmamba_dist.objectives.classify import Classify

    right = Classify.forward

    def forward(self: Classify, inputs: Inputs) -> LossTerms:
        terms = right(self, inputs)
        seen.append(inputs.step)
        return LossTerms(terms.total * factors.get(inputs.step, 1.0), terms.per_sample)

    with patch.object(Classify, "forward", forward):
        yield


def train_poisoned(args: list[str], factors: dict[int, float]) -> tuple[str, list[int]]:
    seen: list[int] = []
    with poisoned(factors, seen):
        try:
            told = train(args)
        except TrainingStoppedError as error:
            told = str(error)
    assert not any(thread.name == "watch" for thread in threading.enumerate())
    return told, seen


def die_once_recorded(args: list[str], factors: dict[int, float]) -> None:
    """End by SIGKILL as soon as the roll-back is on the disk."""
    right = rollback.record

    def record(path: Path, entry: rollback.Entry) -> None:
        right(path, entry)
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(rollback, "record", record):
        train_poisoned(args, factors)


def last_state(run_dir: Path) -> dict[str, Any]:
    return read_manifest(list_checkpoints(run_dir / "checkpoints")[-1]).meta.state


POISON = {20: 1e3}  # step 21, found when step 22 is recorded; the newest checkpoint is of step 20


@pytest.fixture(scope="module")
def rolled_back(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met a spike and went back."""
    run_dir = tmp_path_factory.mktemp("rolled-back") / "run"
    told = world(2).run(train_poisoned, short(digits, run_dir, "run.resume=never"), POISON)
    assert told == [("paused", [*range(22), *range(21, 27)])] * 2  # 20 never again, 21 anew
    return run_dir


def test_a_spike_is_rolled_back_and_its_data_is_left_out(rolled_back: Path) -> None:
    assert [line["step"] for line in metrics(rolled_back)] == list(range(1, 27))
    assert all(line["loss"] < 4 for line in metrics(rolled_back))
    log = (rolled_back / "train.log").read_text()
    assert re.search(
        r"step 21: the loss is \d+, [\d.]+ times the usual [\d.]+, and run.loss_spike=4; "
        r"going back, data step 20 left out \(roll-back 1 of 1\)\n",
        log,
    )
    assert "attempt 2 begins at step 21" in log
    assert "roll-backs so far: 1; left out: data step 20" in log
    state = last_state(rolled_back)
    assert (state["skipped"], state["rollbacks"], state["step"]) == ([[20, 21]], 1, 26)
    assert not list((rolled_back / "alive").iterdir())


def test_it_equals_a_run_that_left_them_out_from_the_start(
    digits: Path, rolled_back: Path, tmp_path: Path
) -> None:
    rollback.record(tmp_path / "rollbacks.jsonl", rollback.Entry(1, 0, [[20, 21]], "known before"))
    told = world(2).run(train_poisoned, short(digits, tmp_path), POISON)
    assert told == [("paused", [*range(20), *range(21, 27)])] * 2
    assert metrics(tmp_path) == metrics(rolled_back)
    assert last_state(tmp_path) == last_state(rolled_back)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_it_does_so_under_every_engine(engine: str, digits: Path, tmp_path: Path) -> None:
    """The engine is built anew in a process that has built one before."""
    if "zero" in engine:
        pytest.importorskip("deepspeed", reason="parallel.engine=deepspeed needs it")
    back, seeded = tmp_path / "back", tmp_path / "seeded"
    told = world(2).run(train_poisoned, short(digits, back, *ENGINES[engine]), POISON, timeout_s=240)
    assert [outcome for outcome, _ in told] == ["paused"] * 2
    seeded.mkdir()
    rollback.record(seeded / "rollbacks.jsonl", rollback.Entry(1, 0, [[20, 21]], "known before"))
    world(2).run(train_poisoned, short(digits, seeded, *ENGINES[engine]), POISON, timeout_s=240)
    assert "attempt 2 begins at step 21" in (back / "train.log").read_text()
    assert metrics(back) == metrics(seeded)
    assert last_state(back) == last_state(seeded)


@pytest.mark.slow
def test_a_kill_between_the_record_and_the_next_save_loses_no_skip(
    digits: Path, rolled_back: Path, tmp_path: Path
) -> None:
    with pytest.raises(WorldError, match="rank 0 of 2 died with exit code -9"):
        world(2).run(die_once_recorded, short(digits, tmp_path), POISON)
    newest = last_state(tmp_path)  # of step 20, or of 16 where that one was still being written
    assert newest["skipped"] == []
    told = world(2).run(train_poisoned, short(digits, tmp_path), POISON)
    assert told == [("paused", [t for t in range(newest["step"], 27) if t not in POISON])] * 2
    assert metrics(tmp_path) == metrics(rolled_back)


def test_spent_roll_backs_stop_all_ranks_and_name_the_steps(digits: Path, tmp_path: Path) -> None:
    """The third non-finite step in a row goes back as well, without loss_spike; the next one is too much."""
    factors = dict.fromkeys([5, 6, 7, 9, 10, 11], torch.inf)
    args = short(digits, tmp_path, "run.loss_spike=0")
    (told, seen), (other, _) = world(2).run(train_poisoned, args, factors)
    assert told == other
    autopsies = [6, 7], [11, 12]  # what was learned from last, run again
    assert seen == [*range(8), *autopsies[0], 4, *range(8, 13), *autopsies[1]]
    assert "non-finite gradients in a row" in told
    assert "run.max_rollbacks=1 is spent, with data steps 5–7 left out" in told
    assert "and now it is data steps 9–11" in told
    assert [line["applied"] for line in metrics(tmp_path)][-3:] == [False] * 3


def examine(args: list[str], where: str) -> str:
    """Make something non-finite, on one rank or on all, and look for it."""
    cfg = load_config(["precision.device=cpu", "precision.compute=float32", "model.name=vmamba_atto", *args])
    with joined("cpu") as place:
        objective = build_objective(cfg, 4)
        engine = parallelize(
            objective,
            parallel=cfg.parallel,
            precision=cfg.precision,
            optim=cfg.optim,
            world=place,
            seed=0,
        )
        torch.manual_seed(place.rank)
        images = torch.randn(4, 3, 32, 32)
        if where == "image" and place.rank == 1:
            images[2, 0, 5, 5] = torch.nan
        elif where == "weight" and place.rank == 0:
            flat_part(engine.weights()[f"backbone.{FC1}"])[0] = torch.inf
        elif where == "overflow":
            flat_part(engine.weights()[f"backbone.{FC1}"]).fill_(1e38)
        elif where == "gradient" and place.rank == 1:
            objective.backbone.get_submodule("layers.1.blocks.0.mlp.fc2").register_full_backward_pre_hook(
                lambda _m, gradients: (gradients[0].index_fill(0, torch.tensor([3]), torch.nan),)
            )
        keys = [f"{place.rank}-{i}" for i in range(4)]
        fine = Inputs(torch.zeros(4, 3, 32, 32), torch.eye(4), torch.arange(4), 0, keys)
        found = autopsy(engine, [fine, Inputs(images, torch.eye(4), torch.arange(4), 1, keys)])
        assert all(p.grad is None for p in objective.parameters())
        engine.close()
    return found


FC1 = "layers.2.blocks.1.mlp.fc1.weight"


def flat_part(weight: Tensor) -> Tensor:
    """What this rank holds of a weight, to write to."""
    weight = weight.detach()
    return (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)


@pytest.mark.parametrize("where", ["image", "weight", "overflow", "gradient", "nowhere"])
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ENGINES]
)
def test_an_autopsy_names_rank_module_and_samples_under_every_engine(engine: str, where: str) -> None:
    """Each rank used to look at its own and stop early, which hangs where the forward pass is a collective."""
    if "zero" in engine:
        pytest.importorskip("deepspeed", reason="parallel.engine=deepspeed needs it")
    told, other = world(2).run(examine, ENGINES[engine], where)
    assert told == other
    if where == "image":
        assert told == "rank 1: input images; samples 1-2"
    elif where == "weight":
        assert told.startswith(f"rank 0: parameter backbone.{FC1}; samples ")
    elif where == "overflow":
        module = f"output of backbone.{FC1.removesuffix('.weight')}; samples"
        assert told == f"rank 0: {module} 0-0, 0-1, 0-2, 0-3; rank 1: {module} 1-0, 1-1, 1-2, 1-3"
    elif where == "gradient":
        assert told == "rank 1: gradient at the output of backbone.layers.1.blocks.0.mlp.fc2; samples 1-3"
    else:
        assert told == "every tensor is finite when the last samples are run again"


@contextmanager
def slow(seconds: float, rank: int, where: str) -> Iterator[None]:
    """One rank takes longer for its samples, or for its forward pass."""
    from vmamba_dist.data.stream import TrainStream
    from vmamba_dist.objectives.classify import Classify

    batches, forward = TrainStream.batches, Classify.forward
    seconds *= int(os.environ["RANK"]) == rank

    def late_batches(self: TrainStream, *args: Any) -> Iterator[Batch]:
        for batch in batches(self, *args):
            time.sleep(seconds)
            yield batch

    def late_forward(self: Classify, inputs: Inputs) -> LossTerms:
        time.sleep(seconds)
        return forward(self, inputs)

    owner, late = (TrainStream, late_batches) if where == "data" else (Classify, late_forward)
    with patch.object(owner, late.__name__.removeprefix("late_"), late):
        yield


def train_slowly(args: list[str], seconds: float, rank: int, where: str) -> str:
    with slow(seconds, rank, where):
        return train(args)


@pytest.mark.parametrize(
    ("where", "engine"),
    [("data", "ddp"), ("compute", "ddp"), pytest.param("data", "fsdp", marks=pytest.mark.slow)],
)
def test_a_slow_rank_is_named_with_its_host(where: str, engine: str, digits: Path, tmp_path: Path) -> None:
    """Under FSDP ranks meet in the forward pass, which levels all but the waiting for samples."""
    more = ("run.max_steps=9", "telemetry.log_every_steps=4", *ENGINES[engine])
    args = short(digits, tmp_path, *more)
    seconds = 0.3 if engine == "ddp" else 1.0  # a good part of a step's time
    assert world(2).run(train_slowly, args, seconds, 1, where) == ["paused"] * 2
    log = (tmp_path / "train.log").read_text()
    found = re.findall(
        r" W rank 1 on (\S+) is (\d+)% behind the median rank over the last 4 steps: [\d.]+ s", log
    )
    assert found
    assert found[0][0] == os.uname().nodename
    assert int(found[0][1]) > 20
    assert len(found) == 1  # a second window was judged, and kept quiet
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # A busy machine may delay the other rank in some step.
    assert sum(line["slowest_rank"] == 1 and line["behind"] > 0.2 for line in lines[2:]) >= 5


@contextmanager
def crowded(rank: int, others: int) -> Iterator[None]:
    """Each rank on a core of its own, one of them with other processes that never rest."""
    own, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    busy: list[subprocess.Popen[bytes]] = []
    os.sched_setaffinity(0, {cores[own]})  # of this thread and what it starts
    try:
        if own == rank:
            busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, set(cores))


BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def train_in_a_crowd(args: list[str], rank: int) -> str:
    from vmamba_dist.train import pace

    with crowded(rank, others=3), patch.object(pace, "QUIET_S", 0.0):
        return train(args)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero-3"])
def test_a_slow_device_is_named_where_the_forward_gathers(engine: str, digits: Path, tmp_path: Path) -> None:
    """Steps take all ranks the same time there, and each part of them; a product that each computes alone does not."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="parallel.engine=deepspeed needs it")
    more = ("run.max_steps=16", "telemetry.log_every_steps=2", *ENGINES[engine])
    assert world(2).run(train_in_a_crowd, short(digits, tmp_path, *more), 1, timeout_s=200) == ["paused"] * 2
    log = (tmp_path / "train.log").read_text()
    found = re.findall(
        r"W rank 1 on \S+ is \d+% behind .*, and ([\d.]+) s for a fixed product against ([\d.]+) s; the", log
    )
    # In some windows it waits for samples as well, or has a core's whole slice for the product.
    assert any(float(own) > 1.2 * float(usual) for own, usual in found), log


def all_reduce_alone() -> bool:
    """Whether the watch knows what gloo says on rank 0 where rank 1 does not come."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    known = False
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1), group=group)
        known = is_of_a_collective(caught.value)
    else:
        time.sleep(2)
    dist.barrier()
    return known


def test_the_watch_knows_an_error_of_gloo_when_it_sees_one() -> None:
    assert world(2).run(all_reduce_alone) == [True, False]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    server = Launcher()
    yield server
    server.close()


def hang(launcher: Launcher, args: list[str], run_dir: Path, rank: int) -> tuple[float, str]:
    """Stop one rank of three in mid-training; return how long the run took to end, and what it printed."""
    out = run_dir.parent / "out.txt"
    start = launcher.start(3, args, out)
    deadline = time.monotonic() + 100
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert start.alive(), out.read_text()
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.01)
    os.kill(start.ranks[rank], signal.SIGSTOP)
    begun = time.monotonic()
    launcher.wait(
        start, 60
    )  # the launcher kills the stopped one when another ends with an error, and only then
    return time.monotonic() - begun, out.read_text()


@pytest.mark.parametrize(
    ("engine", "rank"),
    [
        ("ddp", 0),
        *(
            pytest.param(engine, rank, marks=pytest.mark.slow)
            for engine, rank in (
                ("ddp", 2),
                ("fsdp", 0),
                ("fsdp", 2),
                ("zero-2", 0),
                ("zero-2", 2),
                ("zero-3", 2),
            )
        ),
    ],
)
def test_a_rank_that_hangs_is_named_and_ends_the_run(
    engine: str, rank: int, launcher: Launcher, digits: Path, tmp_path: Path
) -> None:
    """Also where the others wait in a collective of FSDP's or DeepSpeed's own, amid a forward or a backward."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="parallel.engine=deepspeed needs it")
    run_dir = tmp_path / "run"
    more = ("parallel.timeout_s=5", "data.global_batch=36", "schedule.epochs=300", "run.max_steps=9999")
    took, told = hang(launcher, short(digits, run_dir, *more, *ENGINES[engine]), run_dir, rank)
    assert took < 15
    found = re.search(
        rf"step (\d+): rank {rank} did not arrive within [\d.]+ s \(parallel.timeout_s=5\)", told
    )
    assert found, told[-3000:]
    assert abs(int(found[1]) - len(metrics(run_dir))) <= 2
    assert re.search(rf"Rank {rank} \(host \S+, pid \d+\) was last seen at step \d+, \w+, [\d.]+ s ago", told)
    assert found[0] in (run_dir / "train.log").read_text()
