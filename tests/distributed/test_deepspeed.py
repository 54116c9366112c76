"""ZeRO learns what one process learns, refuses a step as any engine does, and its partitions are every engine's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distributed.equivalence import (
    BATCH,
    BF16,
    BF16_EMA_TOLERANCE,
    BF16_NORM_TOLERANCE,
    BF16_TOLERANCE,
    EMA_TOLERANCE,
    NORM_TOLERANCE,
    TOLERANCE,
    Lines,
    apart,
    by_engine,
    distance,
    engine_class,
    learned,
    stored,
    whole,
)
from distributed.micro import metrics, train, words
from distributed.world import world
from vmamba_dist.checkpoint.convert import convert
from vmamba_dist.parallel.zero_config import load_engine

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    # Looked for, not imported: that takes seconds, and only the workers need it.
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="needs the extra: pip install -e '.[deepspeed]'"
    ),
]
SLOW = pytest.mark.slow
STAGES = (1, 2, 3)


def zero(stage: int) -> list[str]:
    return ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"]


ENGINES = {
    **{name: by_engine(name) for name in ("ddp", "fsdp", "hsdp")},
    **{f"zero{stage}": zero(stage) for stage in STAGES},
}


# micro 16: a step is one micro-batch of each of two ranks; 4: it is four.
CELLS = [
    *[(1, 2, 16), (2, 2, 4)],
    *(pytest.param(stage, 2, micro, marks=SLOW) for stage, micro in ((1, 4), (2, 16), (3, 4), (3, 16))),
    *(pytest.param(stage, ranks, 8, marks=SLOW) for stage in STAGES for ranks in (1, 4)),
]


@pytest.mark.parametrize(("stage", "ranks", "micro"), CELLS)
def test_zero_learns_what_one_process_learns(
    stage: int, ranks: int, micro: int, digits: Path, one: Path, alone: Lines, tmp_path: Path
) -> None:
    """Losses, those of the averaged weights among them, norms, before clipping, and some are clipped, and averages."""
    lines = learned(digits, tmp_path, ranks, *zero(stage), f"parallel.micro_batch={micro}")
    assert [line["samples"] for line in lines] == [line["samples"] for line in alone]
    found = apart(one, tmp_path)
    assert found.loss <= TOLERANCE
    assert found.norm <= NORM_TOLERANCE
    assert found.ema <= EMA_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("micro", [16, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_zero_learns_in_bfloat16_what_one_process_learns(
    stage: int, micro: int, digits: Path, one_in_bf16: Path, tmp_path: Path
) -> None:
    """Measured: losses 1.2e-3 to 2.4e-3 apart, norms 1.9e-2 to 2.4e-2; the table is in docs/engines.md."""
    lines = learned(digits, tmp_path, 2, BF16, *zero(stage), f"parallel.micro_batch={micro}")
    found = apart(one_in_bf16, tmp_path)
    assert found.loss <= BF16_TOLERANCE
    assert found.norm <= BF16_NORM_TOLERANCE
    assert found.ema <= BF16_EMA_TOLERANCE
    # The first forward has the same weights: only the order in which samples' losses are summed differs.
    assert lines[0]["loss"] == pytest.approx(metrics(one_in_bf16)[0]["loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mutant"),
    [(s, m) for s in STAGES for m in ("no_clip", "no_gradient_mean", "late_ema")],
)
def test_a_mutant_is_seen(stage: int, mutant: str, digits: Path, one: Path, tmp_path: Path) -> None:
    learned(digits, tmp_path, 2, *zero(stage), mutant=mutant, engine="deepspeed")
    found = apart(one, tmp_path)
    assert found.loss > 10 * TOLERANCE
    assert found.ema > 10 * EMA_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_carry_is_seen(stage: int, digits: Path, tmp_path: Path) -> None:
    state, lost = "a_state_that_matters", "lost_carry_of_a_state_that_matters"
    wide = "data.image_size=32"
    one = learned(digits, tmp_path / "one", 1, wide, mutant=state)
    two = learned(digits, tmp_path / "two", 2, wide, *zero(stage), mutant=state)
    sick = learned(digits, tmp_path / "sick", 2, wide, *zero(stage), mutant=lost)
    assert distance(one, two) <= TOLERANCE
    assert distance(one, sick) > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "word", ["parallel.cpu_offload=true", "parallel.recompute=block", "parallel.recompute=selective"]
)
def test_what_saves_memory_changes_no_loss(
    stage: int, word: str, digits: Path, alone: Lines, tmp_path: Path
) -> None:
    lines = learned(digits, tmp_path, 2, *zero(stage), word, "parallel.micro_batch=4")
    assert distance(alone, lines) <= TOLERANCE
    assert distance(alone, lines, "grad_norm") <= NORM_TOLERANCE


@pytest.mark.slow
def test_compiled_blocks_learn_what_eager_ones_learn(digits: Path, alone: Lines, tmp_path: Path) -> None:
    short = ("run.max_steps=3", "eval.every_epochs=0", "parallel.compile=block")
    world(2).run(train, words(digits, tmp_path, *short, *zero(2)), timeout_s=500)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses == pytest.approx([line["loss"] for line in alone[:3]], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_file_of_the_users_own_reaches_deepspeed(
    stage: int, digits: Path, alone: Lines, tmp_path: Path
) -> None:
    """Buckets of 1000 elements: many a step, and parameters that outgrow them."""
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}})
    )
    assert world(2).run(bucket_sizes, stage, str(own)) == [{1000}] * 2
    lines = learned(digits, tmp_path / "run", 2, *zero(stage), f"parallel.deepspeed_config={own}")
    assert distance(alone, lines) <= TOLERANCE


def bucket_sizes(stage: int, file: str) -> set[int]:
    """What DeepSpeed's own optimizer works with; ZeRO-3 has no bucket for the weights of all groups."""
    with engine_of("deepspeed", stage, file=file) as (engine, _):
        zero = engine._engine.optimizer
        return {zero.reduce_bucket_size} | ({zero.allgather_bucket_size} if stage < 3 else set())


