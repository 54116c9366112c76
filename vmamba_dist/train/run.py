"""A run, assembled: the objects that the loop works on, and its three verbs that touch several of them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vmamba_dist.checkpoint.save import Checkpoints
from vmamba_dist.checkpoint.store import Meta
from vmamba_dist.config.schema import EvalConfig
from vmamba_dist.core.state import TrainState
from vmamba_dist.data.badlog import BadLog
from vmamba_dist.evaluation.classification import ClassificationEvaluator
from vmamba_dist.optim.schedule import Schedule
from vmamba_dist.parallel.engine import Engine
from vmamba_dist.train.ema import Ema
from vmamba_dist.train.feed import Feed
from vmamba_dist.train.meter import Meter
from vmamba_dist.train.progress import Progress
from vmamba_dist.train.record import Record
from vmamba_dist.train.stopping import StopRequest, note_evaluation, out_of_patience


class Outcome(enum.Enum):
    """How a start of a run ended."""

    FINISHED = "finished"
    PAUSED = "paused"  # run.max_steps reached; a later start with a larger one goes on
    REQUEUE = "requeue"  # asked to stop, saved; the same command goes on

    @property
    def exit_code(self) -> int:
        """0, or 75 (EX_TEMPFAIL): start the same command again."""
        return 75 if self is Outcome.REQUEUE else 0


@dataclass(frozen=True)
class Every:
    """Due at each multiple of `steps`; 0 is never."""

    steps: int

    def due(self, state: TrainState) -> bool:
        return self.steps > 0 and state.step % self.steps == 0


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says of the run that wrote it, beside the counters."""

    world_size: int
    engine: str
    config_digest: str
    trajectory: Mapping[str, Any]
    extra: Mapping[str, Any]  # the whole config, so that a checkpoint can be evaluated on its own


@dataclass
class Run:
    """Everything that the loop works on."""

    state: TrainState
    engine: Engine
    ema: Ema | None
    progress: Progress
    feed: Feed
    bad_log: BadLog
    schedule: Schedule
    meter: Meter
    record: Record
    stop: StopRequest
    evaluator: ClassificationEvaluator
    checkpoints: Checkpoints
    origin: Origin
    eval_cfg: EvalConfig
    batch_size: int  # samples a step, over all ranks
    accumulate: int  # micro-batches a step
    steps_per_epoch: int
    clip: float
    max_steps: int | None
    eval_every: Every
    save_every: Every
    save_best: bool

    @property
    def finished(self) -> bool:
        """The budget of samples is spent, or early stopping's patience is."""
        return self.state.samples >= self.schedule.total_samples or out_of_patience(self.state, self.eval_cfg)

    @property
    def paused(self) -> bool:
        return self.max_steps is not None and self.state.step >= self.max_steps

    @property
    def saves_on_the_way(self) -> bool:
        """Whether a save comes that training goes on behind; the one at the end is waited for and copies nothing."""
        end = self.schedule.total_samples // self.batch_size
        if self.max_steps is not None:
            end = min(end, self.max_steps)
        every = [self.save_every.steps] + [self.eval_every.steps] * self.save_best
        return any(steps and (self.state.step // steps + 1) * steps < end for steps in every)

    @property
    def best_metric(self) -> str:
        """The key that "best" goes by: eval/ema/top1, or eval/raw/… where there is no EMA."""
        return best_metric(self.eval_cfg, has_ema=self.ema is not None)

    def evaluate(self, *, counts: bool) -> dict[str, float]:
        """Evaluate the raw and the averaged weights. A collective.

        Where it `counts`, note whether it is the best so far; an evaluation that an unbroken run would not
        have made, at a pause, must not bring early stopping nearer.
        """
        found = {
            f"eval/raw/{key}": value for key, value in self.evaluator(self.engine.module, self.state).items()
        }
        if self.ema is not None:
            with self.ema.in_place():
                averaged = self.evaluator(self.engine.module, self.state)
            found |= {f"eval/ema/{key}": value for key, value in averaged.items()}
        if counts:
            higher_is_better = not self.best_metric.endswith("loss")
            note_evaluation(self.state, found[self.best_metric], higher_is_better=higher_is_better)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, by canonical name. A collective."""
        return self.engine.state() | (self.ema.state() if self.ema is not None else {})

    def save(self, evaluation: dict[str, float], *, wait: bool) -> None:
        """Save this step, the metrics up to it on the disk first; with `wait` it is published. A collective."""
        self.progress.at("saving")
        meta = Meta(
            step=self.state.step,
            samples=self.state.samples,
            epoch=self.state.epoch,
            state=self.state.to_dict(),
            metrics=evaluation,
            **dataclasses.asdict(self.origin),
        )
        self.checkpoints.save(self.tensors(), meta, wait=wait, before=self._sync)

    def _sync(self) -> None:
        self.record.sync()
        self.bad_log.sync()


def best_metric(cfg: EvalConfig, *, has_ema: bool) -> str:
    """The metric that "best" goes by, as evaluations name it."""
    return f"eval/{cfg.weights if has_ema else 'raw'}/{cfg.metric}"
