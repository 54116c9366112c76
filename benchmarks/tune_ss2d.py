"""Choose the fused four-direction scan's plans on a GPU and write them to tiles.json.

A candidate is refused unless its result is right; what is right is timed, each kernel on its own, by CUDA events. Span
and steps are shared by all kernels and chosen by the time of forward and backward together; channels, warps, stages and
registers are each kernel's own. Candidates are compiled beforehand by several processes into Triton's cache.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from gpu import Gpu
from triton.errors import TritonError

from vmamba_kernels import ss2d_scan
from vmamba_kernels.backend import generation
from vmamba_kernels.ss2d import fused, tiles
from vmamba_kernels.ss2d.tiles import Key, Plan
from vmamba_kernels.testing import ImageShape, relative_rms, value_and_gradients

# Channels, dt rank and length of the stages at 224 pixels; VMamba-S has VMamba-T's.
MODELS = {
    "tiny": ((96, 6, 3136), (192, 12, 784), (384, 24, 196), (768, 48, 49)),
    "base": ((128, 8, 3136), (256, 16, 784), (512, 32, 196), (1024, 64, 49)),
}
SPANS = (7, 14, 16, 28, 32, 40, 48, 52, 56, 64, 84, 112)
STEPS = (1, 2, 4)
MOST_PADDING = 0.15  # of a sequence's steps
MOST_SEGMENTS = 128  # of a sequence: beyond it more of them bring no parallelism that is missing
STAGES = (3, 5, 6, 7)
# Channels, warps, most registers (0: no cap) of each kernel, and whether dz is kept; a plan takes one of each column.
ENDS = ((32, 1), (16, 1), (64, 2))
OUTPUT = ((32, 1, 0), (32, 1, 168), (32, 1, 128), (16, 1, 0), (16, 1, 96))
GRADIENTS = (
    (16, 1, 0, False), (32, 1, 0, False), (16, 1, 168, False), (32, 1, 168, True), (32, 1, 0, True),
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 4e-3, "fp32": 3e-6}  # relative RMS
CANCELLATION = 10  # how much more a parameter's gradient may err: a sum over every token that mostly cancels
CHECKED_BATCH = 16  # fills the kernels' rows as the timed batch does: what is checked is what is timed
NAMES = ("x", "projected", "dt_weight", "dt_bias", "A", "D")


@dataclass(frozen=True)
class Problem:
    """One row of the table: a shape and the precision of its inputs."""

    channels: int
    rank: int
    length: int
    state: int
    dtype: str

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Return x, projected (each direction padded to a multiple of 8, as the models do), ... and dy."""
        side = math.isqrt(self.length)
        height, width = (side, side) if side * side == self.length else (1, self.length)
        one = ImageShape(1, height, width, self.channels, self.rank, self.state).inputs()
        inner = self.rank + 2 * self.state
        one["projected"] = torch.nn.functional.pad(
            one["projected"].unflatten(-1, (4, -1)), (0, tiles.padded(inner) - inner)
        ).flatten(-2)
        found = {}
        for name, t in one.items():
            cast = name in ("x", "projected", "dt_weight", "dy")
            t = t.to("cuda", DTYPES[self.dtype] if cast else torch.float32)
            # Images differ: a program that took another's rows would be noticed.
            if name in ("x", "projected", "dy"):
                scale = torch.linspace(0.5, 1, batch, device="cuda", dtype=t.dtype)
                t = t * scale[:, None, None, None]
            found[name] = t
        return found

    def key(self) -> Key:
        device = torch.device("cuda", torch.cuda.current_device())
        size = DTYPES[self.dtype].itemsize
        return Key(generation(device), self.channels, self.length, self.state, size)

    def __str__(self) -> str:
        return f"C{self.channels} R{self.rank} N{self.state} L{self.length} {self.dtype}"