def test_what_deepspeed_itself_refuses_is_the_users_error(digits: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"reduce_bucket": 1}}))
    args = words(digits, tmp_path / "run", *zero(2), f"parallel.deepspeed_config={own}")
    with pytest.raises(Exception, match=r"own\.json': DeepSpeed refuses it: .*reduce_bucket") as error:
        world(1).run(train, args)
    assert type(error.value).__name__ == "ConfigError"


@pytest.mark.slow
def test_every_evaluation_sees_the_weights_of_its_moment(digits: Path, tmp_path: Path) -> None:
    """ZeRO-3 gathers ahead what it has seen used after a step. Were evaluation a part of that, raw and averaged weights
    in turn, what it had gathered for one would be used for the other."""
    often = ("run.max_steps=2", "eval.every_epochs=0.01", "checkpoint.every_steps=100")
    found = {}
    for name, ranks, more in (("one", 1, []), ("zero", 2, zero(3)), ("mutant", 2, zero(3))):
        args = words(digits, tmp_path / name, *often, *more)
        world(ranks).run(train_with_evaluation_recorded, args, name == "mutant", timeout_s=240)
        found[name] = metrics(tmp_path / name)
    assert all("eval/ema/loss" in line for line in found["one"])
    assert distance(found["one"], found["zero"]) <= TOLERANCE
    assert distance(found["one"], found["mutant"]) > 10 * TOLERANCE


def train_with_evaluation_recorded(args: list[str], mutant: bool) -> str:
    blind = patch.object(engine_class("deepspeed"), "_before_backbone", lambda *_: None)
    with blind if mutant else nullcontext():
        return train(args)


# What engines hold: below the trainer, on the same micro model.


@contextmanager
def engine_of(
    engine: str,
    stage: int | None = None,
    *,
    compute: str = "float32",
    clip: float = 0.5,
    offload: bool = False,
    file: str = "",
) -> Iterator[Any]:
    """An engine over the micro model in this process's world, and what makes its rank's samples."""
    from vmamba_dist.config.schema import OptimConfig, ParallelConfig, PrecisionConfig
    from vmamba_dist.core.dist import world as joined
    from vmamba_dist.models import create_model
    from vmamba_dist.objectives.classify import Classify
    from vmamba_dist.parallel.plan import parallelize

    with ExitStack() as closing:
        place = closing.enter_context(joined("cpu", 60, alone_too=True))
        with torch.device("meta"):
            objective = Classify(create_model("vmamba_atto", num_classes=10, drop_path_rate=0.1), seed=5)
        found = parallelize(
            objective,
            parallel=ParallelConfig(
                engine=engine, zero_stage=stage, cpu_offload=offload, deepspeed_config=file
            ),  # type: ignore[arg-type]
            precision=PrecisionConfig(compute=compute),  # type: ignore[arg-type]
            optim=OptimConfig(lr=1e-3, clip=clip),
            world=place,
            seed=5,
        )
        closing.callback(found.close)
        yield found, place.rank


