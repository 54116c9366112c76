"""Where a step's report goes: the verdict on its health, metrics.jsonl, TensorBoard, the log and the bar.

Law: the verdict is reached on every rank from the same numbers; only rank 0 writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba_dist.config.schema import RunConfig
from vmamba_dist.core.dist import on_main
from vmamba_dist.core.log import Bar
from vmamba_dist.core.state import TrainState
from vmamba_dist.train import rollback
from vmamba_dist.train.board import Board
from vmamba_dist.train.health import TrainingStoppedError, Verdict, note_bad, note_step
from vmamba_dist.train.meter import MetricsLog, Report
from vmamba_dist.train.pace import Pace, slowest

log = logging.getLogger(__name__)


@dataclass
class Writers:
    """Rank 0's outputs."""

    metrics: MetricsLog
    tensorboard: Board | None
    bar: Bar
    pace: Pace | None  # None where there is one rank
    log_every: int
    total_steps: int


class Record:
    """Takes each step's report once, in order."""

    def __init__(
        self,
        state: TrainState,
        writers: Writers | None,
        cfg: RunConfig,
        *,
        rollbacks: Path,
        autopsy: Callable[[], str],
        flops_per_sample: float,
        peak_flops: float | None,
        memory_gib: Callable[[], float],
        max_bad_fraction: float,
        epoch_samples: int,
    ) -> None:
        self._state = state
        self._writers = writers
        self._cfg = cfg
        self._rollbacks = rollbacks
        self._autopsy = autopsy
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._memory_gib = memory_gib
        self._max_bad_fraction = max_bad_fraction
        self._epoch_samples = epoch_samples

    def note(self, report: Report | None, evaluation: dict[str, float] | None = None) -> bool:
        """Judge and write one report; True where a rank was asked to stop.

        After the third non-finite step in a row, or a loss spike, raises RollBack on every rank, or
        TrainingStoppedError where no roll-back is left; also where more samples are unreadable than
        data.max_bad_fraction allows.
        """
        if report is None:
            return False
        evaluation = evaluation or {}
        if self._writers is not None:
            self._write(self._writers, report, evaluation)
        verdict = note_step(self._state, report, spike=self._cfg.loss_spike)
        if verdict is not None:
            self._treat(report, verdict)
        allowed = note_bad(
            self._state, report, fraction=self._max_bad_fraction, epoch_samples=self._epoch_samples
        )
        if allowed is not None:
            raise self._stopped(
                f"step {report.step}: {self._state.bad_in_epoch} unreadable samples in epoch {report.epoch}, and "
                f"data.max_bad_fraction={self._max_bad_fraction} allows {allowed} by now; bad.jsonl names them: "
                "mend the set, or raise data.max_bad_fraction and start again"
            )
        return report.stop

    def sync(self) -> None:
        """Put what was written on the disk, before a checkpoint is published. Raises OSError where there is no room."""
        if self._writers is not None:
            self._writers.metrics.sync()
            if self._writers.tensorboard is not None:
                self._writers.tensorboard.flush()

    def _treat(self, report: Report, verdict: Verdict) -> None:
        """Go back past the steps that led astray, or stop, or say it. A collective."""
        state, most = self._state, self._cfg.max_rollbacks
        if not verdict.fatal and not most:
            self._warn(f"{verdict.why}; run.max_rollbacks=0, so it stands")
            return
        why = verdict.why if verdict.finite else f"{verdict.why}: {self._autopsy()}"
        blamed = rollback.to_leave_out(report.data_step, verdict.steps, state.skipped)
        if state.rollbacks < most:
            entry = rollback.Entry(state.rollbacks + 1, report.step, blamed, why)
            on_main(lambda: rollback.record(self._rollbacks, entry))
            self._warn(
                f"{why}; going back, {rollback.name(blamed)} left out (roll-back {entry.number} of {most})"
            )
            raise rollback.RollBack(why)
        if most:
            left_out = rollback.name(state.skipped)
            why += (
                f"; run.max_rollbacks={most} is spent, with {left_out} left out, and now it is "
                f"{rollback.name(blamed)}: look at the data and the learning rate, or raise run.max_rollbacks"
            )
        raise self._stopped(why)

    def _warn(self, what: str) -> None:
        if self._writers is not None:
            log.warning("%s", what)

    def _stopped(self, why: str) -> TrainingStoppedError:
        if self._writers is not None:
            log.error("%s", why)
        return TrainingStoppedError(why)

    def _write(self, to: Writers, report: Report, evaluation: dict[str, float]) -> None:
        late = slowest(report.own, report.waits, report.step_time) if to.pace is not None else None
        mfu = self._flops_per_sample * report.samples_per_s / self._peak_flops if self._peak_flops else None
        line: dict[str, Any] = {
            "step": report.step,
            "epoch": report.epoch,
            "samples": report.samples,
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "applied": report.applied,
            "bad": report.bad,
            "samples_per_s": report.samples_per_s,
            "data_wait": report.data_wait,
            "step_time": report.step_time,
            "mfu": mfu,
            "memory_gib": self._memory_gib(),
            "slowest_rank": late.rank if late is not None else None,
            "behind": late.behind if late is not None else None,
            **evaluation,
        }
        # JSON has no NaN: a number that is not finite is null, and `applied` says so.
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        to.metrics.write(line)
        if to.tensorboard is not None:
            for key, value in line.items():
                if key != "step" and value is not None:
                    name = key if "/" in key else f"train/{key}"
                    to.tensorboard.add_scalar(name, float(value), report.step)
        if to.pace is not None:
            to.pace.note(report)
        to.bar.show(report.step, f"loss {report.loss:.4f}  {report.samples_per_s:.0f} samples/s")
        if not report.applied:
            log.warning(
                "step %d: gradient norm is %s; the update was not applied", report.step, report.grad_norm
            )
        if report.step % to.log_every == 0 or report.step == to.total_steps:
            log.info(
                "step %d/%d  epoch %d  loss %.4f  lr %.3g  norm %.3g  %.0f samples/s  wait %.0f%%%s",
                report.step,
                to.total_steps,
                report.epoch,
                report.loss,
                report.lr,
                report.grad_norm,
                report.samples_per_s,
                100 * report.data_wait,
                f"  mfu {100 * mfu:.1f}%" if mfu else "",
            )
        for key, value in evaluation.items():
            if key.endswith("/top1"):
                log.info("step %d  %s %.2f%%", report.step, key, value)
