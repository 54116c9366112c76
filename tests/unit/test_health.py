"""Verdicts on a step, what a roll-back leaves out, the autopsy, the slowest rank, and the watch on a hang."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from vmamba_dist.config import ConfigError, load
from vmamba_dist.config.schema import RunConfig
from vmamba_dist.core.dist import World
from vmamba_dist.core.log import Bar
from vmamba_dist.core.state import TrainState
from vmamba_dist.data.order import updates
from vmamba_dist.models import create_model
from vmamba_dist.objectives.base import Inputs
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.parallel.ddp import DdpEngine
from vmamba_dist.train import rollback, watch
from vmamba_dist.train.health import (
    MIN_KNOWN,
    WINDOW,
    TrainingStoppedError,
    autopsy,
    find_nonfinite,
    note_step,
)
from vmamba_dist.train.meter import MetricsLog, Report
from vmamba_dist.train.pace import Pace, slowest
from vmamba_dist.train.probe import Probe
from vmamba_dist.train.progress import Progress
from vmamba_dist.train.record import Record, Writers
from vmamba_dist.train.watch import EXIT_CODE, MissingRanksError, Watch

CPU = torch.device("cpu")


def report(step: int, loss: float = 1.0, **fields: Any) -> Report:
    plain = Report(
        step,
        data_step=step - 1,
        epoch=0,
        seen=64,
        samples=0,
        lr=0.0,
        loss=loss,
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
    return dataclasses.replace(plain, **fields)


def sick(where: str) -> tuple[DdpEngine, Inputs]:
    objective = Classify(create_model("vmamba_atto", num_classes=4, drop_path_rate=0.0), seed=0)
    objective.backbone.init_weights(0)
    images = torch.randn(4, 3, 32, 32)
    targets = torch.eye(4)
    if where == "image":
        images[2, 0, 5, 5] = float("nan")
    elif where == "target":
        targets[1] = float("inf")
    elif where == "weight":
        with torch.no_grad():
            objective.backbone.get_parameter("layers.1.blocks.0.op.out_proj.weight")[0] = float("inf")
    elif where in ("overflow", "compiled"):
        with torch.no_grad():
            objective.backbone.get_parameter("layers.2.blocks.1.mlp.fc1.weight").fill_(1e38)
    elif where == "gradient":
        objective.backbone.get_submodule("layers.1.blocks.0.mlp.fc2").register_full_backward_pre_hook(
            lambda _m, gradients: (
                torch.cat([gradients[0][:2], gradients[0][2:3] * math.nan, gradients[0][3:]]),
            )
        )
    if where == "compiled":
        for block in objective.backbone.get_submodule("layers.2.blocks").children():
            block.compile(dynamic=False)
    engine = DdpEngine(
        objective,
        torch.optim.AdamW(objective.parameters(), fused=True),
        World(0, 1, 0, CPU),
        torch.float32,
    )
    return engine, Inputs(images, targets, torch.arange(4), 0, ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("image", "input images; samples c"),
        ("target", "targets; samples b"),
        ("weight", "parameter backbone.layers.1.blocks.0.op.out_proj.weight"),
        ("overflow", "output of backbone.layers.2.blocks.1.mlp.fc1"),
        ("compiled", "output of backbone.layers.2.blocks.1.mlp.fc1"),
        ("gradient", "gradient at the output of backbone.layers.1.blocks.0.mlp.fc2; samples c"),
        ("nowhere", None),
    ],
)
def test_an_autopsy_names_the_first_non_finite_thing_and_its_samples(where: str, says: str | None) -> None:
    engine, inputs = sick(where)
    found = find_nonfinite(engine, inputs)
    if says is None:
        assert found is None
        assert autopsy(engine, [inputs]) == "every tensor is finite when the last samples are run again"
    else:
        assert found is not None
        assert found.text.startswith(says)
        assert found.own
        assert autopsy(engine, [inputs]) == f"rank 0: {found.text}"
    assert all(p.grad is None for p in engine.module.parameters())
    assert not any(m._forward_hooks for m in engine.module.modules())


def test_the_third_non_finite_step_in_a_row_is_fatal() -> None:
    state = TrainState()
    pattern = "xx.xxx"  # applied where there is a dot
    found = [
        note_step(state, report(i, loss=math.nan, applied=c == "."), spike=0)
        for i, c in enumerate(pattern, start=1)
    ]
    assert found[:-1] == [None] * 5
    assert found[-1] is not None
    assert (found[-1].steps, found[-1].fatal, found[-1].finite) == (3, True, False)
    assert (state.nonfinite, state.nonfinite_in_a_row, state.losses) == (5, 3, [])


@pytest.mark.parametrize("known", [0, MIN_KNOWN - 1, MIN_KNOWN, WINDOW, 3 * WINDOW])
def test_a_spike_is_measured_by_the_median_once_enough_is_known(known: int) -> None:
    state = TrainState()
    losses = [2.0 + random.Random(i).uniform(-0.5, 0.5) for i in range(known)]
    for step, loss in enumerate(losses, start=1):
        assert note_step(state, report(step, loss), spike=3) is None
    assert state.losses == losses[-WINDOW:]
    step = known + 1
    assert note_step(state, report(step, 5.9), spike=3) is None or known >= MIN_KNOWN
    state = TrainState(losses=losses[-WINDOW:])
    found = note_step(state, report(step, 9.0), spike=3)
    assert (found is not None) == (known >= MIN_KNOWN)
    if found is not None:
        assert found.why.startswith(f"step {step}: the loss is 9, ")
        assert (found.steps, found.finite, found.fatal) == (1, True, False)
    found = note_step(state, report(step + 1, math.inf, applied=False), spike=3)
    assert found is not None  # whatever is known
    assert (found.finite, found.fatal) == (False, False)
    assert note_step(state, report(step + 2, 9e9), spike=0) is None
    assert state.spikes == 1 + (known >= MIN_KNOWN)


def test_what_is_left_out_is_what_was_learned_from_last() -> None:
    assert rollback.union([[3, 5], [9, 10]], [[5, 6], [0, 1]]) == [[0, 1], [3, 6], [9, 10]]
    assert rollback.steps_up_to(7, 3, []) == [[5, 8]]
    assert rollback.steps_up_to(7, 3, [[4, 7]]) == [[2, 4], [7, 8]]
    assert rollback.steps_up_to(1, 3, []) == [[0, 2]]
    assert rollback.to_leave_out(7, 1, []) == [[7, 8]]
    assert rollback.to_leave_out(7, 1, [[2, 6]]) == [[7, 8]]
    assert rollback.to_leave_out(7, 1, [[5, 7]]) == [[4, 5], [7, 8]]  # skipping 5 and 6 was no cure
    assert rollback.name([[7, 8]]) == "data step 7"
    assert rollback.name([[2, 4], [7, 8]]) == "data steps 2–3, 7"


@pytest.mark.parametrize("seed", range(20))
def test_steps_up_to_walks_the_order_backwards(seed: int) -> None:
    rng = random.Random(seed)
    skipped = rollback.union([], [[a, a + rng.randrange(1, 4)] for a in rng.sample(range(40), 5)])
    taken = [
        10 * epoch + step
        for (epoch, step), _ in zip(updates(10, 0, 0, [(a, b) for a, b in skipped]), range(30), strict=False)
    ]
    for i in range(5, 30):
        found = [t for a, b in rollback.steps_up_to(taken[i], 4, skipped) for t in range(a, b)]
        assert found == taken[i - 3 : i + 1]


def test_a_roll_back_is_on_the_disk_and_a_torn_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rollbacks.jsonl"
    assert rollback.recorded(path) == []
    first = rollback.Entry(1, 30, [[29, 30]], "why")
    rollback.record(path, first)
    with path.open("a") as file:
        file.write('{"number": 2, "step')  # a kill tore it: the attempt did not go back
    assert rollback.recorded(path) == [first]
    second = rollback.Entry(2, 40, [[37, 40]], "why")
    rollback.record(path, second)
    assert rollback.recorded(path) == [first, second]
    state = TrainState(nonfinite_in_a_row=2)
    rollback.apply(state, [first, second])
    assert (state.rollbacks, state.skipped, state.nonfinite_in_a_row) == (2, [[29, 30], [37, 40]], 0)
    knows = TrainState(nonfinite_in_a_row=1, rollbacks=2, skipped=[[29, 30], [37, 40]])
    rollback.apply(knows, [first, second])
    assert knows == TrainState(nonfinite_in_a_row=1, rollbacks=2, skipped=[[29, 30], [37, 40]])


@pytest.mark.parametrize(("most", "before"), [(0, 0), (2, 1), (2, 2)])
def test_a_spike_stands_or_goes_back_or_stops(
    most: int, before: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = TrainState(losses=[2.0] * 20, rollbacks=before, skipped=[[9, 10]])
    metrics = MetricsLog(tmp_path / "metrics.jsonl", after_step=0)
    record = Record(
        state,
        Writers(metrics, None, Bar(None, None), None, 10, 100),
        RunConfig(loss_spike=3, max_rollbacks=most),
        rollbacks=tmp_path / "rollbacks.jsonl",
        autopsy=lambda: "all is finite",
        flops_per_sample=1,
        peak_flops=None,
        memory_gib=lambda: 0,
        max_bad_fraction=0,
        epoch_samples=100,
    )
    spike = report(31, 8.0)
    if most == 0:
        assert record.note(spike) is False
        assert "run.max_rollbacks=0, so it stands" in caplog.text
    elif before < most:
        with pytest.raises(rollback.RollBack):
            record.note(spike)
        entry = rollback.recorded(tmp_path / "rollbacks.jsonl")[0]
        assert (entry.number, entry.step, entry.skipped) == (2, 31, [[30, 31]])
        assert "going back, data step 30 left out (roll-back 2 of 2)" in caplog.text
    else:
        with pytest.raises(
            TrainingStoppedError, match=r"run\.max_rollbacks=2 is spent, with data step 9 left out"
        ):
            record.note(spike)
        assert "and now it is data step 30: look at the data and the learning rate" in caplog.text
    metrics.close()
    assert state.spikes == 1


@pytest.mark.parametrize(
    ("own", "waits", "rank", "behind"),
    [
        ([1.0, 1.0, 1.3, 1.1], [0, 0, 0, 0], 2, 0.3),
        ([1.0, 2.0], [0, 0], 1, 1.0),
        (
            [4.0, 4.0, 4.0],
            [0.0, 1.5, 0.1],
            1,
            0.28,
        ),  # own times are levelled where the forward pass meets others
        ([0.0, 0.0], [0, 0], 0, 0.0),
    ],
)
def test_the_slowest_rank_is_measured_by_the_median_one(
    own: list[float], waits: list[float], rank: int, behind: float
) -> None:
    found = slowest(own, waits, step_time=5.0)
    assert (found.rank, found.behind) == (rank, pytest.approx(behind))


def test_a_slow_rank_is_named_with_its_host_and_not_too_often(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace(["a", "b", "c"], every=4)
    caplog.set_level(logging.WARNING)
    for step in range(1, 30):
        own = (0.0, 0.0, 0.0) if step == 1 else (1.0, 9.0, 1.0) if step == 2 else (1.0, 1.0, 1.25)
        pace.note(report(step, own=own, waits=(0.0, 0.0, 0.2)))
    assert len(caplog.records) == 1  # nothing about rank 1, whose first step was slow
    assert "rank 2 on c is 25% behind the median rank over the last 4 steps" in caplog.text


@pytest.mark.parametrize(
    ("timings", "named"),
    [
        ([(0.010, 0.010, 0.014)] * 4, True),
        ([(0.010, 0.010, 0.014), (0.010, 0.010, 0.010)] * 2, False),  # off once, as anything may be
        ([(0.010, 0.010, 0.014)], False),  # nothing to compare it with yet
        ([], False),
    ],
)
def test_a_rank_is_named_for_the_product_where_steps_are_levelled(
    timings: list[tuple[float, ...]], named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Under FSDP all ranks' own times are the same, as the fast ones wait in the forward."""
    pace = Pace(["a", "b", "c"], every=4)
    caplog.set_level(logging.WARNING)
    timed = dict(zip(range(4, 100, 4), timings, strict=False))
    for step in range(1, 30):
        product = timed.get(step, (0.0, 0.0, 0.0))
        pace.note(report(step, own=(1.0, 1.0, 1.0), waits=(0.0, 0.0, 0.0), product=product))
    assert len(caplog.records) == named
    if named:
        assert "rank 2 on c is 40% behind the median rank over the last 4 steps" in caplog.text
        assert ", and 0.014 s for a fixed product against 0.01 s; the others wait for it" in caplog.text