def inputs_of(step: int, rank: int, scale: float = 1.0) -> Any:
    from vmamba_dist.objectives.base import Inputs

    draw = torch.Generator().manual_seed(100 * step + rank)
    return Inputs(
        images=torch.randn(4, 3, 16, 16, generator=draw) * scale,
        targets=torch.eye(10)[torch.randint(10, (4,), generator=draw)],
        positions=torch.arange(4 * rank, 4 * rank + 4),
        step=step,
        keys=[f"s{i}" for i in range(4)],
    )


def one_step(engine: Any, step: int, rank: int, clip: float = 0.5, factor: float = 1.0) -> tuple[float, bool]:
    engine.set_lr(1e-3)
    with engine.microbatch(sync=True):
        terms = engine(inputs_of(step, rank))
        engine.backward(terms.total * factor)
    update = engine.update(clip)
    return float(update.grad_norm), bool(update.applied)


def fingerprints(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of each tensor, a sharded one as a whole, which is a collective."""
    return {
        name: hashlib.sha256(whole(t).contiguous().numpy().tobytes()).hexdigest()[:12]
        for name, t in tensors.items()
    }


def joint(found: list[dict[str, str]]) -> dict[str, str]:
    """Ranks' shares as one; what several have is the same."""
    union: dict[str, str] = {}
    for share in found:
        assert all(union.get(name, value) == value for name, value in share.items())
        union |= share
    return union


def initial_state(engine: str, stage: int | None) -> tuple[dict[str, str], int, int]:
    """A fresh engine's state; the most elements that were whole while it was made, and those of the largest one."""
    ours = load_engine(torch.device("cpu"))
    held: list[int] = []
    sizes: list[int] = []
    right = ours._materialise_in_parts

    def counted(objective: Any, *rest: Any) -> None:
        init = ours.init_tensor
        sizes.extend(p.numel() for p in objective.parameters())

        def spy(*args: Any) -> Tensor:
            values: Tensor = init(*args)
            held.append(values.numel() + sum(p.numel() for p in objective.parameters() if not p.is_meta))
            return values

        with patch.object(ours, "init_tensor", spy):
            right(objective, *rest)

    with patch.object(ours, "_materialise_in_parts", counted), engine_of(engine, stage) as (built, _):
        return fingerprints(built.state()), max(held, default=0), max(sizes, default=0)


@pytest.mark.parametrize("stage", STAGES)
def test_initial_values_are_every_engines(stage: int) -> None:
    """And a rank keeps its share of the moments; under ZeRO-3, no two parameters are ever whole together."""
    expected = joint([state for state, _, _ in world(1).run(initial_state, "ddp", None)])
    found = world(3).run(initial_state, "deepspeed", stage)
    assert joint([state for state, _, _ in found]) == expected
    if stage == 3:
        assert all(most == largest > 0 for _, most, largest in found)
    shares = [{name for name in state if name.startswith("optim.")} for state, _, _ in found]
    assert sum(map(len, shares)) == len(set().union(*shares))


def refused(stage: int, compute: str, sick: int, factor: float, offload: bool) -> tuple[list[Any], bool]:
    """Three steps, the second with one sick rank: (norm, applied) of each, and whether it left every bit alone."""
    with engine_of("deepspeed", stage, compute=compute, offload=offload) as (engine, rank):
        told = [one_step(engine, 0, rank)]
        before = fingerprints(engine.state())
        told.append(one_step(engine, 1, rank, factor=factor if rank == sick else 1.0))
        unmoved = fingerprints(engine.state()) == before
        told.append(one_step(engine, 2, rank))
        return told, unmoved and fingerprints(engine.state()) != before


@pytest.mark.parametrize(
    ("stage", "ranks", "compute", "factor", "offload"),
    [
        (1, 2, "float32", math.inf, False),
        (1, 1, "float32", math.nan, False),
        (2, 2, "bfloat16", math.nan, False),
        (3, 2, "float32", math.nan, False),
        pytest.param(2, 1, "float32", math.inf, False, marks=SLOW),
        *(pytest.param(s, 2, "bfloat16", math.inf, False, marks=SLOW) for s in STAGES),
        *(pytest.param(s, 2, "float32", math.inf, True, marks=SLOW) for s in STAGES),
    ],
)
def test_a_step_that_is_not_finite_is_refused_by_all(
    stage: int, ranks: int, compute: str, factor: float, offload: bool
) -> None:
    found = world(ranks).run(refused, stage, compute, ranks - 1, factor, offload)
    assert all(unmoved for _, unmoved in found)
    assert len({str(told) for told, _ in found}) == 1  # nan is not itself
    (_, first), (norm, second), (_, third) = found[0][0]
    assert (first, second, third) == (True, False, True)
    assert not math.isfinite(norm)


def clipped(
    engine: str, stage: int | None, clip: float, file: str = ""
) -> tuple[list[float], dict[str, Tensor]]:
    with engine_of(engine, stage, clip=clip, file=file) as (built, rank):
        norms = [one_step(built, step, rank, clip)[0] for step in range(2)]
        moments = {n: t.detach().clone() for n, t in built.state().items() if n.endswith("exp_avg")}
        return norms, moments


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(2, 2), (3, 2), (1, 1), *(pytest.param(*cell, marks=SLOW) for cell in ((1, 2), (2, 1)))],
)
@pytest.mark.parametrize("clip", [0.1, pytest.param(0.0, marks=SLOW), pytest.param(1e6, marks=SLOW)])
def test_clipping_is_torchs(stage: int, ranks: int, clip: float) -> None:
    """AdamW hides a gradient's scale in its step; its first moment does not."""
    expected_norms, expected = world(ranks).run(clipped, "ddp", None, clip)[0]
    found = world(ranks).run(clipped, "deepspeed", stage, clip)
    assert found[0][0] == pytest.approx(expected_norms, rel=1e-6)
    moments = {name: t for _, share in found for name, t in share.items()}
    assert moments.keys() == expected.keys()
    for name, moment in moments.items():
        assert (moment - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize("own", [{}, {"overlap_comm": True}])
@pytest.mark.parametrize("stage", [1, 2])
def test_alone_buckets_of_any_size_are_no_error(stage: int, own: dict[str, Any], tmp_path: Path) -> None:
    """Without contiguous_gradients DeepSpeed fails where a depthwise weight's gradient has a bucket to itself."""
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000, **own}}))
    expected, _ = world(1).run(clipped, "ddp", None, 0.1)[0]
    found, _ = world(1).run(clipped, "deepspeed", stage, 0.1, str(file))[0]
    assert found == pytest.approx(expected, rel=1e-6)


