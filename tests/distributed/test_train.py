"""What a start of training promises beside its arithmetic: bad input, bad numbers, signals, pauses and records."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distributed.micro import metrics, train, words
from distributed.world import world
from shardsets import make_damaged_set, make_set
from vmamba_dist.checkpoint.save import find, load
from vmamba_dist.checkpoint.store import list_checkpoints, read_manifest, step_of, verify_checkpoint
from vmamba_dist.config import ConfigError, UserError
from vmamba_dist.config import load as load_config
from vmamba_dist.core.dist import World
from vmamba_dist.core.dist import world as joined
from vmamba_dist.core.rundir import RunBusy, RunDir
from vmamba_dist.data.shards import read_index
from vmamba_dist.train import evaluate
from vmamba_dist.train import run as run_training
from vmamba_dist.train.__main__ import main
from vmamba_dist.train.health import TrainingStoppedError

pytestmark = pytest.mark.distributed
STEPS = 16  # of `small`: two epochs of eight
TOLERANCE = 1e-5  # between world sizes
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 images of odd sizes in 5 classes."""
    return make_set(tmp_path_factory.mktemp("odd"))


def small(shards: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of 16 steps, 8 an epoch; the evaluation is on the training set and twice an epoch."""
    fields = ("data.global_batch=12", "data.block=4", "schedule.epochs=2", "eval.split=train")
    return words(shards, run_dir, *fields, *more)


@pytest.fixture(scope="module")
def unbroken(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """An unbroken run of `small` at 1 and at 2 ranks."""
    runs = {ranks: tmp_path_factory.mktemp(f"unbroken-{ranks}") / "run" for ranks in (1, 2)}
    for ranks, run_dir in runs.items():
        assert set(world(ranks).run(train, small(odd, run_dir))) == {"finished"}
        assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))
    return runs


def command(args: list[str]) -> int:
    """Be `python -m vmamba_dist.train`: the exit code."""
    return main(args)


def why_stopped(args: list[str]) -> str:
    try:
        return train(args)
    except TrainingStoppedError as error:
        return str(error)


class Died(Exception):
    pass


@contextmanager
def at_step(step: int, action: Any) -> Iterator[None]:
    """Do something when step `step` has been taken and is about to be recorded."""
    from vmamba_dist.train.meter import Meter

    right = Meter.record

    def record(self: Meter, **fields: Any) -> Any:
        if fields["step"] == step:
            action()
        return right(self, **fields)

    with patch.object(Meter, "record", record):
        yield


def die_at(args: list[str], step: int) -> None:
    """End without a save or a word; lines and events after the last checkpoint stay behind."""

    def die() -> NoReturn:
        raise Died

    with at_step(step, die), pytest.raises(Died):
        train(args)


def losses_differ(a: Path, b: Path) -> float:
    pairs = zip(metrics(a), metrics(b), strict=True)
    return max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs)


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    index = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype)
        for name, kept in index.items()
        if isinstance(kept, TensorStorageMetadata)
    }
    load(find(checkpoint, ALONE), tensors, ALONE)
    return tensors


def saved_steps(run_dir: Path) -> set[int]:
    return {step_of(path) or 0 for path in list_checkpoints(run_dir / "checkpoints")}


def bad_lines(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "bad.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda bad: (bad["epoch"], bad["position"]))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of 97 samples are bad, in four ways."""
    return make_damaged_set(tmp_path_factory.mktemp("damaged"))


ALLOWED = "data.max_bad_fraction=0.13"  # 12 an epoch: as many as there are


@pytest.fixture(scope="module")
def with_bad(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("with-bad") / "run"
    assert world(1).run(train, small(damaged, run_dir, ALLOWED)) == ["finished"]
    return run_dir


def test_bad_samples_are_replaced_counted_and_named(with_bad: Path) -> None:
    found = bad_lines(with_bad)
    steps = Counter(8 * bad["epoch"] + bad["position"] // 12 + 1 for bad in found)
    assert {line["step"]: line["bad"] for line in metrics(with_bad)} == {
        step: steps[step] for step in range(1, STEPS + 1)
    }
    assert Counter(bad["epoch"] for bad in found) == {0: 12, 1: 12}
    log = (with_bad / "train.log").read_text()
    for bad in found:
        assert bad["replacement_key"]
        named = f"(number {bad['index']} of {bad['shard']}) is unusable: {bad['reason']}; "
        assert f"{named}{bad['replacement_key']} takes its place" in log
    for reason in ("its shard ends", "no image member", "undecodable image", "label 9 is outside 0 … 4"):
        assert reason in log
    assert "left out 12 unreadable samples of 97" in log
    assert metrics(with_bad)[-1]["eval/ema/num_samples"] == 85


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0), (2, 1)])
def test_the_choice_does_not_depend_on_ranks_and_workers(
    ranks: int, workers: int, damaged: Path, with_bad: Path, tmp_path: Path
) -> None:
    more = (ALLOWED, f"data.workers={workers}", "eval.every_epochs=0")
    world(ranks).run(train, small(damaged, tmp_path, *more))
    assert losses_differ(tmp_path, with_bad) <= (TOLERANCE if ranks > 1 else 0)
    assert [line["bad"] for line in metrics(tmp_path)] == [line["bad"] for line in metrics(with_bad)]
    assert bad_lines(tmp_path) == bad_lines(with_bad)