def test_the_probe_is_timed_at_its_steps_and_read_once() -> None:
    probe = Probe(CPU, torch.float32, every=3)
    state = torch.get_rng_state()
    told = []
    for step in range(1, 8):
        probe.run(step)
        told.append(probe.read() > 0)
    assert told == [step % 3 == 0 for step in range(1, 8)]
    assert probe.read() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_marks_and_measures_a_ranks_own_time() -> None:
    progress = Progress(CPU)
    begun = time.perf_counter()
    for step in (1, 2, 3):
        progress.begin(step)
        time.sleep(0.01)
        for phase in ("forward", "backward", "forward", "backward", "update"):
            progress.at(phase)
        time.sleep(0.02)
        own = progress.own_time()
        assert own == 0 if step == 1 else 0.01 <= own < time.perf_counter() - begun - 0.02
    assert (progress.place.count, progress.place.step, progress.place.phase) == (18, 3, "update")
    assert list(progress.through("ab", "evaluation")) == ["a", "b"]
    progress.at("report", 2)
    assert (progress.place.count, progress.place.step, progress.place.phase) == (21, 2, "report")


class Ranks:
    """Three ranks' watches in one process, each with a heartbeat thread of its own."""

    def __init__(self, folder: Path, timeout_s: float = 0.8) -> None:
        self.folder = folder
        self.progress = [Progress(CPU) for _ in range(3)]
        self.ended: list[int] = []
        self.end = threading.Event()
        self.watches = [
            Watch(folder, 4, World(rank, 3, rank, CPU), progress, timeout_s, end=self.note(rank))
            for rank, progress in enumerate(self.progress)
        ]

    def note(self, rank: int) -> Any:
        def end(code: int) -> None:
            assert code == EXIT_CODE
            self.ended.append(rank)
            self.end.set()

        return end

    def all_at(self, step: int, *phases: str) -> None:
        for progress in self.progress:
            progress.begin(step)
            for phase in phases:
                progress.at(phase)