def host_reads(stage: int) -> list[str]:
    """Where, in a step, the host asks for what the device has computed: on a GPU it would wait for it there."""
    import traceback

    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[str] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                found.append(traceback.format_stack()[-3])
            return func(*args, **(kwargs or {}))

    with engine_of("deepspeed", stage) as (engine, rank):
        one_step(engine, 0, rank)
        with Look():
            with engine.microbatch(sync=True):
                engine.backward(engine(inputs_of(1, rank)).total)
            update = engine.update(0.5)
        seen, found = found, []
        with Look():
            assert bool(update.applied)
        assert len(found) == 1  # it would have been seen
    return seen


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_reads_nothing_on_the_host(stage: int, ranks: int) -> None:
    assert world(ranks).run(host_reads, stage) == [[]] * ranks


def ops_of_a_backward(engine: str, stage: int | None) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            count += 1
            return func(*args, **(kwargs or {}))

    with engine_of(engine, stage) as (built, rank):
        one_step(built, 0, rank)
        with built.microbatch(sync=True):
            total = built(inputs_of(1, rank)).total
            with Count():
                built.backward(total)
        return count


@pytest.mark.parametrize("stage", [1, 2])
def test_alone_zero_adds_nothing_to_a_backward(stage: int) -> None:
    """DeepSpeed's reduction would be several operations a parameter, with nobody to reduce with."""
    plain, zero = (world(1).run(ops_of_a_backward, *one)[0] for one in (("ddp", None), ("deepspeed", stage)))
    assert plain <= zero <= plain + 5