def test_a_resume_uses_the_choices_again_and_writes_no_line_twice(
    damaged: Path, odd: Path, with_bad: Path, tmp_path: Path
) -> None:
    """The tars are mended after the kill: what was learned before it is learned again all the same."""
    shards, run_dir = tmp_path / "set", tmp_path / "run"
    shutil.copytree(damaged, shards)
    args = small(shards, run_dir, ALLOWED)
    world(1).run(die_at, args, 8)  # step 7 is in the records, step 4 in the checkpoint
    before = (run_dir / "bad.jsonl").read_text()
    with (run_dir / "bad.jsonl").open("a") as file:
        file.write('{"epoch": 0, "posit')  # torn by the kill
    for tar in odd.glob("*.tar"):
        shutil.copy(tar, shards)
    assert world(1).run(train, args) == ["finished"]
    assert "begins at step 5" in (run_dir / "train.log").read_text()
    resumed, whole = (without_evaluation(metrics(path)[:8], {8}) for path in (run_dir, with_bad))
    assert resumed == whole
    assert not any(line["bad"] for line in metrics(run_dir)[8:])
    assert (run_dir / "bad.jsonl").read_text() == before


def test_too_many_bad_samples_stop_all_ranks_and_leave_a_good_checkpoint(
    damaged: Path, with_bad: Path, tmp_path: Path
) -> None:
    more = ("checkpoint.every_steps=1", "eval.every_epochs=0")
    args = small(damaged, tmp_path, "data.max_bad_fraction=0.05", *more)
    told = world(2).run(why_stopped, args)
    assert told[0] == told[1]
    assert "5 unreadable samples in epoch 0" in told[0] or "6 unreadable samples in epoch 0" in told[0]
    assert "data.max_bad_fraction=0.05 allows 4 by now" in told[0]
    assert told[0] in (tmp_path / "train.log").read_text()
    assert world(2).run(command, args) == [2, 2]  # and so does the next start
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(tmp_path / "checkpoints"))
    assert len(saved_steps(tmp_path)) > 0
    assert world(2).run(command, small(damaged, tmp_path, ALLOWED)) == [0, 0]
    assert losses_differ(tmp_path, with_bad) <= TOLERANCE


def set_with(shards: Path, **info: Any) -> Path:
    """Change the training split's entry of a set's index."""
    path = shards / "_info.json"
    content = json.loads(path.read_text())
    content["splits"]["train"] |= info
    path.write_text(json.dumps(content))
    return shards


