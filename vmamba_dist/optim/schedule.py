"""The learning rate as a function of samples seen: the clock holds for every batch and world size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vmamba_dist.config.schema import OptimConfig, ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine to the floor (VMamba's recipe; the cosine's clock starts after warm-up)."""

    peak: float
    total_samples: int
    warmup: float  # share of total_samples
    warmup_lr_ratio: float
    min_lr_ratio: float

    def __call__(self, samples: int) -> float:
        """The lr for a step that begins after `samples` samples."""
        warm = self.warmup * self.total_samples
        if samples < warm:
            return self.peak * (self.warmup_lr_ratio + (1 - self.warmup_lr_ratio) * samples / warm)
        share = min(1.0, (samples - warm) / max(1.0, self.total_samples - warm))
        return self.peak * (
            self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share))
        )


def build_schedule(
    schedule: ScheduleConfig, optim: OptimConfig, *, global_batch: int, total_samples: int
) -> Schedule:
    """Scale the peak linearly with the batch (Goyal et al., 2017), unless optim.lr_batch is 0."""
    scale = global_batch / optim.lr_batch if optim.lr_batch else 1.0
    return Schedule(
        peak=optim.lr * scale,
        total_samples=total_samples,
        warmup=schedule.warmup,
        warmup_lr_ratio=schedule.warmup_lr_ratio,
        min_lr_ratio=schedule.min_lr_ratio,
    )