def recurrence(stage: int) -> list[str]:
    """Forward and backward in bfloat16; name the recurrence's parameters that a block saw rounded or recast."""
    from vmamba_dist.models.ss2d import SS2D

    wrong: list[str] = []
    with engine_of("ddp") as (reference, _):
        masters = {n: t.detach().clone() for n, t in reference.weights().items()}
    with engine_of("deepspeed", stage, compute="bfloat16") as (engine, rank):
        for prefix, module in engine.module.named_modules():
            if isinstance(module, SS2D):

                def look(part: Any, _inputs: Any, prefix: str = prefix) -> None:
                    for leaf in ("A_logs", "Ds", "dt_projs_bias"):
                        seen = getattr(part, leaf)
                        if seen.dtype != torch.float32 or not torch.equal(seen, masters[f"{prefix}.{leaf}"]):
                            wrong.append(f"{prefix}.{leaf}")

                module.register_forward_pre_hook(look)
        one_step(engine, 0, rank)
    rounded = [n for n, t in masters.items() if n.endswith("dt_projs_bias") and torch.equal(t, t.bfloat16())]
    return wrong + rounded


@pytest.mark.parametrize("stage", [3, *(pytest.param(s, marks=SLOW) for s in (1, 2))])
def test_the_recurrence_sees_its_masters_under_bfloat16(stage: int) -> None:
    assert world(2).run(recurrence, stage) == [[], []]


