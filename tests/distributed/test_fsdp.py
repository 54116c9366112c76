"""The sharding engine itself: its parts, its norm, its precision, and what must not go stale or go wrong."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from distributed.equivalence import whole
from distributed.world import world
from vmamba_dist.config import ConfigError
from vmamba_dist.config.schema import EmaConfig, OptimConfig, ParallelConfig, PrecisionConfig
from vmamba_dist.core.dist import World
from vmamba_dist.models import create_model
from vmamba_dist.models.init import init_rows, init_rules, init_tensor
from vmamba_dist.objectives.base import Inputs
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.parallel import fsdp2
from vmamba_dist.parallel.engine import Engine, Update
from vmamba_dist.parallel.materialise import local, local_part, share_of_rows
from vmamba_dist.parallel.plan import parallelize
from vmamba_dist.train.ema import Ema

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
BATCH = 12
CLASSES = 3  # rows of the head: at 4 ranks the last one has none
ODD = {
    "dims": (10, 18),
    "depths": (1, 2),
    "drop_path_rate": 0.3,
}  # of vmamba_atto; no width is a multiple of 4


def here() -> World:
    """This process's place, as the pool set it."""
    if not dist.is_initialized():
        return World(0, 1, 0, CPU)
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), CPU)


def objective(name: str = "vmamba_atto", **options: Any) -> Classify:
    with torch.device("meta"):
        return Classify(create_model(name, num_classes=CLASSES, **(options or ODD)), seed=5)


def start(module: Classify, *, compute: Any = "float32", **parallel: Any) -> Engine:
    engine = parallelize(
        module,
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(compute=compute),
        optim=OptimConfig(lr=1e-2),
        world=here(),
        seed=5,
    )
    engine.set_lr(1e-2)
    return engine


def share(step: int, side: int = 32) -> Inputs:
    """This rank's share of the batch of a step."""
    place = here()
    draw = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, side, side, generator=draw)
    targets = F.one_hot(torch.arange(BATCH) % CLASSES, CLASSES).float()
    own = torch.arange(BATCH)[place.rank :: place.size]
    return Inputs(images[own], targets[own], own, step, [str(i) for i in own.tolist()])


def take_step(
    engine: Engine, step: int, *, max_norm: float = 0.0, scale: float = 1.0
) -> tuple[float, Update]:
    """One step; the loss over all ranks, and the update."""
    with engine.microbatch(sync=True):
        terms = engine(share(step))
        engine.backward(terms.total * scale)
    loss = terms.total.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
    return float(loss) / here().size, engine.update(max_norm)


def run_steps(parallel: dict[str, Any], max_norm: float) -> dict[str, Any]:
    """Five steps at which clipping acts; everything that comes out of them."""
    engine = start(objective(), **parallel)
    taken = [take_step(engine, step, max_norm=max_norm) for step in range(5)]
    assert all(bool(update.applied) for _, update in taken)
    return {
        "losses": [loss for loss, _ in taken],
        "norms": [float(update.grad_norm) for _, update in taken],
        "state": {name: whole(tensor) for name, tensor in engine.state().items()},
        "empty": sum(local(t).numel() == 0 for t in engine.state().values()),
    }


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(3, {}, marks=pytest.mark.slow),
        (4, {"shard_size": 2}),
        (2, {"cpu_offload": True}),
        (2, {"shard_size": 1}),
        (1, {}),
    ],
    ids=str,
)
def test_uneven_and_empty_shards_step_as_a_whole_model_does(ranks: int, options: dict[str, Any]) -> None:
    """The norm, the clip, AdamW and the state: of tensors that no number of ranks divides."""
    for max_norm in (0.0, 0.05):
        alone = expected(max_norm)
        told = world(ranks).run(in_a_group, run_steps.__name__, {"engine": "fsdp", **options}, max_norm)
        assert told[-1]["empty"] > 0 or ranks < 4 or "shard_size" in options
        for one in told:
            assert one["losses"] == pytest.approx(alone["losses"], rel=0, abs=1e-6)
            assert one["norms"] == pytest.approx(alone["norms"], rel=1e-5)
            assert one["norms"] == told[0]["norms"]  # the same bits on every rank
            assert one["state"].keys() == alone["state"].keys()
            for name, tensor in one["state"].items():
                assert torch.equal(tensor, told[0]["state"][name]), name
                # AdamW takes a gradient that is rounding alone for one of full size, so few elements may be off.
                assert (tensor - (other := alone["state"][name])).norm() <= 1e-3 * other.norm(), name


_expected: dict[float, Any] = {}


