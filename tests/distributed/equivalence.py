"""What equivalence tests share: a cell of the table, the mutants that it must see, resumes, distances.

Law: every engine and world learns what one process learns, from the same words. A mutant is a mistake in an engine,
and a test that does not see it proves nothing.
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from distributed.micro import metrics, train, words
from distributed.world import world
from vmamba_dist.checkpoint.save import find, load
from vmamba_dist.checkpoint.store import list_checkpoints
from vmamba_dist.config import load as load_config
from vmamba_dist.core.dist import World
from vmamba_dist.core.dist import world as joined

STEPS = 20
BF16 = "precision.compute=bfloat16"
TOLERANCE = 1e-5  # of a loss, in float32
# Of a loss, in bfloat16: a sum taken in another order moves a weight by 1e-7, and now and then that decides how a
# product rounds. Measured over 20 steps at 1 to 4 ranks: 1.7e-3 to 2.9e-3, DDP and FSDP alike.
BF16_TOLERANCE = 1e-2
NORM_TOLERANCE = 1e-4  # of a gradient norm of about 3, in float32; measured: 3e-6
BF16_NORM_TOLERANCE = 1e-1  # measured: 1.6e-2 to 3.3e-2
# Of all averaged weights, against their norm. AdamW takes a gradient that is rounding alone for one of full size, so
# single elements may be off.
EMA_TOLERANCE = 1e-6  # measured: 1.5e-8, and 1.1e-4 where the average is a step late
BF16_EMA_TOLERANCE = 1e-3  # measured: 1.7e-4 to 1.8e-4
BATCH = 48  # divides over 1, 2, 3 and 4 ranks
ALONE = World(0, 1, 0, torch.device("cpu"))

Lines = list[dict[str, Any]]


def learned(digits: Path, run_dir: Path, ranks: int, *more: str, mutant: str = "", engine: str = "") -> Lines:
    """Train a cell of the table; return the lines of its metrics."""
    args = words(digits, run_dir, f"run.max_steps={STEPS}", "checkpoint.every_steps=100", *more)
    assert set(world(ranks).run(train_mutant, args, mutant, engine, timeout_s=240)) == {"paused"}
    return metrics(run_dir)


def distance(a: Lines, b: Lines, kind: str = "loss") -> float:
    """The largest difference in any figure of a kind: the losses, training's and both evaluations', or the norms."""
    assert [line["step"] for line in a] == [line["step"] for line in b]
    pairs = [
        (x[key], y[key])
        for x, y in zip(a, b, strict=True)
        for key in x.keys() & y.keys()
        if key.endswith(kind)
    ]
    assert len(pairs) >= len(a)
    return max(abs(x - y) for x, y in pairs)


@dataclass(frozen=True)
class Apart:
    """How far a run has come from another: the largest difference of a loss, of a norm, and of the averages."""

    loss: float
    norm: float
    ema: float


def apart(a: Path, b: Path) -> Apart:
    """Compare two runs' metrics and the averaged weights of their last checkpoints; printed, as the docs' table is made
    of it."""
    ours, theirs = metrics(a), metrics(b)
    found = Apart(distance(ours, theirs), distance(ours, theirs, "grad_norm"), averages_apart(a, b))
    print(f"loss {found.loss:.1e}, norm {found.norm:.1e}, ema {found.ema:.1e}")
    return found


def averages_apart(a: Path, b: Path) -> float:
    """The difference of two runs' averaged weights, all as one vector, relative to it."""
    ours, theirs = (
        {name: t.double() for name, t in stored(run).items() if name.startswith("ema.")} for run in (a, b)
    )
    assert ours.keys() == theirs.keys()
    assert ours
    squares = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    return math.sqrt(squares / sum(float(t.square().sum()) for t in ours.values()))


def engine_class(engine: str) -> Any:
    """The class that `parallel.engine` names."""
    if engine == "fsdp":
        from vmamba_dist.parallel.fsdp2 import FsdpEngine

        return FsdpEngine
    if engine == "deepspeed":
        from vmamba_dist.parallel.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    from vmamba_dist.parallel.ddp import DdpEngine

    return DdpEngine


@contextmanager
def no_gradient_mean(engine: str) -> Iterator[None]:
    cls = engine_class(engine)
    right = cls.backward

    def backward(self: Any, loss: torch.Tensor) -> None:
        right(self, loss * torch.distributed.get_world_size())  # the sum over ranks, not their mean

    with patch.object(cls, "backward", backward):
        yield


@contextmanager
def no_clip(engine: str) -> Iterator[None]:
    cls = engine_class(engine)
    right = cls.update
    with patch.object(cls, "update", lambda self, max_norm: right(self, 0.0)):
        yield


@contextmanager
def late_ema(engine: str) -> Iterator[None]:
    from vmamba_dist.train.ema import Ema

    right = Ema.update
    with patch.object(Ema, "update", lambda self, step: right(self, step - 1)):
        yield


@contextmanager
def no_mixing(engine: str) -> Iterator[None]:
    """No engine's mistake: it shows that what is compared does mix."""
    with patch("vmamba_dist.data.augment.draw_mix", lambda *_: None):
        yield


@contextmanager
def whole_gradients_unreduced(engine: str) -> Iterator[None]:
    """FSDP's own: each rank steps its whole parameters by its own gradients."""
    cls = engine_class("fsdp")
    right = cls._reduce

    def reduce(self: Any) -> torch.Tensor:
        own = [(p, p.grad.clone()) for p in self._whole if p.grad is not None]
        norm: torch.Tensor = right(self)
        for p, grad in own:
            p.grad = grad
        return norm

    with patch.object(cls, "_reduce", reduce):
        yield


