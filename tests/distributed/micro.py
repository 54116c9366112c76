"""A run that is small and leaves nothing out: mixing, erasing, drop path, accumulation, EMA, clipping, workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What a clock or a machine decides; every other value of a line is decided by training.
TIMES = {"samples_per_s", "data_wait", "step_time", "mfu", "memory_gib", "slowest_rank", "behind"}


def words(digits: Path, run_dir: Path, *more: str) -> list[str]:
    """The words of a micro run on packed digits: atto at 16 px, 32 samples a step, 44 steps an epoch."""
    return [
        f"run.dir={run_dir}",
        f"data.train={digits}",
        "model.name=vmamba_atto",
        "model.drop_path=0.1",
        "data.image_size=16",
        "data.global_batch=32",
        "data.workers=0",
        "augment.crop_scale=[0.7,1]",
        "augment.hflip=0",
        "augment.randaugment_ops=1",
        "augment.mixup=0.2",
        "augment.cutmix=0.2",
        "augment.interpolation=bilinear",
        "optim.lr=2e-3",
        "optim.lr_batch=0",
        "optim.clip=3",
        "schedule.epochs=1",
        "schedule.warmup=0.1",
        "ema.decay=0.9",
        "precision.compute=float32",
        "precision.threads=1",
        "eval.crop=1",
        "eval.every_epochs=0.5",
        "checkpoint.every_steps=4",
        "telemetry.tensorboard=false",
        "telemetry.log_every_steps=20",
        *more,
    ]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def train(args: list[str]) -> str:
    """Start a run in this process's world and return how it ended."""
    from vmamba_dist.config import load
    from vmamba_dist.train import run

    return run(load(args)).value