def test_a_rank_that_lives_and_does_not_come_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(tmp_path / "alive")
    with ExitStack() as stack:
        for one in ranks.watches:
            stack.enter_context(one.watching())
        ranks.all_at(7)
        for progress in (ranks.progress[0], ranks.progress[2]):
            progress.at("forward")
            progress.at("backward")
        assert ranks.end.wait(5)
    assert ranks.ended[0] in (0, 2)
    assert "step 7: rank 1 did not arrive within 0." in caplog.text
    assert "(parallel.timeout_s=0.8), and the others wait in backward. Rank 1 (host " in caplog.text
    assert " lives, at step 7, data, for 0." in caplog.text
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1  # both others saw it, one told
    assert not any(thread.name == "watch" for thread in threading.enumerate())
    assert not list((tmp_path / "alive").glob("rank-*"))


def test_a_silent_rank_is_named_with_where_it_was_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(tmp_path / "alive")
    with ExitStack() as stack:
        for one in ranks.watches[:2]:
            stack.enter_context(one.watching())
        with ranks.watches[2].watching():
            ranks.all_at(3, "forward", "backward")
            time.sleep(0.2)
            kept = (tmp_path / "alive" / "rank-00002.json").read_bytes()
        (tmp_path / "alive" / "rank-00002.json").write_bytes(kept)  # a stopped process removes nothing
        assert ranks.end.wait(5)
    assert "step 3: rank 2 did not arrive" in caplog.text
    assert "was last seen at step 3, backward, " in caplog.text
    assert " s ago, and is silent since" in caplog.text