@pytest.mark.parametrize(
    ("what", "ranks", "word", "says"),
    [
        ("batch", 1, "data.global_batch=98", ["data.global_batch=98", "97 samples"]),
        ("ranks", 5, "", ["data.global_batch=12", "5 ranks", "use 10 or 20"]),
        ("classes", 2, "model.num_classes=4", ["model.num_classes=4", "5 classes"]),
        ("evaluation", 2, "", ["eval.data=", "7 classes, the model 5"]),
        ("split", 2, "eval.split=nope", ["no split 'nope'", "it has train"]),
        ("missing tar", 2, "", ["1 of the 8 shards", "odd-train-000003.tar"]),
        ("longer tar", 2, "", ["odd-train-000003.tar has ", "its index says "]),
        ("other count", 2, "", ["odd-train-000000.tar holds 13 samples, its index says 14"]),
        ("other sum", 2, "", ["says 98 samples, its shard_lengths sum to 97"]),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_cannot_be_is_said_before_ranks_meet(
    what: str, ranks: int, word: str, says: list[str], odd: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """No rendezvous is given here, so a process that tried to join the others would fail otherwise."""
    shards = shutil.copytree(odd, tmp_path / "set")
    tar = shards / "odd-train-000003.tar"
    args = small(shards, tmp_path / "run", *([word] if word else []))
    if what == "evaluation":
        seven = make_set(tmp_path / "seven", 14, num_classes=7)
        args.append(f"eval.data={seven}")
    elif what == "missing tar":
        tar.unlink()
    elif what == "longer tar":
        tar.write_bytes(tar.read_bytes() + bytes(512))
    elif what == "other count":
        set_with(shards, shard_lengths=[14, *[13] * 6, 5])
    elif what == "other sum":
        set_with(shards, num_samples=98)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ConfigError) as caught:
        run_training(load_config(args))
    assert [part for part in says if part not in str(caught.value)] == [], caught.value
    assert not torch.distributed.is_initialized()
    kept = {"index"} if what == "other count" else set()  # the tars were scanned to find out
    assert {path.name for path in (tmp_path / "run").glob("*")} == kept


PURE = ("augment.mixup=0", "augment.cutmix=0", "eval.every_epochs=0")  # a sick sample stays one sample


@contextmanager
def sick_images(steps: set[int]) -> Iterator[None]:
    """The third sample of each of these steps (from 1) has a NaN: rank 1's first one of two."""
    from vmamba_dist.data.augment import DeviceTransform

    right = DeviceTransform.__call__

    def transform(self: DeviceTransform, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        images, targets = right(self, batch, device)
        images[(batch.positions == 12 * batch.step + 2) & (batch.step + 1 in steps), 0, 3, 5] = torch.nan
        return images, targets

    with patch.object(DeviceTransform, "__call__", transform):
        yield


def train_sick(args: list[str], steps: set[int]) -> str:
    with sick_images(steps):
        return why_stopped(args)


@contextmanager
def sick_weight(name: str, step: int) -> Iterator[None]:
    """A weight becomes infinite before step `step`."""
    from vmamba_dist.parallel.ddp import DdpEngine

    right = DdpEngine.set_lr
    count = iter(range(1, 1000))

    def set_lr(self: DdpEngine, lr: float) -> None:
        right(self, lr)
        if next(count) == step:
            with torch.no_grad():
                self.module.get_parameter(name).view(-1)[0] = torch.inf

    with patch.object(DdpEngine, "set_lr", set_lr):
        yield


def train_with_sick_weight(args: list[str], name: str, step: int) -> str:
    with sick_weight(name, step):
        return why_stopped(args)


def strict_lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, read as JSON that knows no NaN."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_non_finite_step_changes_nothing_and_two_in_a_row_go_on(odd: Path, tmp_path: Path) -> None:
    more = (*PURE, "run.max_steps=7", "checkpoint.every_steps=1", "checkpoint.keep=9")
    assert world(2).run(train_sick, small(odd, tmp_path, *more), {2, 4, 5}) == ["paused"] * 2
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines if not line["applied"]] == [2, 4, 5]
    for line in lines:
        assert (line["grad_norm"] is None) == (line["loss"] is None) == (not line["applied"])
    log = (tmp_path / "train.log").read_text()
    assert [log.count(f"step {step}: gradient norm is nan") for step in range(1, 8)] == [0, 1, 0, 1, 1, 0, 0]
    state = read_manifest(list_checkpoints(tmp_path / "checkpoints")[-1]).meta.state
    assert (state["nonfinite"], state["nonfinite_in_a_row"]) == (3, 0)
    saved = {step_of(path): stored(path) for path in list_checkpoints(tmp_path / "checkpoints")}
    for step in range(2, 8):
        was, now = saved[step - 1], saved[step]
        same = {name for name in now if torch.equal(was[name], now[name])}
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in now.items():
            own, _, rest = name.partition(".")
            if own == "ema":
                expected = torch.lerp(was[name], now[f"model.{rest}"], 1 - decay)
                assert torch.allclose(tensor, expected, rtol=0, atol=1e-7), (step, name)
            elif step in (2, 4, 5):
                assert name in same, (step, name)
        if step not in (2, 4, 5):
            still = [n for n in same if n.startswith("optim.") and n.endswith(".exp_avg")]
            assert all(name.endswith("A_logs.exp_avg") for name in still)  # one token has no recurrence
            assert not any(name.startswith("optim.") and name.endswith(".step") for name in same)


def test_the_third_in_a_row_stops_all_ranks_and_names_the_sample(odd: Path, tmp_path: Path) -> None:
    told = world(2).run(train_sick, small(odd, tmp_path, *PURE), {3, 4, 5})
    key = key_at(odd, 12 * 4 + 2)
    assert told[0] == told[1]
    where = f"rank 1: input images; samples {key}"
    assert told[0] == f"steps up to 5 gave 3 non-finite gradients in a row: {where}"
    assert told[0] in (tmp_path / "train.log").read_text()
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert verify_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]) == []


