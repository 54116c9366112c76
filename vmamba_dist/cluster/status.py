"""What a run directory tells about its run, without touching it.

Law: reads files only; a line that is still being written is no line.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmamba_dist.config.schema import ConfigError


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl, none before its first step. Raises ConfigError without a run."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no run directory there")
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def throughput(lines: Sequence[dict[str, Any]]) -> float | None:
    """Samples a second: the median step's, so that a start or a save does not count."""
    rates = [line["samples_per_s"] for line in lines if line.get("samples_per_s") is not None]
    return statistics.median(rates) if rates else None


def text(run: Path) -> str:
    """The run in a few lines: how far, how fast, where, how to look at it and how to remove it."""
    lines = metrics(run)
    last = lines[-1] if lines else {}
    rate = throughput(lines)
    speed = "" if rate is None else f"{rate:.0f} samples/s"
    where = f"step {last['step']}, {_loss(last['loss'])}" if lines else "no step yet"
    look = f"{_beside_python('tensorboard')} --logdir {run / 'tensorboard'}"
    rows = {"trained": where, "speed": speed, "run": str(run), "look": look, "remove": f"rm -r {run}"}
    return "\n".join(f"{key:<8} {value}" for key, value in rows.items() if value)


def _loss(value: float | None) -> str:
    return "loss not finite" if value is None else f"loss {value:.4f}"  # JSON has no NaN: null stands for it


def _beside_python(name: str) -> str:
    """The command `name` of this environment, as short as it can be written from here."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main(words: Sequence[str]) -> int:
    """Print the status of each run directory named."""
    if not words:
        raise ConfigError("name one or more run directories, for example runs/quickstart")
    print("\n\n".join(text(Path(word)) for word in words))
    return 0