@pytest.mark.parametrize("phase", ["saving", "loading", "data"])
def test_long_phases_end_nothing(phase: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even where one of them has not come to the save yet; where all are in one phase, at most a warning."""
    ranks = Ranks(tmp_path / "alive", timeout_s=0.4)
    with ExitStack() as stack:
        for one in ranks.watches:
            stack.enter_context(one.watching())
        ranks.all_at(5, phase)
        if phase != "data":
            ranks.progress[0].at(phase)
        time.sleep(1)
    assert not ranks.ended
    assert [r for r in caplog.records if r.levelno == logging.ERROR] == []
    assert ("step 5: all ranks are in data, for 0.3" in caplog.text) == (phase == "data")


def test_a_rank_that_moves_on_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(tmp_path / "alive", timeout_s=0.5)
    with ExitStack() as stack:
        for one in ranks.watches:
            stack.enter_context(one.watching())
        for step in range(20):
            ranks.all_at(step, "forward", "backward")
            time.sleep(0.05)
    assert not ranks.ended
    assert not caplog.records


def test_an_error_of_a_collective_that_timed_out_names_who_is_missing(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "alive", timeout_s=0.4)
    timed_out = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 400ms for recv")
    with ExitStack() as stack:
        for one in ranks.watches[1:]:
            stack.enter_context(one.watching())
        ranks.all_at(5)
        ranks.progress[0].at("saving")  # where the watch itself ends nothing

        def fail() -> None:
            with ranks.watches[0].watching():
                time.sleep(0.5)
                raise timed_out

        with pytest.raises(MissingRanksError, match="step 5: ranks 1, 2 did not arrive") as caught:
            fail()
        assert caught.value.__cause__ is timed_out
        early = Watch(tmp_path / "alive", 4, World(0, 3, 0, CPU), Progress(CPU), 0.4)
        with pytest.raises(RuntimeError, match="gloo") as plain, early.watching():
            raise timed_out  # at once: a peer has died, and nothing here is known of it
        assert plain.value is timed_out
    assert not ranks.ended


def test_a_heartbeat_that_failed_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One OSError used to end the thread, and the rank was then taken for silent."""
    ranks = Ranks(tmp_path / "alive")
    beats = tmp_path / "alive" / "rank-00000.json"

    def wait_for_beats(count: int) -> None:
        deadline = time.monotonic() + 5
        seen = set()
        while len(seen) < count:
            assert time.monotonic() < deadline
            with suppress(FileNotFoundError, ValueError):
                seen.add(json.loads(beats.read_bytes())["number"])
            time.sleep(0.01)

    with ranks.watches[0].watching():
        wait_for_beats(2)
        for _ in range(2):
            (tmp_path / "alive").rename(tmp_path / "away")
            time.sleep(0.3)  # some beats
            (tmp_path / "away").rename(tmp_path / "alive")
            wait_for_beats(2)
    assert caplog.text.count("the heartbeat in") == 2  # once each time
    assert not ranks.ended


def test_another_attempts_heartbeats_count_for_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "alive"
    folder.mkdir()
    (folder / "rank-00007.json").write_text("of a larger world")
    (folder / "verdict-3").write_text("of an attempt before")
    beat = watch.Beat(3, 1, "host", 1, 99, time.time(), 10**6, 10**5, "data", 0.0)
    (folder / "rank-00001.json").write_text(json.dumps(dataclasses.asdict(beat)))
    ranks = Ranks(folder, timeout_s=0.4)
    with ExitStack() as stack:
        for one in (ranks.watches[0], ranks.watches[2]):
            stack.enter_context(one.watching())
        assert sorted(path.name for path in folder.iterdir() if path.name != "rank-00000.json") == [
            "rank-00001.json"
        ]
        ranks.all_at(5, "backward")
        assert ranks.end.wait(5)
        told = (folder / "verdict-4").read_text()
    assert "step 5: rank 1 did not arrive" in told
    assert told.endswith("Rank 1 has given no sign of life in this attempt")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("run.loss_spike=0.5", "run.loss_spike=0.5: a factor over the usual loss"),
        ("run.max_rollbacks=-1", "run.max_rollbacks=-1: use 0 or more"),
    ],
)
def test_what_no_spike_can_be_is_an_error(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load([word])