def key_at(shards: Path, position: int) -> str:
    """The key of the sample at a position of epoch 0, as the stream gives it."""
    from vmamba_dist.data.stream import TrainStream

    cfg = load_config(small(shards, Path("unused")))
    stream = TrainStream(read_index(shards), cfg.data, cfg.augment, seed=cfg.run.seed, lanes=4)
    for batch in stream.batches():
        if position in batch.positions:
            return batch.keys[batch.positions.tolist().index(position)]
    raise AssertionError(position)


def test_an_infinite_weight_is_named_and_its_checkpoint_before_goes_on(odd: Path, tmp_path: Path) -> None:
    name = "backbone.layers.1.blocks.0.op.out_proj.weight"
    args = small(odd, tmp_path, *PURE)
    assert "\n" not in (told := world(1).run(train_with_sick_weight, args, name, 5)[0])
    assert f"rank 0: parameter {name}; samples " in told
    assert [line["applied"] for line in strict_lines(tmp_path)] == [True] * 4 + [False] * 3
    assert world(1).run(train, [*args, "run.max_steps=6"]) == ["paused"]
    assert all(line["applied"] for line in strict_lines(tmp_path))


@pytest.fixture(scope="module")
def in_bfloat16(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[Any]]:
    """A run on digits in bfloat16, and the dtypes that its scans were given."""
    run_dir = tmp_path_factory.mktemp("bfloat16") / "run"
    more = ("precision.compute=bfloat16", "run.max_steps=32", "eval.batch=50", "eval.every_epochs=0")
    return run_dir, set.union(*world(2).run(train_and_watch_scans, words(digits, run_dir, *more)))