def hop(args: list[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Run a start; return its share of the state as loaded and as left, and the masters that are not the weights."""
    from vmamba_dist.train import start

    right, seen, apart = start.train, [], []

    def spied(run: Any) -> Any:
        seen.append(fingerprints(run.tensors()))
        outcome = right(run)
        seen.append(fingerprints(run.tensors()))
        if type(run.engine).__name__ == "DeepSpeedEngine":
            apart.extend(masters_apart(run.engine))
        return outcome

    with patch.object(start, "train", spied):
        assert train(args) in ("paused", "finished")
    return seen[0], seen[1], apart


def masters_apart(engine: Any) -> list[str]:
    """The parameters whose masters are not, bit for bit, what forward uses."""
    wrong = []
    for name, weight in engine.weights().items():
        start, length = engine._places[name].layout.cuts[engine._world.rank]
        used = (
            weight.detach()[:length]
            if engine._stage == 3
            else weight.detach().reshape(-1)[start : start + length]
        )
        master = engine._piece(engine._masters[engine._places[name].group], name)
        if not torch.equal(used, master):
            wrong.append(name)
    return wrong


def travelled(digits: Path, run_dir: Path, journey: list[tuple[list[str], int, int]]) -> Lines:
    """Take one run through starts of (words, ranks, steps); what one leaves the next has, to the bit."""
    left: dict[str, str] = {}
    for more, ranks, steps in journey:
        args = words(digits, run_dir, f"data.global_batch={BATCH}", f"run.max_steps={steps}", *more)
        found = world(ranks).run(hop, args, timeout_s=240)
        assert [apart for _, _, apart in found] == [[]] * ranks
        if left:
            assert joint([loaded for loaded, _, _ in found]) == left
        left = joint([kept for _, kept, _ in found])
        assert {name.partition(".")[0] for name in left} == {"model", "optim", "ema"}
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, journey[-1][2] + 1))
    return lines


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    run_dir = tmp_path_factory.mktemp("unbroken")
    world(1).run(train, words(digits, run_dir, f"data.global_batch={BATCH}", "run.max_steps=26"))
    return metrics(run_dir)


def test_a_run_goes_through_engines_and_worlds(digits: Path, unbroken: Lines, tmp_path: Path) -> None:
    """FSDP2's shards become ZeRO's and back; a third of few rows is none for some."""
    journey = [
        (by_engine("ddp"), 1, 2),
        (zero(1), 2, 3),
        (by_engine("fsdp"), 3, 4),
        (zero(3), 4, 5),
        (by_engine("hsdp"), 4, 6),
        (zero(2), 3, 7),
        (by_engine("ddp"), 2, 8),
    ]
    lines = travelled(digits, tmp_path, journey)
    assert distance(unbroken[: len(lines)], [strip(line) for line in lines]) <= TOLERANCE


@pytest.mark.slow
def test_shards_go_through_zero_and_back(digits: Path, unbroken: Lines, tmp_path: Path) -> None:
    """The other pairs, and ZeRO-1 with its partitions in another order."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"round_robin_gradients": True}}))
    engines = [
        (by_engine("fsdp"), 4),
        (zero(3), 2),
        (by_engine("fsdp"), 3),
        ([*zero(1), f"parallel.deepspeed_config={own}"], 2),
        (by_engine("hsdp"), 4),
        (zero(2), 2),
        (by_engine("fsdp"), 2),
        (zero(2), 4),
        (by_engine("fsdp"), 1),
        (zero(1), 3),
        (by_engine("hsdp"), 2),
    ]
    journey = [(more, ranks, steps) for steps, (more, ranks) in enumerate(engines, start=2)]
    lines = travelled(digits, tmp_path / "run", journey)
    assert distance(unbroken[: len(lines)], [strip(line) for line in lines]) <= TOLERANCE


def strip(line: dict[str, Any]) -> dict[str, Any]:
    """Without the evaluations that only a pause makes."""
    return {key: value for key, value in line.items() if not key.startswith("eval/")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "saved_on"),
    [
        *(("ddp", 4), ("ddp", 2), ("ddp", 1)),
        *(("fsdp", 2), ("fsdp", 1), ("hsdp", 2)),  # saved on 4: in test_equivalence.py
        *((f"zero{stage}", ranks) for stage in STAGES for ranks in (4, 2, 1)),
    ],
)
def test_what_an_engine_saved_goes_on_anywhere(
    engine: str, saved_on: int, digits: Path, unbroken: Lines, tmp_path: Path
) -> None:
    """Five steps more on each number of ranks, by one engine after the other, and back in between."""
    own = ["parallel.engine=fsdp", "parallel.shard_size=1"] if engine == "hsdp" else ENGINES[engine]
    others = [name for name in ENGINES if name not in (engine, "hsdp")]
    visits = [(ENGINES[others[(ranks + saved_on) % len(others)]], ranks) for ranks in (1, 2, 3, 4)]
    lines = travelled(digits, tmp_path, there_and_back(own, saved_on, visits))
    assert distance(unbroken[: len(lines)], [strip(line) for line in lines]) <= TOLERANCE


def there_and_back(
    own: list[str], saved_on: int, visits: list[tuple[list[str], int]]
) -> list[tuple[list[str], int, int]]:
    """A journey: two steps at home, then five at each visit and one at home again."""
    journey = [(own, saved_on, 2)]
    for more, ranks in visits:
        steps = journey[-1][2]
        journey += [(more, ranks, steps + 5), (own, saved_on, steps + 6)]
    return journey


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "saved_on"),
    [
        *((engine, ranks) for engine in ("ddp", *map("zero{}".format, STAGES)) for ranks in (4, 2, 1)),
        *(("fsdp", 2), ("fsdp", 1)),  # saved on 4: in test_equivalence.py
    ],
)
def test_an_engine_goes_on_at_another_number_of_ranks(
    engine: str, saved_on: int, digits: Path, unbroken: Lines, tmp_path: Path
) -> None:
    """Five steps more on each, of what the same engine saved: partitions cut for other ranks."""
    own = ENGINES[engine]
    visits = [(own, ranks) for ranks in (1, 2, 3, 4) if ranks != saved_on]
    lines = travelled(digits, tmp_path, there_and_back(own, saved_on, visits)[:-1])
    assert distance(unbroken[: len(lines)], [strip(line) for line in lines]) <= TOLERANCE


