"""Every key of a checkpoint comes back with what was in it; a new one that nobody has thought of is an error here."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed.equivalence import by_engine, stored, whole
from distributed.micro import words
from distributed.world import world
from shardsets import make_set
from vmamba_dist.checkpoint.store import list_checkpoints, read_manifest
from vmamba_dist.config import load as load_config
from vmamba_dist.core.dist import world as joined
from vmamba_dist.core.state import TrainState
from vmamba_dist.models import create_model
from vmamba_dist.parallel.materialise import local_part
from vmamba_dist.train import assemble, start
from vmamba_dist.train.run import Run
from vmamba_dist.train.sources import open_sources
from vmamba_dist.train.stopping import StopRequest

pytestmark = pytest.mark.distributed

BATCH = 16
# Of each field of the state another value than it begins with. A field that is missing here is not covered.
STATE: dict[str, Any] = {
    "step": 7,
    "samples": 7 * BATCH,
    "epoch": 1,
    "offset": 3 * BATCH,
    "skipped": [[2, 3], [5, 7]],
    "lanes": 4,
    "nonfinite": 5,
    "nonfinite_in_a_row": 2,
    "losses": [2.5, 1.0 / 3, 1e-9],
    "spikes": 6,
    "rollbacks": 8,
    "bad_in_epoch": 9,
    "bad_epoch": 1,
    "best": 12.25,
    "evals_since_best": 3,
}
ZERO = {f"zero{n}": ["parallel.engine=deepspeed", f"parallel.zero_stage={n}"] for n in (1, 2, 3)}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def has_one_step(args: list[str]) -> bool:
    """Whether the engine keeps one count of updates for all parameters, as DeepSpeed's does."""
    return load_config(args).parallel.engine == "deepspeed"


def value(name: str, shape: tuple[int, ...], one_step: bool) -> Tensor:
    """Values that no other tensor has, whole; but for steps that are one for all."""
    draw = np.random.default_rng(zlib.crc32(b"step" if one_step and not shape else name.encode()))
    if not shape:
        return torch.tensor(float(draw.integers(1, 1 << 20)))
    return torch.from_numpy(draw.random(shape, np.float32) + 0.5)


@contextmanager
def started(args: list[str]) -> Iterator[Run]:
    """A run up to where it would train."""
    cfg = load_config(args)
    start.be_deterministic()
    with (
        joined("cpu", cfg.parallel.timeout_s, alone_too=cfg.parallel.engine != "ddp") as place,
        assemble.assembled(cfg, open_sources(cfg, place.size), place, StopRequest()) as run,
    ):
        yield run


def save_other_values(args: list[str]) -> None:
    """Put a value of its own into every tensor and field of a fresh run, and save it."""
    with started(args) as run:
        tensors, one_step = run.tensors(), has_one_step(args)
        for name, tensor in tensors.items():
            held, first, end = local_part(tensor) if tensor.ndim else (tensor, None, None)
            given = value(name, tuple(tensor.shape), one_step)
            held.copy_(given[first:end] if tensor.ndim else given)
        run.engine.load(tensors)
        assert run.ema is not None
        run.ema.load(tensors)
        run.state.load_dict(STATE)
        run.save({}, wait=True)


def load_them(args: list[str]) -> tuple[dict[str, Any], list[str], set[str]]:
    """Start from that checkpoint: the state's fields, the tensors that are not what was saved, and all names."""
    with started(args) as run:
        here = {name: whole(tensor) for name, tensor in run.tensors().items()}
        one_step = has_one_step(args)
        differ = [n for n, t in here.items() if not torch.equal(t, value(n, tuple(t.shape), one_step))]
        return run.state.to_dict(), differ, set(here)


def names() -> set[str]:
    """Every tensor of a checkpoint of the micro run."""
    with torch.device("meta"):
        model = create_model("vmamba_atto", num_classes=5)
    weights = {f"backbone.{name}" for name in model.state_dict()}
    return {
        *(f"model.{name}" for name in weights),
        *(f"ema.{name}" for name in weights),
        *(f"optim.{name}.{moment}" for name in weights for moment in MOMENTS),
    }


def test_every_field_of_the_state_is_covered() -> None:
    fresh = TrainState().to_dict()
    assert STATE.keys() == fresh.keys() == {field.name for field in dataclasses.fields(TrainState)}
    assert all(STATE[name] != fresh[name] for name in fresh)


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        ("ddp", 2),
        ("fsdp", 2),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (("hsdp", 4), *((engine, 2) for engine in ZERO))
        ),
    ],
)
def test_every_key_round_trips(engine: str, ranks: int, tmp_path: Path) -> None:
    """ZeRO-1 and 2 share their partitions' code; ZeRO-3 has other ones."""
    if engine in ZERO:
        pytest.importorskip("deepspeed", reason="parallel.engine=deepspeed needs it")
    shards = make_set(tmp_path / "set")
    args = words(shards, tmp_path / "run", f"data.global_batch={BATCH}", "data.block=4", "schedule.epochs=2")
    args += ["eval.split=train", *(ZERO.get(engine) or by_engine(engine))]
    world(ranks).run(save_other_values, args)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    kept = stored(checkpoint)
    assert kept.keys() == names()
    assert all(torch.equal(t, value(name, tuple(t.shape), engine in ZERO)) for name, t in kept.items())
    assert read_manifest(checkpoint).meta.state == STATE
    told = world(ranks).run(load_them, args)
    assert set().union(*(seen for *_, seen in told)) == names()
    for state, differ, _ in told:
        assert differ == []
        assert state == STATE