def expected(max_norm: float) -> Any:
    if max_norm not in _expected:
        (_expected[max_norm],) = world(1).run(run_steps, {}, max_norm)
    return _expected[max_norm]


def in_a_group(name: str, *args: Any) -> Any:
    """Call a function of this file, in a process group also where there is one rank."""
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return globals()[name](*args)
    finally:
        if alone:
            dist.destroy_process_group()


def non_finite(parallel: dict[str, Any], rank: int) -> list[tuple[bool, float, list[str]]]:
    """Two steps, the first with an infinite loss on one rank: whether applied, its norm, and what changed."""
    engine = start(objective(), **parallel)
    take_step(engine, 0)
    told = []
    for step, scale in ((1, math.inf if here().rank == rank else 1.0), (2, 1.0)):
        before = {name: whole(tensor) for name, tensor in engine.state().items()}
        _, update = take_step(engine, step, max_norm=1.0, scale=scale)
        after = {name: whole(tensor) for name, tensor in engine.state().items()}
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        told.append((bool(update.applied), float(update.grad_norm), changed))
    return told


@pytest.mark.parametrize("options", [{}, {"cpu_offload": True}], ids=str)
def test_a_non_finite_gradient_of_one_rank_changes_nothing_on_any(options: dict[str, Any]) -> None:
    for told in world(2).run(non_finite, {"engine": "fsdp", **options}, 1):
        (sick_applied, sick_norm, changed), (applied, norm, later) = told
        assert not sick_applied
        assert not math.isfinite(sick_norm)
        assert changed == []
        assert applied
        assert math.isfinite(norm)
        assert any(name.startswith("model.") for name in later)
        assert any(name.endswith(".step") for name in later)


def accumulate(parallel: dict[str, Any]) -> tuple[float, list[int]]:
    """The norm of two micro-batches' gradients, and the collectives of each backward."""
    engine = start(objective(), **parallel)
    counts: list[int] = []
    for step, sync in enumerate((False, True)):
        with counting("reduce_scatter") as calls, engine.microbatch(sync=sync):
            engine.backward(engine(share(step)).total / 2)
        counts.append(len(calls))
    return float(engine.update(0.0).grad_norm), counts


@contextmanager
def counting(word: str) -> Iterator[list[str]]:
    """Note the c10d operations with this word in their names."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if word in str(func):
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        yield calls


def test_gradients_are_reduced_at_the_last_micro_batch_alone() -> None:
    ((norm, _),) = world(1).run(accumulate, {})
    for found, (first, last) in world(2).run(accumulate, {"engine": "fsdp"}):
        assert found == pytest.approx(norm, rel=1e-5)
        assert (first, last) == (0, 5)  # three blocks, a downsample, and the rest


def gathered_when() -> tuple[dict[str, int], dict[str, int]]:
    """How many units have been gathered when each one begins to compute, in a forward and in a backward."""
    module = objective()
    engine = start(module, engine="fsdp")
    insides = ("patch_embed.0", "layers.0.blocks.0.mlp.fc2", "layers.0.downsample.1")
    insides += ("layers.1.blocks.0.mlp.fc2", "layers.1.blocks.1.mlp.fc2", "classifier.head")
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    with counting("allgather") as calls:
        for name in insides:
            part = module.backbone.get_submodule(name)
            part.register_forward_pre_hook(lambda *_, name=name: forward.update({name: len(calls)}))
            part.register_full_backward_pre_hook(lambda *_, name=name: backward.update({name: len(calls)}))
        with engine.microbatch(sync=True):
            total = engine(share(0)).total
            calls.clear()
            engine.backward(total)
    return forward, backward


def test_a_unit_is_gathered_while_the_one_before_it_computes() -> None:
    """Its own gather and the next one's have been asked for; with the root there are five, and none is asked for twice.
    Without the prefetch it would be 1 to 5, each unit's when it is its turn."""
    for forward, backward in world(2).run(gathered_when):
        assert list(forward.values()) == [2, 3, 4, 5, 5, 5]
        # The stem needs no gradient of images: nothing calls its hook before the end.
        assert list(backward)[:5] == [*reversed(forward)][:5]
        assert list(backward.values())[:5] == [2, 3, 4, 5, 5]