def candidates(length: int, spans: Sequence[int], steps: Sequence[int], quick: bool) -> list[Plan]:
    """List plans in which all kernels have the same block; a choice may mix them, the rest being equal."""

    def fits(span: int) -> bool:
        segments = -(-length // span)
        return segments * span <= length * (1 + MOST_PADDING) and segments <= MOST_SEGMENTS

    fitting = [n for n in spans if fits(n)] or [min(spans, key=lambda n: -(-length // n) * n)]
    if quick:  # no masks where a span divides the length
        fitting = [n for n in fitting if length % n == 0] or fitting
    return [
        _plan(span, few, walked, stages, *blocks)
        for span in fitting
        for few in steps
        for walked in steps
        for stages in STAGES
        for blocks in zip_longest(ENDS, OUTPUT, GRADIENTS)
        if span % walked == 0 and walked % few == 0
    ]


def _plan(
    span: int,
    steps: int,
    walked: int,
    stages: int,
    ends: tuple[int, int] | None,
    output: tuple[int, int, int] | None,
    gradients: tuple[int, int, int, bool] | None,
) -> Plan:
    (a, a_warps), (b, b_warps, b_cap) = ends or ENDS[0], output or OUTPUT[0]
    c, c_warps, c_cap, apart = gradients or GRADIENTS[0]
    warps, depths = (a_warps, b_warps, c_warps), (stages, stages, stages)
    return Plan(span, steps, a, b, c, *warps, *depths, b_cap, c_cap, walked, apart)


def run(inputs: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Return y and every gradient by a plan."""
    arguments = [inputs[name] for name in NAMES]
    with patch.object(fused, "plan_for", lambda *_: plan):
        y, saved = fused.forward(*arguments, "cross2d", True)
        gradients = fused.backward(inputs["dy"], saved, *arguments, "cross2d")
    return {"y": y, **dict(zip(NAMES, gradients, strict=True))}


class Recorder:
    """Stands in for a kernel: launches it, and keeps the launch to be repeated."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(partial(self.kernel[grid], *args, **kwargs))
            self.launches[-1]()

        return launch


def times(inputs: dict[str, Tensor], plan: Plan, gpu: Gpu, samples: int) -> dict[str, float]:
    """Return the median ms of each kernel by name: all its launches in one forward and backward."""
    launches: dict[str, list[Any]] = defaultdict(list)
    replaced = {name: Recorder(getattr(fused, name), launches[name]) for name in fused.KERNELS}
    with patch.multiple(fused, **replaced):
        run(inputs, plan)
    done = {name: some for name, some in launches.items() if some}  # a plan has no use for some of them
    calls = [partial(_repeat, some) for some in done.values()]
    rows = [gpu.spans(calls) for _ in range(samples)]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return dict.fromkeys(fused.KERNELS, 0.0) | dict(zip(done, medians, strict=True))


def _repeat(launches: list[Any]) -> None:
    for launch in launches:
        launch()


def expected(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y and the gradients by the PyTorch path in float64."""
    return value_and_gradients(
        partial(ss2d_scan, backend="torch"), {n: t.double() for n, t in inputs.items()}
    )


def fault(inputs: dict[str, Tensor], truth: dict[str, Tensor], plan: Plan, dtype: str) -> str:
    """Say what is wrong with a plan; nothing if it is right."""
    try:
        found = run(inputs, plan)
        torch.cuda.synchronize()
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    for name, t in found.items():
        limit = TOLERANCE[dtype] * (1 if name in ("y", "x", "projected") else CANCELLATION)
        error = relative_rms(t, truth[name])
        if not error <= limit:
            return f"{name} differs from the PyTorch path by {error:.1e}, {limit:.0e} allowed"
    return ""


def choose(measured: dict[Plan, dict[str, float]]) -> tuple[Plan, float]:
    """Return the plan whose kernels together take the least, and its ms."""
    groups: dict[tuple[int, int, int], list[Plan]] = defaultdict(list)
    for plan in measured:
        groups[plan.span, plan.steps, plan.walked].append(plan)

    def ends(plan: Plan) -> float:
        return measured[plan]["ss2d_ends"] + measured[plan]["ss2d_adjoint_ends"]

    def output(plan: Plan) -> float:
        return measured[plan]["ss2d_output"]

    def gradients(plan: Plan) -> float:
        what_follows = ("projected_sum", "projected_product", "weight_product", "parameter_sum")
        return sum(measured[plan][f"ss2d_{name}"] for name in ("gradients", *what_follows))

    def mixtures() -> Iterator[tuple[Plan, float]]:
        for plans in groups.values():
            a, b, c = min(plans, key=ends), min(plans, key=output), min(plans, key=gradients)
            mixed = replace(
                a,
                output=b.output,
                output_warps=b.output_warps,
                output_stages=b.output_stages,
                output_registers=b.output_registers,
                gradients=c.gradients,
                gradients_warps=c.gradients_warps,
                gradients_stages=c.gradients_stages,
                gradients_registers=c.gradients_registers,
                apart=c.apart,
            )
            yield mixed, ends(a) + output(b) + gradients(c) + measured[a]["ss2d_carry"]

    return min(mixtures(), key=lambda pair: pair[1])


def tune(problem: Problem, plans: list[Plan], gpu: Gpu, batch: int, samples: int) -> Plan | None:
    """Measure one problem's plans, print each and return the best; None where none is right."""
    print(f"\n{problem}, batch {batch}: ms of {', '.join(fused.KERNELS)}", flush=True)
    small, large = problem.inputs(CHECKED_BATCH), problem.inputs(batch)
    truth = expected(small)
    # The plan in use is a candidate like any other.
    with patch.object(tiles, "pinned_plans", dict):
        default = tiles.plan_for(large["x"], problem.state)
    measured: dict[Plan, dict[str, float]] = {}
    for plan in dict.fromkeys((default, *plans)):
        label = (
            f"  span {plan.span:3} steps {plan.steps}, {plan.walked} stages {plan.ends_stages} channels x warps "
            f"{plan.ends}x{plan.ends_warps} {plan.output}x{plan.output_warps}/{plan.output_registers} "
            f"{plan.gradients}x{plan.gradients_warps}/{plan.gradients_registers}{' apart' if plan.apart else ''}"
        )
        wrong = fault(small, truth, plan, problem.dtype)
        if wrong:
            print(f"{label}: refused, {wrong}", flush=True)
            continue
        measured[plan] = times(large, plan, gpu, samples)
        total = sum(measured[plan].values())
        print(
            f"{label}: {' '.join(f'{ms:7.3f}' for ms in measured[plan].values())}  total {total:7.3f}",
            flush=True,
        )
    if not measured:
        return None
    best, estimate = choose(measured)
    wrong = fault(small, truth, best, problem.dtype)
    if wrong:
        print(f"  the best mixture is wrong ({wrong}): the best unmixed plan instead", flush=True)
        best = min(measured, key=lambda plan: sum(measured[plan].values()))
    total = sum(times(large, best, gpu, samples).values())
    before = f", the default {sum(measured[default].values()):.3f}" if default in measured else ""
    print(f"  best: {best}: {total:.3f} ms (its parts {estimate:.3f}){before}", flush=True)
    return best


def compile_part(jobs: list[tuple[Problem, Plan]], part: int, of: int) -> None:
    """Run every of-th candidate once, for Triton's cache; what fails here is told where it is checked."""
    last, inputs = None, {}
    for problem, plan in jobs[part::of]:
        if problem != last:
            last, inputs = problem, problem.inputs(CHECKED_BATCH)
        try:
            run(inputs, plan)
            torch.cuda.synchronize()
        except (TritonError, RuntimeError) as error:
            print(f"compiling {problem} {plan}: {type(error).__name__}", file=sys.stderr)


def precompile(processes: int) -> None:
    command = [sys.executable, __file__, *sys.argv[1:], "--compile-part"]
    parts = [subprocess.Popen([*command, f"{part}/{processes}"]) for part in range(processes)]
    for part in parts:
        if part.wait() != 0:
            print(
                "a compiling process failed; its candidates are compiled when they are checked",
                file=sys.stderr,
            )


def _shape(text: str) -> tuple[int, int, int]:
    channels, rank, length = map(int, text.split(","))
    return channels, rank, length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="*", choices=MODELS, default=list(MODELS), help="tiny serves VMamba-S too"
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="C,R,L",
        help="channels, dt rank, H*W: instead of the models",
    )
    parser.add_argument("--state", type=int, default=1, metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=128, help="of the timed calls; a multiple of 16")
    parser.add_argument(
        "--samples", type=int, default=5, help="timed calls of each kernel; their median counts"
    )
    parser.add_argument("--spans", nargs="+", type=int, default=SPANS, help="steps a segment to try")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        choices=STEPS,
        default=STEPS,
        help="a tile, to try: of the gradients and, multiples of these, of the other kernels",
    )
    parser.add_argument("--quick", action="store_true", help="no masked segments, no deeper pipelines")
    parser.add_argument(
        "--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that compile"
    )
    parser.add_argument("--dry-run", action="store_true", help="write no table")
    parser.add_argument("--compile-part", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "tune_ss2d.py measures on a CUDA device and finds none; the default plans serve until it has run on one"
        )
    if options.batch % CHECKED_BATCH:
        sys.exit(f"--batch {options.batch}: use a multiple of {CHECKED_BATCH}")

    shapes = options.shape or [shape for model in options.models for shape in MODELS[model]]
    problems = [Problem(*shape, options.state, options.dtype) for shape in shapes]
    plans = {
        problem: candidates(problem.length, options.spans, options.steps, options.quick)
        for problem in problems
    }
    if options.compile_part:
        part, of = map(int, options.compile_part.split("/"))
        compile_part([(problem, plan) for problem in problems for plan in plans[problem]], part, of)
        return
    precompile(options.processes)

    gpu = Gpu()
    chosen = {}
    for problem in problems:
        best = tune(problem, plans[problem], gpu, options.batch, options.samples)
        if best is not None:
            chosen[problem.key()] = best
    print(f"\n{torch.cuda.get_device_name()}, batch {options.batch}")
    for key, plan in chosen.items():
        print(f"  {key} -> {plan}")
    if not options.dry_run:
        tiles.write_plans(tiles.pinned_plans() | chosen)
        print(f"wrote {tiles.TABLE}")


if __name__ == "__main__":
    main()
