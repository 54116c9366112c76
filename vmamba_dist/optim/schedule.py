"""The learning rate as a function of samples seen: the clock holds for every batch and world size.

Law: under warm-up–stable–decay two budgets have the same lr until the first of them decays, if their warm-up is given
in samples. So a checkpoint of the longer run from before that is one of the shorter run too, which may branch from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vmamba_dist.config.schema import ConfigError, OptimConfig, ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine to the floor (VMamba's recipe; the cosine's clock starts after warm-up), or wsd.

    wsd is constant after warm-up and falls by 1 - sqrt over the last share of the samples: of the shapes that
    Hägele et al. (arXiv 2405.18392) tried, the one that ended lowest.
    """

    peak: float
    total_samples: int
    warmup: float  # samples
    warmup_lr_ratio: float
    min_lr_ratio: float
    kind: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2  # wsd: share of total_samples

    def __call__(self, samples: int) -> float:
        """The lr for a step that begins after `samples` samples."""
        warm = self.warmup
        if samples < warm:
            return self.peak * (self.warmup_lr_ratio + (1 - self.warmup_lr_ratio) * samples / warm)
        begins = self.decays_from if self.kind == "wsd" else warm
        share = min(1.0, max(0.0, samples - begins) / max(1.0, self.total_samples - begins))
        left = 1 - math.sqrt(share) if self.kind == "wsd" else 0.5 * (1 + math.cos(math.pi * share))
        return self.peak * (self.min_lr_ratio + (1 - self.min_lr_ratio) * left)

    @property
    def decays_from(self) -> int:
        """wsd: samples after which the lr falls, never within the warm-up."""
        return max(math.ceil(self.warmup), self.total_samples - math.ceil(self.decay * self.total_samples))

    def same_until(self, other: Schedule, samples: int) -> bool:
        """True where both give the same lr to every step that begins before `samples`, and one is not at its end."""
        rise = ("peak", "warmup", "warmup_lr_ratio", "kind")
        alike = all(getattr(self, name) == getattr(other, name) for name in rise)
        return (
            alike and self.kind == "wsd" and samples <= min(self.decays_from, other.decays_from)
        ) or self == other


def build_schedule(
    schedule: ScheduleConfig, optim: OptimConfig, *, global_batch: int, total_samples: int
) -> Schedule:
    """Scale the peak linearly with the batch (Goyal et al., 2017), unless optim.lr_batch is 0."""
    scale = global_batch / optim.lr_batch if optim.lr_batch else 1.0
    warmup = schedule.warmup * total_samples
    if schedule.warmup_samples is not None:
        warmup = float(schedule.warmup_samples)
        if warmup >= total_samples:
            raise ConfigError(
                f"schedule.warmup_samples={schedule.warmup_samples}: the whole run has {total_samples}; use fewer"
            )
    return Schedule(
        peak=optim.lr * scale,
        total_samples=total_samples,
        warmup=warmup,
        warmup_lr_ratio=schedule.warmup_lr_ratio,
        min_lr_ratio=schedule.min_lr_ratio,
        kind=schedule.kind,
        decay=schedule.decay,
    )


def total_samples(schedule: ScheduleConfig, *, global_batch: int, steps_per_epoch: int) -> int:
    """The budget of a run, in whole steps. Raises ConfigError where it is less than one."""
    if schedule.samples is None:
        return schedule.epochs * steps_per_epoch * global_batch
    if schedule.samples < global_batch:
        raise ConfigError(
            f"schedule.samples={schedule.samples} is less than one step of data.global_batch={global_batch}; use more"
        )
    return schedule.samples // global_batch * global_batch