def watch_a_step() -> dict[str, Any]:
    """A step in bfloat16: what the scans, the norms and the projections were given, beside the masters."""
    from vmamba_dist.models import ss2d

    module = objective()
    engine = start(module, compute="bfloat16", engine="fsdp")
    masters = {name: whole(t) for name, t in engine.weights().items()}
    right, seen = ss2d.ss2d_scan, []
    linear: set[torch.dtype] = set()

    def scan(x: Tensor, projected: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((weight.dtype, *(t.detach().clone() for t in rest[:3])))
        out: Tensor = right(x, projected, weight, *rest, **options)
        return out

    def norm(part: Any, inputs: Any) -> None:
        assert part.weight.dtype == part.bias.dtype == torch.float32

    handles = [
        part.register_forward_pre_hook(
            norm if isinstance(part, ss2d.LayerNorm) else lambda p, _: linear.add(p.weight.dtype)
        )
        for part in module.modules()
        if isinstance(part, ss2d.LayerNorm | torch.nn.Linear | torch.nn.Conv2d)
    ]
    with patch.object(ss2d, "ss2d_scan", scan):
        _, update = take_step(engine, 0)
    for handle in handles:
        handle.remove()
    state = {name: t.dtype for name, t in engine.state().items()}
    return {
        "masters": masters,
        "seen": seen,
        "linear": linear,
        "state": state,
        "applied": bool(update.applied),
    }


def test_the_recurrence_computes_in_float32_with_unrounded_values() -> None:
    for told in world(2).run(watch_a_step):
        assert told["applied"]
        assert told["linear"] == {torch.bfloat16}
        assert set(told["state"].values()) == {torch.float32}
        prefixes = [n.removesuffix("A_logs") for n in told["masters"] if n.endswith("A_logs")]
        assert len(told["seen"]) == len(prefixes) == 3
        for prefix, (weight, bias, a, skip) in zip(prefixes, told["seen"], strict=True):
            assert weight == torch.bfloat16
            assert torch.equal(bias.flatten(), told["masters"][f"{prefix}dt_projs_bias"])
            assert torch.equal(a, -torch.exp(told["masters"][f"{prefix}A_logs"]))
            assert torch.equal(skip, told["masters"][f"{prefix}Ds"])
            assert not torch.equal(bias, bias.bfloat16().float())  # rounding would show


def bits_in_bfloat16() -> float:
    """The loss of one share of samples in bfloat16, with sharded and with whole weights of the same values."""
    plain = objective()
    with patch.object(dist, "is_initialized", lambda: False):
        reference = start(plain, compute="bfloat16")
    sharded = start(objective(), compute="bfloat16", engine="fsdp")
    inputs = share(0)
    return float((reference(inputs).per_sample - sharded(inputs).per_sample).abs().max())


def test_a_forward_in_bfloat16_has_the_bits_of_an_unsharded_one() -> None:
    assert world(2).run(bits_in_bfloat16) == [0.0, 0.0]


def evaluate_in_turn() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits under the raw and the averaged weights, sharded and whole, before and after a step between them."""
    module = objective()
    engine = start(module, engine="fsdp")
    ema = Ema(engine, EmaConfig(decay=0.5, warmup=False))
    images = share(9).images

    def both(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        module.eval()
        twin = create_model("vmamba_atto", num_classes=CLASSES, **ODD).eval()
        twin.load_state_dict({name.removeprefix("backbone."): whole(t) for name, t in weights.items()})
        with torch.no_grad():
            found = module.backbone(images), twin(images)
        module.train()
        return found

    told = {}
    for step in range(2):
        take_step(engine, step)
        ema.update(step + 1)
        averaged = {name.removeprefix("ema."): t for name, t in ema.state().items()}
        before = {name: whole(t) for name, t in engine.weights().items()}
        told[f"raw {step}"] = both(engine.weights())
        mean = {name: whole(t) for name, t in averaged.items()}
        with ema.in_place():
            told[f"ema {step}"] = both(mean)
        told[f"raw again {step}"] = both(before)
        assert all(torch.equal(whole(t), before[name]) for name, t in engine.weights().items())
    return told


def test_weights_swapped_in_are_those_that_a_forward_gathers() -> None:
    """Weights kept gathered after a forward, as FSDP keeps a root's by default, would be stale here."""
    for told in world(2).run(evaluate_in_turn):
        for name, (sharded, unsharded) in told.items():
            assert torch.allclose(sharded, unsharded, rtol=0, atol=1e-6), name
        assert not torch.allclose(told["raw 0"][0], told["ema 0"][0], rtol=0, atol=1e-4)


def initial_values(parallel: dict[str, Any]) -> dict[str, Tensor]:
    engine = start(objective(), **parallel)
    assert parallel.get("engine") != "fsdp" or any(isinstance(t, DTensor) for t in engine.weights().values())
    return {name: whole(t) for name, t in engine.weights().items()}


def test_initial_values_do_not_depend_on_the_sharding() -> None:
    (alone,) = world(1).run(initial_values, {})
    for ranks, options in ((2, {}), (3, {}), (4, {"shard_size": 2})):
        for values in world(ranks).run(initial_values, {"engine": "fsdp", **options}):
            assert values.keys() == alone.keys()
            assert all(torch.equal(values[name], alone[name]) for name in alone)


@contextmanager
def fake_world(size: int, rank: int) -> Iterator[World]:
    """One rank of a world whose other ranks do not exist: collectives return at once, with anything."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, rank, CPU)
    finally:
        dist.destroy_process_group()
        gc.collect()


def shards_of(
    name: str, rank: int, drawn: list[str]
) -> tuple[dict[str, tuple[int, ...]], int, dict[str, Tensor]]:
    """Shard a model on the meta device as one of 64 ranks: local shapes, bytes of all, and some initial values."""
    with fake_world(64, rank) as place:
        with torch.device("meta"):
            module = Classify(create_model(name), seed=0)
        rules = {n: (tuple(p.shape), rule) for n, p, rule in init_rules(module.backbone)}
        fsdp2.shard(
            module.backbone,
            fsdp2.make_mesh(ParallelConfig(engine="fsdp"), place),
            compute=torch.bfloat16,
            cpu_offload=False,
        )
        shapes, values, size = {}, {}, 0
        for n, p in module.backbone.named_parameters():
            held, first, end = local_part(p)
            assert held.is_meta
            assert held.shape[0] == end - first
            if isinstance(p, DTensor):
                assert (first, end) == share_of_rows(p.shape[0], rank, 64)
            shapes[n] = tuple(held.shape)
            size += 4 * held.numel()
            if n in drawn:
                values[n] = init_rows(n, *rules[n][:1], 0, rules[n][1], first, end)
        return shapes, size, values


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("vmamba_giant", (0, 41, 63)),
        pytest.param("vmamba_2b", (0, 13, 62, 63), marks=pytest.mark.slow),
    ],
)
def test_giants_are_held_in_64_shards(name: str, ranks: tuple[int, ...]) -> None:
    """On the meta device: nothing of them is made but the rows of a few parameters."""
    with torch.device("meta"):
        model = create_model(name)
    rules = {n: (tuple(p.shape), rule) for n, p, rule in init_rules(model)}
    kept_whole = fsdp2.float32_parameters(model)
    drawn = [
        "layers.2.blocks.7.op.dt_projs_weight",
        "layers.1.blocks.2.op.in_proj.weight",
        "classifier.head.bias",
    ]
    drawn += [
        "layers.0.downsample.1.bias",
        "layers.2.blocks.35.norm.weight"[: None if "giant" in name else 0],
    ]
    drawn = [n for n in drawn if n]
    total = 4 * sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in kept_whole.values()) < 2e-3 * total / 4
    for rank in ranks:
        ((shapes, size, values),) = world(1).run(shards_of, name, rank, drawn, timeout_s=120)
        assert shapes.keys() == rules.keys()
        assert size < total / 64 * 1.2
        assert values.keys() == set(drawn)
        for n, part in values.items():
            shape, rule = rules[n]
            first, end = (0, shape[0]) if n in kept_whole else share_of_rows(shape[0], rank, 64)
            assert torch.equal(part, init_tensor(n, shape, 0, rule)[first:end])
        for n, (shape, _) in rules.items():
            first, end = (0, shape[0]) if n in kept_whole else share_of_rows(shape[0], rank, 64)
            assert shapes[n] == (end - first, *shape[1:])
    for shape, _ in rules.values():  # all 64 together are the whole, in order
        cuts = [share_of_rows(shape[0], rank, 64) for rank in range(64)]
        assert cuts[0][0] == 0
        assert cuts[-1][1] == shape[0]
        assert all(a[1] == b[0] for a, b in pairwise(cuts))


def cut_giant(parallel: dict[str, Any]) -> list[tuple[float, float]]:
    engine = start(objective("vmamba_giant", dims=8), **parallel)
    taken = [take_step(engine, step, max_norm=1.0) for step in range(3)]
    return [(loss, float(update.grad_norm)) for loss, update in taken]


@pytest.mark.slow
def test_a_width_cut_giant_learns_on_four_ranks_what_it_learns_on_one() -> None:
    (alone,) = world(1).run(cut_giant, {}, timeout_s=200)
    for options in ({}, {"recompute": "selective"}):
        for told in world(4).run(cut_giant, {"engine": "fsdp", **options}, timeout_s=200):
            assert told == [pytest.approx(step, rel=1e-5) for step in alone]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"zero_stage": 1}, "parallel.zero_stage=1: parallel.engine=ddp has no such option"),
        ({"engine": "fsdp", "deepspeed_config": "a.json"}, "use parallel.engine=deepspeed"),
        ({"shard_size": 2}, "parallel.shard_size=2: parallel.engine=ddp has no such option"),
        ({"engine": "deepspeed", "replicate_size": 2}, "use parallel.engine=fsdp"),
        ({"cpu_offload": True}, "use parallel.engine=fsdp or deepspeed"),
        ({"engine": "fsdp", "shard_size": 0}, "parallel.shard_size=0: use 1 or more"),
    ],
    ids=str,
)
def test_an_option_of_another_engine_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**options)
    assert says in str(caught.value)


def test_copies_and_shards_make_up_the_world_or_are_refused() -> None:
    def of(ranks: int, **sizes: int) -> tuple[int, int]:
        return ParallelConfig(engine="fsdp", **sizes).copies_and_shards(ranks)  # type: ignore[arg-type]

    assert of(6) == (1, 6)
    assert of(6, shard_size=2) == (3, 2)
    assert of(6, replicate_size=2) == (2, 3)
    assert of(6, replicate_size=3, shard_size=2) == (3, 2)
    for sizes in (
        {"shard_size": 4},
        {"replicate_size": 4},
        {"shard_size": 2, "replicate_size": 2},
        {"shard_size": 8},
    ):
        with pytest.raises(ConfigError) as caught:
            of(6, **sizes)
        for key, value in sizes.items():
            assert f"parallel.{key}={value}" in str(caught.value)
        assert "6 ranks of this run: use parallel.shard_size=1, 2, 3 or 6" in str(caught.value)


def test_a_wrong_number_of_ranks_is_said_before_they_meet(tmp_path: Path, monkeypatch: Any) -> None:
    from vmamba_dist.config import load as load_config
    from vmamba_dist.train import run as run_training

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = [
        "parallel.engine=fsdp",
        "parallel.shard_size=3",
        "model.name=vmamba_atto",
        f"run.dir={tmp_path / 'run'}",
    ]
    with pytest.raises(ConfigError, match=r"parallel\.shard_size=3 do"):
        run_training(load_config([*args, "data.train=nowhere"]))
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def on_cuda(parallel: dict[str, Any], compute: str) -> Any:
    place = World(0, 1, 0, torch.device("cuda", 0))
    torch.cuda.set_device(place.device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    engine = parallelize(
        objective("vmamba_atto", dims=32),
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(compute=compute),  # type: ignore[arg-type]
        optim=OptimConfig(),
        world=place,
        seed=5,
    )
    engine.set_lr(1e-2)
    told = []
    for step, scale in ((0, 1.0), (1, math.inf), (2, 1.0)):
        one = share(step)
        inputs = Inputs(one.images.cuda(), one.targets.cuda(), one.positions.cuda(), step, one.keys)
        for sync in (False, True):
            with engine.microbatch(sync=sync):
                terms = engine(inputs)
                engine.backward(terms.total * scale)
        update = engine.update(1.0)
        told.append((float(terms.total), float(update.grad_norm), bool(update.applied)))
    where = {
        t.device.type for n, t in engine.state().items() if n.endswith(".exp_avg") and isinstance(t, DTensor)
    }
    return told, where, {name: whole(t) for name, t in engine.state().items()}


COMPILING_S = 240.0  # the first step compiles the kernels, a minute and more on a slow host


@pytest.mark.gpu
@pytest.mark.timeout(800)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_one_gpu_steps_the_same_plain_sharded_and_offloaded(compute: str) -> None:
    ((plain, _, _),) = world(1).run(on_cuda, {}, compute, timeout_s=COMPILING_S)
    for options, device in (({}, "cuda"), ({"cpu_offload": True}, "cpu")):
        ((told, where, state),) = world(1).run(
            on_cuda, {"engine": "fsdp", **options}, compute, timeout_s=COMPILING_S
        )
        assert where == {device}
        assert [applied for *_, applied in told] == [True, False, True]
        for (loss, norm, _), (expected_loss, expected_norm, _) in zip(told, plain, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-5 if compute == "float32" else 1e-2)
            assert norm == pytest.approx(
                expected_norm, rel=1e-4 if compute == "float32" else 5e-2, nan_ok=True
            )
        assert all(torch.isfinite(t).all() for t in state.values())
