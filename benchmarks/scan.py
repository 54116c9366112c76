"""Time the fast scans on a CPU against their definitions: one thread, forward and backward apart, peak memory.

A table is printed only after every shape that the tests use, and each timed one, agrees with its definition.
Times are CPU time; repetitions of the two are interleaved and medians reported: a busy machine slows both alike.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from report import publish, table

from vmamba_kernels import selective_scan, ss2d_scan
from vmamba_kernels.scan.reference import selective_scan_reference
from vmamba_kernels.ss2d.reference import ss2d_scan_reference
from vmamba_kernels.testing import (
    IMAGE_BENCHMARKS,
    IMAGE_SHAPES,
    SCAN_BENCHMARK,
    SCAN_SHAPES,
    ImageShape,
    ScanShape,
    value_and_gradients,
    worst,
)

Scan = Callable[..., Tensor]
TOLERANCE = 1e-5  # of the largest magnitude, float32 against float32
BENCHMARKS = (SCAN_BENCHMARK, *IMAGE_BENCHMARKS)


def implementations(shape: ScanShape | ImageShape) -> tuple[Scan, Scan]:
    """Return the definition and the fast scan for a kind of shape."""
    if isinstance(shape, ScanShape):
        return selective_scan_reference, selective_scan
    return ss2d_scan_reference, ss2d_scan


def gate(shape: ScanShape | ImageShape) -> float:
    """Return the worst relative difference over the value and all gradients; exit where it is too large."""
    reference, fast = (value_and_gradients(f, shape.inputs(), torch.float32) for f in implementations(shape))
    difference = worst(fast, reference)
    if not difference <= TOLERANCE:
        sys.exit(f"{shape}: the fast scan differs from its definition by {difference:.1e}; nothing was timed")
    return difference


class Stopwatch:
    """Time forward and backward of one scan on one set of inputs."""

    def __init__(self, scan: Scan, shape: ScanShape | ImageShape) -> None:
        inputs = {name: t.float() for name, t in shape.inputs().items()}
        self.scan, self.dy = scan, inputs.pop("dy")
        self.leaves = {name: t.requires_grad_() for name, t in inputs.items()}
        self.forward_s: list[float] = []
        self.backward_s: list[float] = []

    def once(self) -> tuple[float, float]:
        for leaf in self.leaves.values():
            leaf.grad = None
        start = time.process_time()
        y = self.scan(**self.leaves)
        middle = time.process_time()
        y.backward(self.dy)
        return middle - start, time.process_time() - middle

    def sample(self, calls: int) -> None:
        """Add one sample: the mean over so many calls."""
        times = [self.once() for _ in range(calls)]
        self.forward_s.append(sum(f for f, _ in times) / calls)
        self.backward_s.append(sum(b for _, b in times) / calls)

    def medians_ms(self) -> tuple[float, float]:
        return 1e3 * statistics.median(self.forward_s), 1e3 * statistics.median(self.backward_s)


def timed(shape: ScanShape | ImageShape, repetitions: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (forward, backward) medians in ms of the definition and of the fast scan, interleaved."""
    watches = [Stopwatch(scan, shape) for scan in implementations(shape)]
    calls = [max(1, int(0.05 / sum(watch.once()))) for watch in watches]
    for _ in range(repetitions):
        for watch, count in zip(watches, calls, strict=True):
            watch.sample(count)
    return watches[0].medians_ms(), watches[1].medians_ms()


def peak_mib(shape: ScanShape | ImageShape, fast: bool) -> float:
    """Return what one forward and backward adds to the resident memory of a fresh process, at its peak."""
    task = json.dumps([BENCHMARKS.index(shape), fast])
    command = [sys.executable, __file__, "--peak-of", task]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout)


def measure_peak(task: str) -> None:
    index, fast = json.loads(task)
    shape = BENCHMARKS[index]
    watch = Stopwatch(implementations(shape)[fast], shape)
    warm = ScanShape(1, 1, 1, 1, 2) if isinstance(shape, ScanShape) else ImageShape(1, 1, 2, 1, 1)
    Stopwatch(implementations(shape)[fast], warm).once()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present
    before = _status_kib("VmRSS")
    watch.once()
    print((_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved samples of each (default 5)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        measure_peak(args.peak_of)
        return
    difference = max(gate(shape) for shape in (*SCAN_SHAPES, *IMAGE_SHAPES, *BENCHMARKS))
    rows = []
    for shape in BENCHMARKS:
        (ref_f, ref_b), (fast_f, fast_b) = timed(shape, args.repetitions)
        rows.append(
            (
                f"{'scan' if isinstance(shape, ScanShape) else 'ss2d'} {shape}",
                f"{ref_f:.3g} / {ref_b:.3g}",
                f"{fast_f:.3g} / {fast_b:.3g}",
                f"{ref_f / fast_f:.1f}×",
                f"{ref_b / fast_b:.1f}×",
                f"**{(ref_f + ref_b) / (fast_f + fast_b):.1f}×**",
                f"{peak_mib(shape, False):.1f}",
                f"{peak_mib(shape, True):.1f}",
            )
        )
    columns = (
        "float32, one thread",
        "definition, ms",
        "fast, ms",
        "forward",
        "backward",
        "both",
        "definition, MiB",
        "fast, MiB",
    )
    publish("scan_cpu", "The scans on a CPU: definition against fast path", [
        f"Gate: {len(SCAN_SHAPES) + len(IMAGE_SHAPES) + len(BENCHMARKS)} shapes, value and every gradient, "
        f"worst relative difference {difference:.1e} (allowed {TOLERANCE:.0e}).",
        f"Times are CPU time, forward / backward, medians of {args.repetitions} interleaved samples. Memory is what "
        "one forward and backward, gradients included, adds to the resident set of a fresh process at its peak (VmHWM "
        "after a reset, less VmRSS before; glibc told to return every freed block of 64 KiB at once).",
        "The definition indexes each step, and autograd answers each index with a full-size gradient: that is "
        "most of its backward.",
        "",
        *table(columns, rows),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