def train_and_watch_scans(args: list[str]) -> set[Any]:
    from vmamba_dist.models import ss2d

    right, seen = ss2d.ss2d_scan, set()

    def scan(x: Tensor, projected: Tensor, dt_weight: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        seen.add((projected.dtype, *(t.dtype for t in rest)))
        return right(x, projected, dt_weight, *rest, **options)

    with patch.object(ss2d, "ss2d_scan", scan):
        train(args)
    return seen


def test_bfloat16_learns_with_a_float32_recurrence_and_masters(in_bfloat16: tuple[Path, set[Any]]) -> None:
    run_dir, seen = in_bfloat16
    assert seen == {(torch.bfloat16, torch.float32, torch.float32, torch.float32)}  # dt bias, A, D
    lines = metrics(run_dir)
    assert lines[-1]["eval/raw/loss"] <= 0.8 * lines[0]["loss"]
    tensors = stored(list_checkpoints(run_dir / "checkpoints")[-1])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def evaluate_here(args: list[str]) -> dict[str, float | str]:
    with joined("cpu") as place:
        return evaluate.evaluate(args, place)


@pytest.mark.parametrize(("ranks", "weights"), [(2, "ema"), (2, "raw"), (1, "ema")])
def test_an_evaluation_gives_what_the_run_saw(
    ranks: int, weights: str, digits: Path, in_bfloat16: tuple[Path, set[Any]]
) -> None:
    """At the run's own world size bit for bit; 50 divides neither 367 nor a rank's 184."""
    run_dir, _ = in_bfloat16
    told = world(ranks).run(evaluate_here, [f"eval.checkpoint={run_dir}", f"eval.weights={weights}"])
    assert all(result == told[0] for result in told)
    assert (told[0]["split"], told[0]["step"]) == ("test", 32)
    assert told[0]["num_samples"] == read_index(digits, "test").num_samples
    for key in ("top1", "top5", "loss"):
        seen = metrics(run_dir)[-1][f"eval/{weights}/{key}"]
        assert told[0][key] == (seen if ranks == 2 else pytest.approx(seen, rel=1e-2))


def test_a_checkpoint_is_evaluated_by_its_name(unbroken: dict[int, Path], odd: Path, capsys: Any) -> None:
    *_, before, _ = list_checkpoints(unbroken[1] / "checkpoints")
    line = next(line for line in metrics(unbroken[1]) if line["step"] == step_of(before))
    for weights in ("ema", "raw"):
        assert (
            evaluate.main([f"eval.checkpoint={before}", f"eval.weights={weights}", f"eval.data={odd}"]) == 0
        )
        told = json.loads(capsys.readouterr().out)
        assert (told["checkpoint"], told["weights"], told["num_samples"]) == (str(before), weights, 97)
        for key in ("top1", "top5", "loss"):
            assert told[key] == line[f"eval/{weights}/{key}"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("damaged", "__0_0.distcp: truncated"),
        ("nowhere", "neither a checkpoint nor a run directory"),
        ("split", "no split 'nope'; it has train"),
        ("unset", "eval.checkpoint is not set"),
        ("classes", "7 classes, the model 5"),
    ],
)
def test_an_evaluation_that_cannot_be_says_why(
    what: str, says: str, unbroken: dict[int, Path], tmp_path: Path, capsys: Any
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken[1], run_dir)
    args = [f"eval.checkpoint={run_dir}"]
    if what == "damaged":
        newest = list_checkpoints(run_dir / "checkpoints")[-1]
        file = newest / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
        args = [f"eval.checkpoint={newest}"]
    elif what == "nowhere":
        args = [f"eval.checkpoint={tmp_path}"]
    elif what == "split":
        args.append("eval.split=nope")
    elif what == "unset":
        args = []
    else:
        args.append(f"eval.data={make_set(tmp_path / 'seven', 14, num_classes=7)}")
    assert evaluate.main(args) == 2
    assert says in capsys.readouterr().err


def stop_at(args: list[str], rank: int, number: int, step: int) -> int:
    """Be a rank of a run of which one is sent a signal when it has taken step `step`."""
    ours = int(os.environ["RANK"]) == rank
    with at_step(step, lambda: os.kill(os.getpid(), number) if ours else None):
        return main(args)