@pytest.mark.slow
def test_copies_of_shards_come_from_whole_weights_and_become_partitions(
    digits: Path, unbroken: Lines, tmp_path: Path
) -> None:
    """HSDP 2 × 2, five steps at each arrival there and at the first from there."""
    hsdp = by_engine("hsdp")
    journey = [
        (by_engine("ddp"), 4, 2),
        (hsdp, 4, 7),
        (zero(1), 2, 12),
        (hsdp, 4, 17),
        (zero(2), 3, 18),
        (hsdp, 4, 23),
        (by_engine("ddp"), 1, 26),
    ]
    lines = travelled(digits, tmp_path, journey)
    assert distance(unbroken, [strip(line) for line in lines]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_engine_and_world_repeats_every_bit(stage: int, digits: Path, tmp_path: Path) -> None:
    """At four ranks: with two, every order of summation gives the same bits."""
    common = [f"data.global_batch={BATCH}", "checkpoint.every_steps=100", *zero(stage)]
    world(4).run(train, words(digits, tmp_path / "whole", "run.max_steps=6", *common), timeout_s=240)
    for steps in (3, 6):
        args = words(digits, tmp_path / "broken", f"run.max_steps={steps}", *common)
        world(4).run(train, args, timeout_s=240)
    whole, broken = metrics(tmp_path / "whole"), metrics(tmp_path / "broken")
    assert [strip(line) for line in broken[:3]] == whole[:3]
    assert broken[3:] == whole[3:]


@pytest.mark.slow
def test_the_quick_start_learns_the_same(digits: Path, tmp_path: Path) -> None:
    columns = {}
    for name, more in (("ddp", by_engine("ddp")), *((f"zero{s}", zero(s)) for s in STAGES)):
        run_dir = tmp_path / name
        args = [
            "config=configs/quickstart.yaml",
            f"run.dir={run_dir}",
            f"data.train={digits}",
            "run.max_steps=20",
        ]
        args += ["telemetry.tensorboard=false", "precision.compute=float32", *more]
        world(2).run(train, args, timeout_s=400)
        columns[name] = [line["loss"] for line in metrics(run_dir)]
    assert len(columns["ddp"]) == 20
    assert columns["ddp"][-1] <= 0.8 * columns["ddp"][0]
    for column in columns.values():
        assert column == pytest.approx(columns["ddp"], rel=0, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_deepspeed_loads_what_was_converted_for_it(
    stage: int, ranks: int, digits: Path, converted: tuple[Path, dict[str, str]]
) -> None:
    """Weights, moments and steps to the bit; each group's weight decay; and it goes on as we do.

    ZeRO-3's loader (0.19.8) gives the first group's hyper-parameters to all: what we write has none, which the
    weight decays here show. It also hands one `step` to all groups, which then counts once a group and an update:
    that is in no file's hands, so here, as a user has to, each group is given a copy of its own.
    """
    folder, expected = converted
    theirs = world(ranks).run(loaded_by_deepspeed, str(folder / "out"), stage)
    assert joint([state for state, *_ in theirs]) == expected
    ours = world(ranks).run(loaded_by_ourselves, str(folder / "run"))
    for (_, decays, losses), (decays_of_ours, losses_of_ours) in zip(theirs, ours, strict=True):
        assert decays == decays_of_ours == [0.05, 0.0]
        assert losses == pytest.approx(losses_of_ours, rel=0, abs=TOLERANCE)


@pytest.fixture(scope="module")
def converted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run and its checkpoint in DeepSpeed's universal format; and what of it DeepSpeed has a place for."""
    folder = tmp_path_factory.mktemp("universal")
    world(2).run(train, words(digits, folder / "run", *zero(3), "run.max_steps=4"), timeout_s=240)
    convert(folder / "run", folder / "out", format="universal")
    kept = {name: t for name, t in stored(folder / "run").items() if not name.startswith("ema.")}
    return folder, fingerprints(kept)


def loaded_by_deepspeed(folder: str, stage: int) -> tuple[dict[str, str], list[float], list[float]]:
    with engine_of("deepspeed", stage) as (engine, rank):
        engine._engine._config.load_universal_checkpoint = True
        engine._engine.load_checkpoint(folder)
        assert not masters_apart(engine)
        state, optimizer = fingerprints(engine.state()), engine._zero.optimizer
        if stage == 3:
            for moments in optimizer.state.values():
                moments["step"] = moments["step"].clone()
        return state, weight_decays(optimizer), next_losses(engine, rank)


def loaded_by_ourselves(run_dir: str) -> tuple[list[float], list[float]]:
    with engine_of("ddp") as (engine, rank):
        kept, tensors = stored(Path(run_dir)), engine.state()
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
        engine.load(tensors)
        return weight_decays(engine._optimizer), next_losses(engine, rank)


def weight_decays(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


def next_losses(engine: Any, rank: int) -> list[float]:
    """This rank's, of five steps."""
    losses = []
    for step in range(5):
        engine.set_lr(1e-2)
        with engine.microbatch(sync=True):
            terms = engine(inputs_of(step, rank))
            engine.backward(terms.total)
        assert bool(engine.update(0.5).applied)
        losses.append(float(terms.total))
    return losses