@contextmanager
def copies_unreduced(engine: str) -> Iterator[None]:
    """HSDP's own: each copy of the model steps by the mean gradient of its own shard group."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    right = group.foreach_reduce

    def reduce(*args: Any, **options: Any) -> Any:
        given = inspect.signature(right).bind(*args, **options)
        assert given.arguments["all_reduce_group"] is not None
        given.arguments["all_reduce_group"] = None
        return right(*given.args, **given.kwargs)

    with patch.object(group, "foreach_reduce", reduce):
        yield


@contextmanager
def copies_counted_twice(engine: str) -> Iterator[None]:
    """HSDP's own: the norm takes every copy's shards for others."""
    cls = engine_class("fsdp")
    right = cls.update

    def update(self: Any, max_norm: float) -> Any:
        self._copies = 1
        return right(self, max_norm)

    with patch.object(cls, "update", update):
        yield


@contextmanager
def a_state_that_matters(engine: str = "") -> Iterator[None]:
    """Longer time steps and larger B and C: with fresh weights the state adds so little to y that 20 steps
    without its carry move the loss by 2e-6 (measured)."""
    from vmamba_dist.train import assemble

    right = assemble.parallelize

    def build(*args: Any, **options: Any) -> Any:
        engine = right(*args, **options)
        state = (
            engine.state()
        )  # what a checkpoint would hold: under ZeRO the masters are apart from the weights
        with torch.no_grad():
            for name, weight in state.items():
                own = weight.to_local() if isinstance(weight, DTensor) else weight
                if name.startswith("model.") and name.endswith("dt_projs_bias"):
                    own += 3
                if name.startswith("model.") and name.endswith("x_proj_weight"):
                    own *= 30
        engine.load(state)
        return engine

    with patch.object(assemble, "parallelize", build):
        yield


@contextmanager
def lost_carry(engine: str = "") -> Iterator[None]:
    """The scan forgets its state half-way down the image."""
    from vmamba_kernels import ss2d_scan as right

    def scan(x: torch.Tensor, projected: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        half = x.shape[1] // 2
        if half == 0:
            return right(x, projected, *rest, **options)
        top = right(x[:, :half], projected[:, :half], *rest, **options)
        return torch.cat([top, right(x[:, half:], projected[:, half:], *rest, **options)], dim=1)

    with patch("vmamba_dist.models.ss2d.ss2d_scan", scan):
        yield


@contextmanager
def lost_carry_of_a_state_that_matters(engine: str = "") -> Iterator[None]:
    with a_state_that_matters(), lost_carry():
        yield


MUTANTS: dict[str, Callable[[str], Any]] = {
    f.__name__: f
    for f in (
        *(no_gradient_mean, no_clip, late_ema, no_mixing),
        *(whole_gradients_unreduced, copies_unreduced, copies_counted_twice),
        *(a_state_that_matters, lost_carry_of_a_state_that_matters),
    )
}


def train_mutant(args: list[str], mutant: str, engine: str) -> str:
    with MUTANTS[mutant](engine) if mutant else nullcontext():
        return train(args)


def resumed(saved: Path, run_dir: Path, digits: Path, ranks: int, steps: int, *more: str) -> Lines:
    """Go on from a copy of a run at some world size and engine; return its lines. The loaded bits are checked first."""
    shutil.copytree(saved, run_dir)
    args = words(digits, run_dir, f"data.global_batch={BATCH}", f"run.max_steps={steps}", *more)
    named = world(ranks).run(loaded_differently, args, timeout_s=240)
    assert [differs for differs, _ in named] == [[]] * ranks
    assert set().union(*(names for _, names in named)) == set(stored(saved))
    assert set(world(ranks).run(train, args, timeout_s=240)) == {"paused"}
    assert f"begins at step {metrics(saved)[-1]['step'] + 1}" in (run_dir / "train.log").read_text()
    return metrics(run_dir)


def loaded_differently(args: list[str]) -> tuple[list[str], set[str]]:
    """Start a run up to where it would train; name what differs from its checkpoint, and all that this rank has."""
    from vmamba_dist.train import assemble, start
    from vmamba_dist.train.sources import open_sources
    from vmamba_dist.train.stopping import StopRequest

    cfg = load_config(args)
    start.be_deterministic()
    with joined("cpu", cfg.parallel.timeout_s, alone_too=cfg.parallel.engine != "ddp") as place:
        checkpoint = list_checkpoints(Path(cfg.run.dir) / "checkpoints")[-1]
        with assemble.assembled(cfg, open_sources(cfg, place.size), place, StopRequest()) as run:
            # A copy: whole tensors may come with a gather that reuses memory.
            here = {name: whole(tensor) for name, tensor in run.tensors().items()}
            kept = stored(checkpoint)
            differ = [name for name, tensor in here.items() if not torch.equal(tensor, kept[name])]
            if run.state.step != metrics(Path(cfg.run.dir))[-1]["step"]:
                differ.append("step")
            return differ, set(here)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it on the CPU. A collective for a sharded one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().cpu()


def stored(run_or_checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, or of a run's newest one."""
    found = list_checkpoints(run_or_checkpoint / "checkpoints")
    checkpoint = found[-1] if found else run_or_checkpoint
    index = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype)
        for name, kept in index.items()
        if isinstance(kept, TensorStorageMetadata)
    }
    # On one rank, whichever world this is called in.
    with patch("torch.distributed.is_initialized", lambda: False):
        load(find(checkpoint, ALONE), tensors, ALONE)
    return tensors


def by_engine(name: str) -> list[str]:
    """The words of a column of the table."""
    return {
        "ddp": [],
        "fsdp": ["parallel.engine=fsdp"],
        "hsdp": ["parallel.engine=fsdp", "parallel.shard_size=2"],
    }[name]
