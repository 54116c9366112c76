"""Plot a run: training loss and test accuracy over its steps.

    python benchmarks/plot_run.py runs/quickstart docs/quickstart.png

Law: shows what metrics.jsonl holds and nothing else; reads files only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

LOSS, ACCURACY, RAW = "#1f5f8b", "#c2571a", "#e3b38f"


def read(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Raises SystemExit where there is none."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise SystemExit(f"{run}: no metrics.jsonl there; name a run directory, for example runs/quickstart")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise SystemExit(f"{file} has no step yet")
    return lines


def series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which `key` has a value, and the values."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def plot(run: Path, out: Path) -> None:
    """Draw loss on the left axis and top-1, averaged and raw weights, on the right one."""
    lines = read(run)
    figure, left = plt.subplots(figsize=(7.2, 3.4), dpi=110)
    left.plot(*series(lines, "loss"), color=LOSS, linewidth=1)
    left.set_xlabel("step")
    left.set_ylabel("training loss", color=LOSS)
    left.set_ylim(bottom=0)
    left.margins(x=0.01)
    right = left.twinx()
    for key, color, label in (
        ("eval/raw/top1", RAW, "raw weights"),
        ("eval/ema/top1", ACCURACY, "averaged weights"),
    ):
        steps, values = series(lines, key)
        if steps:
            right.plot(steps, values, color=color, marker="o", markersize=3, linewidth=1.4, label=label)
    right.set_ylabel("accuracy on held-out images, %", color=ACCURACY)
    right.set_ylim(0, 100)
    if right.lines:
        right.legend(loc="center right", frameon=False)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    left.grid(axis="x", color="0.92")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    plt.close(figure)
    print(f"{out}: {lines[-1]['step']} steps of {run}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot training loss and test accuracy of a run.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    given = parser.parse_args()
    plot(given.run, given.out)


if __name__ == "__main__":
    main()