def test_a_signal_to_one_rank_stops_all_and_the_same_command_goes_on(
    odd: Path, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    args = small(odd, tmp_path, "data.workers=1", "checkpoint.every_steps=100")
    for number, rank, step in ((signal.SIGTERM, 1, 1), (signal.SIGUSR2, 0, 6), (signal.SIGINT, 1, 10)):
        assert world(2).run(stop_at, args, rank, number, step) == [75, 75]
        newest = list_checkpoints(tmp_path / "checkpoints")[-1]
        assert verify_checkpoint(newest) == []
        assert step <= (step_of(newest) or 0) <= step + 2
        assert [line["step"] for line in metrics(tmp_path)] == list(range(1, (step_of(newest) or 0) + 1))
    assert world(2).run(command, args) == [0, 0]
    assert metrics(tmp_path) == metrics(unbroken[2])
    log = (tmp_path / "train.log").read_text()
    assert log.count("asked to stop: saved step") == 3
    assert "attempt 4 begins at step " in log


def without_evaluation(lines: list[dict[str, Any]], steps: set[int]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if line["step"] not in steps or not k.startswith("eval/")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def paused(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("paused") / "run"
    assert world(1).run(train, small(odd, run_dir, "run.max_steps=5")) == ["paused"]
    return run_dir


def test_a_pause_evaluates_and_saves_and_a_larger_one_goes_on(
    odd: Path, unbroken: dict[int, Path], paused: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(paused, run_dir)
    assert "eval/ema/top1" in metrics(run_dir)[-1]
    assert max(saved_steps(run_dir)) == 5
    assert world(1).run(train, small(odd, run_dir, "run.max_steps=5")) == ["paused"]  # nothing to do
    assert len(metrics(run_dir)) == 5
    assert world(1).run(train, small(odd, run_dir, "run.max_steps=11")) == ["paused"]
    assert world(1).run(train, small(odd, run_dir)) == ["finished"]
    assert "eval/ema/top1" in metrics(run_dir)[10]
    assert without_evaluation(metrics(run_dir), {5, 11}) == metrics(unbroken[1])


def test_resume_never_refuses_and_leaves_the_run_as_it_was(odd: Path, paused: Path) -> None:
    """A refused start used to leave its own config in the run's config.yaml."""
    kept = {
        name: (paused / name).read_bytes() for name in ("config.yaml", "environment.json", "metrics.jsonl")
    }
    for word, says in (("run.resume=never", "run.resume=never: "), ("optim.lr=1e-3", "optim.lr was 0.002")):
        with pytest.raises(ConfigError, match=says) as caught:
            world(2).run(train, small(odd, paused, word))
        assert "step-000000005" in str(caught.value)
    assert {name: (paused / name).read_bytes() for name in kept} == kept


def test_resume_path_starts_from_another_runs_checkpoint(
    odd: Path, unbroken: dict[int, Path], paused: Path, tmp_path: Path
) -> None:
    args = small(odd, tmp_path, f"run.resume={paused / 'checkpoints' / 'step-000000005'}")
    world(1).run(die_at, [*args, "checkpoint.every_steps=100"], 7)  # it has nothing of its own yet
    assert world(1).run(train, [*args, "run.max_steps=9"]) == ["paused"]
    assert world(1).run(train, args) == ["finished"]  # from its own newest
    assert without_evaluation(metrics(tmp_path), {9}) == metrics(unbroken[1])[5:]
    log = (tmp_path / "train.log").read_text()
    for number, first in ((1, 6), (2, 6), (3, 10)):
        assert f"attempt {number} begins at step {first}" in log
    with pytest.raises(UserError, match="nowhere"):
        world(1).run(train, small(odd, tmp_path / "new", f"run.resume={tmp_path / 'nowhere'}"))


def start_without_waiting(args: list[str]) -> str:
    assert RunDir.acquire.__kwdefaults__ is not None
    with patch.dict(RunDir.acquire.__kwdefaults__, wait_s=0.1):
        return train(args)


def test_a_second_start_names_the_owner(odd: Path, tmp_path: Path) -> None:
    owner = RunDir.acquire(tmp_path)
    try:
        with pytest.raises(RunBusy, match=rf"in use by attempt 1 \(host .*, pid {os.getpid()}") as caught:
            world(2).run(start_without_waiting, small(odd, tmp_path))
    finally:
        owner.release()
    assert os.uname().nodename in str(caught.value)


def test_patience_ends_a_run_for_good_and_retention_keeps_what_was_asked(odd: Path, tmp_path: Path) -> None:
    """Nothing is learned, so the first evaluation, at step 2, stays the best."""
    args = small(
        odd,
        tmp_path,
        "optim.lr=1e-20",
        "eval.patience=2",
        "eval.every_epochs=0.25",
        "checkpoint.every_steps=1",
        "checkpoint.keep=2",
        "checkpoint.keep_every=3",
    )
    assert world(1).run(train, args) == ["finished"]
    assert [line["step"] for line in metrics(tmp_path) if "eval/ema/top1" in line] == [2, 4, 6]
    assert saved_steps(tmp_path) == {2, 3, 5, 6}
    lines = metrics(tmp_path)
    assert world(1).run(train, args) == ["finished"]
    assert "this run is finished: nothing to do" in (tmp_path / "train.log").read_text()
    assert metrics(tmp_path) == lines
    assert len(lines) == 6


def test_a_pause_brings_early_stopping_no_nearer(odd: Path, tmp_path: Path) -> None:
    """The evaluation of a pause is shown and not counted: it would end the run a step after the second pause."""
    args = small(odd, tmp_path, "optim.lr=1e-20", "eval.patience=2", "eval.every_epochs=0.25")
    for pause in (3, 5):
        assert world(1).run(train, [*args, f"run.max_steps={pause}"]) == ["paused"]
    assert world(1).run(train, args) == ["finished"]
    assert [line["step"] for line in metrics(tmp_path) if "eval/ema/top1" in line] == [2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match=r"eval.metric was 'top1', now 'loss'"):
        world(1).run(train, [*args, "eval.metric=loss"])


def test_lanes_are_chosen_once(odd: Path, tmp_path: Path) -> None:
    """More readers want more lanes; a resume keeps those of the checkpoint, and so its samples."""
    few, many = tmp_path / "few", tmp_path / "many"
    more = ("data.block=2", "data.shuffle_gib=1e-9", "eval.every_epochs=0")
    world(1).run(train, small(odd, few, *more, "run.max_steps=4"))
    shutil.copytree(few, tmp_path / "copy")
    wide = (*more, "data.workers=1", "run.max_steps=6")
    world(2).run(train, small(odd, tmp_path / "copy", *wide))
    world(2).run(train, small(odd, many, *wide))
    world(1).run(train, small(odd, few, *more, "run.max_steps=6"))
    lanes = {
        folder.name: read_manifest(list_checkpoints(folder / "checkpoints")[-1]).meta.state["lanes"]
        for folder in (few, many, tmp_path / "copy")
    }
    assert lanes["few"] == lanes["copy"] < lanes["many"]
    assert losses_differ(few, tmp_path / "copy") <= TOLERANCE
    assert losses_differ(few, many) > TOLERANCE


def test_tensorboard_has_each_step_once_after_a_kill(odd: Path, tmp_path: Path) -> None:
    args = small(odd, tmp_path, "telemetry.tensorboard=true", "telemetry.images=3", "run.max_steps=8")
    world(1).run(die_at, args, 8)  # events up to step 7 are on the disk, and step 4 in the checkpoint
    assert world(1).run(train, args) == ["paused"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = strict_lines(tmp_path)
    for key in ("loss", "lr", "grad_norm", "samples_per_s", "data_wait", "memory_gib", "bad", "applied"):
        seen = events.Scalars(f"train/{key}")
        assert [scalar.step for scalar in seen] == list(range(1, 9))
        assert [scalar.value for scalar in seen] == pytest.approx([float(line[key]) for line in lines])
    assert [scalar.step for scalar in events.Scalars("eval/ema/top1")] == [4, 8]
    shown = events.Images("train/augmented")[0]
    assert (shown.width, shown.height) == (3 * 16, 16)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "global_batch: 12" in text
