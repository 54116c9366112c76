"""The small parts of a step: EMA, metrics, health, stopping, counters, drop path."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vmamba_dist.config import ConfigError, load
from vmamba_dist.config.schema import EmaConfig, EvalConfig
from vmamba_dist.core.dist import World
from vmamba_dist.core.rng import counter_uniform
from vmamba_dist.core.state import TrainState
from vmamba_dist.objectives.drop_path import keep_masks
from vmamba_dist.parallel.ddp import DdpEngine
from vmamba_dist.train import stopping
from vmamba_dist.train.ema import Ema
from vmamba_dist.train.health import note_bad
from vmamba_dist.train.loop import lookahead
from vmamba_dist.train.meter import MetricsLog, Report
from vmamba_dist.train.sources import open_sources
from vmamba_dist.train.stopping import StopRequest, note_evaluation, out_of_patience


def engine_of(module: nn.Module) -> DdpEngine:
    """One process, no wrapper."""
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    return DdpEngine(module, optimizer, World(0, 1, 0, torch.device("cpu")), torch.float32)


def test_ema_follows_by_its_decay_and_swaps_in_place() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(engine_of(module), EmaConfig(decay=0.9, warmup=False))
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema.update(1)
    ema.update(2)
    assert float(ema.state()["ema.weight"]) == pytest.approx(1 - 0.9**2)
    with ema.in_place():
        assert module.weight.item() == pytest.approx(0.19)
        assert float(ema.state()["ema.weight"]) == 1.0
    assert module.weight.item() == 1.0


def test_ema_warm_up_is_short_at_first_and_reaches_the_decay() -> None:
    ema = Ema(engine_of(nn.Linear(1, 1)), EmaConfig(decay=0.99))
    assert ema.decay(1) == pytest.approx(2 / 11)
    assert ema.decay(10_000) == 0.99


@pytest.mark.parametrize(("after", "kept"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_metrics_are_cut_after_the_loaded_step_and_at_a_torn_line(
    tmp_path: Path, after: int, kept: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    log = MetricsLog(path, after_step=after)
    log.write({"step": kept + 1})
    log.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, kept + 2))


def test_a_state_counts_consumed_samples_and_round_trips() -> None:
    state = TrainState()
    for data_step in range(5):  # 3 steps an epoch of 8 samples
        state.advance(samples=8, data_step=data_step, steps_per_epoch=3)
    assert (state.step, state.samples, state.epoch, state.offset) == (5, 40, 1, 16)
    state.advance(samples=8, data_step=5, steps_per_epoch=3)
    assert (state.epoch, state.offset) == (2, 0)
    again = TrainState()
    again.load_dict(json.loads(json.dumps(state.to_dict())))
    assert again == state
    with pytest.raises(KeyError, match="novel"):
        again.load_dict({"novel": 1})


def test_another_batch_goes_on_at_its_next_whole_step() -> None:
    state = TrainState(epoch=1, offset=24)
    state.align(16, steps_per_epoch=4)
    assert (state.epoch, state.offset) == (1, 32)
    state.align(48, steps_per_epoch=1)
    assert (state.epoch, state.offset) == (2, 0)


def report(step: int, **fields: Any) -> Report:
    plain = Report(
        step,
        data_step=step - 1,
        epoch=0,
        seen=64,
        samples=0,
        lr=0.0,
        loss=0.0,
        grad_norm=1.0,
        applied=True,
        stop=False,
        bad=0,
        data_wait=0.0,
        step_time=1.0,
        samples_per_s=1.0,
        waits=(0.0,),
        own=(1.0,),
        product=(0.0,),
    )
    return replace(plain, **fields)


@pytest.mark.parametrize(
    ("bad", "seen", "fraction", "epoch_samples", "allowed"),
    [
        (3, 64, 0.03, 100, None),
        (3, 64, 0.02, 100, 2),
        (29, 64, 0.29, 100, None),
        (11, 64, 0.001, 10**9, 10),
        (11, 20_000, 0.001, 10**9, None),
    ],
)
def test_bad_samples_are_counted_against_the_epoch_or_what_was_seen_of_a_large_one(
    bad: int, seen: int, fraction: float, epoch_samples: int, allowed: int | None
) -> None:
    found = note_bad(
        TrainState(), report(1, bad=bad, seen=seen), fraction=fraction, epoch_samples=epoch_samples
    )
    assert found == allowed


def test_bad_samples_are_counted_in_their_own_epoch() -> None:
    """A report comes a step late: the last steps of an epoch used to be counted in the next one."""
    state = TrainState()
    for step in range(1, 9):  # two bad samples in each epoch of four steps, at its end
        state.advance(samples=8, data_step=step - 1, steps_per_epoch=4)
        if step > 1:
            before = report(step - 1, epoch=(step - 2) // 4, bad=int((step - 2) % 4 > 1))
            assert note_bad(state, before, fraction=2 / 32, epoch_samples=32) is None
    assert (state.bad_epoch, state.bad_in_epoch) == (1, 1)


def test_patience_counts_evaluations_since_the_best() -> None:
    state = TrainState()
    for value in (float("nan"), 1.0, 3.0, 2.0, float("nan"), 2.5):
        note_evaluation(state, value, higher_is_better=True)
    assert (state.best, state.evals_since_best) == (3.0, 3)
    assert out_of_patience(state, EvalConfig(patience=3))
    assert not out_of_patience(state, EvalConfig(patience=4))
    assert not out_of_patience(state, EvalConfig())


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_sets_a_flag_and_a_later_interrupt_does_not_wait(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.signal == number
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passing on the same Ctrl-C
        monkeypatch.setattr(stopping, "AGAIN_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lookahead_marks_the_last(count: int) -> None:
    assert [last for last, _ in lookahead(range(count))] == [False] * (count - 1) + [True] * (count > 0)


def test_counter_uniform_is_uniform_and_its_counters_independent() -> None:
    steps, positions = torch.arange(100)[:, None], torch.arange(1000)[None, :]
    u = counter_uniform(7, "test", steps, positions)
    assert u.shape == (100, 1000)
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    counts = torch.histc(u, 20, 0, 1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 50  # χ² with 19 degrees of freedom: p < 1e-4
    for shifted in (u[1:] - u[:-1], u[:, 1:] - u[:, :-1]):
        assert abs(float(shifted.std()) - (1 / 6) ** 0.5) < 0.01
    assert not torch.equal(u, counter_uniform(8, "test", steps, positions))
    assert not torch.equal(u, counter_uniform(7, "tset", steps, positions))
    assert torch.equal(u[3:4], counter_uniform(7, "test", 3, positions))


def test_drop_path_masks_depend_on_the_position_and_not_on_the_batch_around_it() -> None:
    rates = [0.0, 0.2, 0.5]
    masks = keep_masks(1, 4, torch.arange(4000), rates)
    assert masks is not None
    assert masks.shape == (4000, 6)
    part = keep_masks(1, 4, torch.tensor([17, 3]), rates)
    assert part is not None
    assert torch.equal(part, masks[[17, 3]])
    for column, rate in enumerate(r for r in rates for _ in range(2)):
        assert set(masks[:, column].tolist()) <= {0.0, float(torch.tensor(1 / (1 - rate)))}
        assert float((masks[:, column] == 0).float().mean()) == pytest.approx(rate, abs=0.03)
    assert not torch.equal(masks[:, 2], masks[:, 3])
    assert keep_masks(1, 4, torch.arange(4), [0.0, 0.0]) is None


@pytest.mark.gpu
def test_drop_path_masks_on_a_gpu_are_a_cpus_and_keep_no_host_waiting() -> None:
    """They are drawn first in a forward: a host that waited there would never run ahead of the device."""
    expected = keep_masks(1, 4, torch.arange(64), [0.1, 0.5])
    positions = torch.arange(64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = keep_masks(1, 4, positions, [0.1, 0.5])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert expected is not None
    assert masks is not None
    assert torch.equal(masks.cpu(), expected)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.name=vmamba_tny", "model.name=vmamba_tny: model 'vmamba_tny' is unknown; did you mean"),
        ("model.scan_backend=triton", "model.scan_backend=triton: backend='triton' cannot run on"),
        ("data.train=nowhere", "data.train='nowhere' has no _info.json"),
        ("run.seed=1", "data.train is not set"),
    ],
)
def test_what_cannot_run_here_is_said_before_anything_starts(
    word: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError) as caught:
        open_sources(load(["precision.device=cpu", word]), world_size=1)
    assert says in str(caught.value)
