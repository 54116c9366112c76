"""The lr is a function of samples; decay is a function of names; a step with a non-finite norm is not one."""

import math
from typing import Any

import pytest
import torch

from vmamba_dist.config.schema import ConfigError, OptimConfig, ScheduleConfig
from vmamba_dist.core.dist import World
from vmamba_dist.models import create_model
from vmamba_dist.objectives.base import Inputs
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.optim.groups import build_optimizer, decays
from vmamba_dist.optim.schedule import Schedule, build_schedule, total_samples
from vmamba_dist.parallel.ddp import DdpEngine

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_warm_up_then_cosine_to_the_floor() -> None:
    schedule = build_schedule(
        ScheduleConfig(warmup=0.1, warmup_lr_ratio=0.0, min_lr_ratio=0.1),
        OptimConfig(lr=1.0, lr_batch=0),
        global_batch=10,
        total_samples=1000,
    )
    assert schedule(0) == 0.0
    assert schedule(50) == pytest.approx(0.5)
    assert schedule(100) == pytest.approx(1.0)
    assert schedule(550) == pytest.approx(0.1 + 0.9 / 2)
    assert schedule(1000) == pytest.approx(0.1)
    assert schedule(2000) == pytest.approx(0.1)


def test_the_papers_lr_scales_with_the_batch() -> None:
    schedule = build_schedule(ScheduleConfig(), OptimConfig(), global_batch=1024, total_samples=300 * 1000)
    assert schedule.peak == pytest.approx(1e-3)
    assert schedule(20 * 1000) == pytest.approx(1e-3)
    assert schedule(0) == pytest.approx(1e-6)
    assert schedule(300 * 1000) == pytest.approx(1e-5)


def wsd(total: int, **fields: Any) -> Schedule:
    given: dict[str, Any] = {"kind": "wsd", "warmup_samples": 100, "decay": 0.2, "min_lr_ratio": 0.0} | fields
    return build_schedule(
        ScheduleConfig(**given), OptimConfig(lr=1.0, lr_batch=0), global_batch=10, total_samples=total
    )


def test_warm_up_then_constant_then_decay_by_one_minus_the_square_root() -> None:
    schedule = wsd(1000, warmup_lr_ratio=0.0)
    assert schedule(50) == pytest.approx(0.5)
    assert {schedule(n) for n in range(100, 801, 10)} == {1.0}
    assert schedule(850) == pytest.approx(0.5)  # a quarter of the decay: 1 - sqrt(1/4)
    assert schedule(1000) == schedule(2000) == pytest.approx(0)


@pytest.mark.parametrize("total", [500, 770, 999, 5000])
def test_budgets_share_their_lr_until_the_first_decays(total: int) -> None:
    """Law of branching."""
    long, short = wsd(5001), wsd(total)
    assert all(long(n) == short(n) for n in range(0, short.decays_from + 1, 10))
    assert short(short.decays_from + 10) < long(short.decays_from + 10)
    assert long.same_until(short, short.decays_from)
    assert short.same_until(long, short.decays_from)
    assert not long.same_until(short, short.decays_from + 1)


def test_schedules_that_differ_before_are_not_the_same() -> None:
    ours = wsd(1000)
    assert ours.same_until(ours, 1000)
    for other in (
        wsd(1000, warmup_samples=101),
        wsd(2000, warmup_samples=None),
        wsd(1000, warmup_lr_ratio=0.5),
        wsd(1000, kind="cosine"),
    ):
        assert not ours.same_until(other, 200)


def test_a_budget_in_samples_is_cut_to_whole_steps() -> None:
    def budget(**fields: Any) -> int:
        return total_samples(ScheduleConfig(**fields), global_batch=32, steps_per_epoch=10)

    assert budget(epochs=3) == 960
    assert budget(samples=1000) == 31 * 32
    with pytest.raises(ConfigError, match=r"less than one step of data\.global_batch=32"):
        budget(samples=31)
    with pytest.raises(ConfigError, match="the whole run has 90"):
        wsd(90)


def test_decay_by_official_shape_or_sparing_the_recurrence() -> None:
    model = create_model("vmamba_atto", num_classes=3)
    spared = {n for n, p in model.named_parameters() if not decays(n, p, "ssm_exempt")}
    official = {n for n, p in model.named_parameters() if not decays(n, p, "official")}
    block = "layers.0.blocks.0"
    assert spared - official == {
        n for n, _ in model.named_parameters() if n.endswith(("A_logs", "dt_projs_bias"))
    }
    assert {f"{block}.op.Ds", f"{block}.norm.weight", f"{block}.mlp.fc1.bias"} <= official
    assert not {f"{block}.op.x_proj_weight", f"{block}.op.dt_projs_weight", "classifier.head.weight"} & spared


def _engine(clip_free_lr: float = 1e-2) -> tuple[DdpEngine, Inputs]:
    objective = Classify(create_model("vmamba_atto", num_classes=4, drop_path_rate=0.0), seed=0)
    objective.backbone.init_weights(0)
    engine = DdpEngine(objective, build_optimizer(objective, OptimConfig()), ALONE, torch.float32)
    engine.set_lr(clip_free_lr)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = Inputs(images, torch.eye(4), torch.arange(4), 0, list("abcd"))
    return engine, inputs


def test_a_non_finite_norm_leaves_weights_and_moments_untouched() -> None:
    engine, inputs = _engine()
    engine.backward(engine(inputs).total)
    assert bool(engine.update(5.0).applied)
    before = {n: t.clone() for n, t in engine.state().items()}
    engine.backward(engine(inputs).total * math.inf)
    update = engine.update(5.0)
    assert not bool(update.applied)
    after = engine.state()
    assert all(torch.equal(before[n], after[n]) for n in before)
    engine.backward(engine(inputs).total)
    assert bool(engine.update(5.0).applied)
    assert not torch.equal(
        before["model.backbone.classifier.head.weight"], after["model.backbone.classifier.head.weight"]
    )


def test_the_state_is_whole_before_the_first_step() -> None:
    engine, inputs = _engine()
    before = set(engine.state())
    engine.backward(engine(inputs).total)
    engine.update(0.0)
    assert set(engine.state()) == before
    names = {n.removeprefix("model.") for n in before if n.startswith("model.")}
    for part in ("exp_avg", "exp_avg_sq", "step"):
        assert {f"optim.{n}.{part}" for n in names} <= before


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    norms = []
    for clip in (0.0, 0.1):
        engine, inputs = _engine()
        engine.backward(engine(inputs).total)
        grads = [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads)
        update = engine.update(clip)
        assert float(update.grad_norm) == pytest.approx(float(total))  # measured before clipping
        moment = torch.nn.utils.get_total_norm(
            [t for n, t in engine.state().items() if n.endswith("exp_avg")]
        )
        norms.append(float(moment) / 0.1)  # exp_avg = (1 - β1) · gradient after the first step
    assert norms[0] == pytest.approx(float(total), rel=1e-4)
    assert norms[1] == pytest.approx(0.1, rel=1e-3)
