"""Measure the fused four-direction scan on a GPU: its span against rivals and roofline, whole models, memory.

Nothing is timed before the kernels agree with float64 at the very widths that are timed. Each part
prints its table as soon as it has it and writes it to benchmarks/results/; a part that fails costs no other its turn.
"""

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import models_gpu
from gpu import Device, Gpu, Rehearsal, interleaved
from report import RESULTS, publish, table
from rivals import Official, Weights, fused, materialised

from vmamba_kernels import ss2d_scan
from vmamba_kernels.testing import ImageShape, relative_rms, value_and_gradients

TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 3e-6}  # relative RMS
PARAMETERS = ("dt_weight", "dt_bias", "A", "D")
CANCELLATION = (
    10  # how much more a parameter's gradient may err: it is a sum over every token that mostly cancels
)
CAST = ("x", "projected", "dt_weight", "dy")  # what the model hands over in its own precision
SPECIAL_PER_CLOCK = 16  # exp2, log2 and reciprocal results that a multiprocessor gives each clock
BF16 = 2  # bytes


@dataclass(frozen=True)
class Stage:
    """The blocks of one stage of a model, all of one shape."""

    blocks: int
    shape: ImageShape

    @property
    def elements(self) -> int:
        s = self.shape
        return s.batch * s.height * s.width * s.channels

    @property
    def projections(self) -> int:
        s = self.shape
        return s.batch * s.height * s.width * 4 * (s.rank + 2 * s.state)

    def least_bytes(self) -> tuple[int, int]:
        """Forward: x in, y out. Backward: x, the output's gradient and the projection in, both gradients out."""
        return BF16 * 2 * self.elements, BF16 * (3 * self.elements + 2 * self.projections)

    def special_results(self) -> tuple[int, int]:
        """A direction and element: 2 for softplus, 1 a state for the decay; backward 1 more, softplus's slope."""
        return 4 * self.elements * (2 + self.shape.state), 4 * self.elements * (3 + self.shape.state)

    def __str__(self) -> str:
        return f"{self.blocks} × {self.shape}"


def stages(batch: int, blocks: Iterable[int], width: int, rank: int, state: int, side: int) -> list[Stage]:
    """List a model's stages: width and rank double, the side halves."""
    return [
        Stage(count, ImageShape(batch, side >> i, side >> i, width << i, rank << i, state))
        for i, count in enumerate(blocks)
    ]


TINY = stages(128, (2, 2, 8, 2), 96, 6, 1, 56)
VANILLA_TINY = stages(128, (2, 2, 9, 2), 192, 6, 16, 56)
REHEARSED = stages(2, (2, 1), 8, 2, 1, 4)


def gate(device: Device) -> str:
    """Say how near the scan stands to the PyTorch path in float64; exit where it is too far."""
    cases = [(replace(stage.shape, batch=2), torch.bfloat16) for stage in TINY]
    odd, small = ImageShape(2, 9, 7, 40, 3, 16), replace(TINY[2].shape, batch=2)
    large = ImageShape(1, 128, 128, 96, 6)  # more segments than are linked at once elsewhere
    cases += [(odd, torch.bfloat16), (odd, torch.float32), (small, torch.float32), (large, torch.bfloat16)]
    if device.rehearsing:
        cases = [(ImageShape(2, 3, 5, 4, 2), torch.bfloat16), (ImageShape(2, 3, 5, 4, 2), torch.float32)]
    found = dict.fromkeys(TOLERANCE, 0.0)
    for shape, dtype in cases:
        for name, difference in _differences(shape, dtype, device).items():
            allowed = TOLERANCE[dtype] * (CANCELLATION if name in PARAMETERS else 1)
            if not difference <= allowed:
                sys.exit(
                    f"{shape} in {dtype}: {name} differs from float64 by {difference:.1e} "
                    f"(allowed {allowed:.0e}); nothing was timed"
                )
            found[dtype] = max(found[dtype], difference * TOLERANCE[dtype] / allowed)
    told = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {worst:.1e} (allowed {TOLERANCE[dtype]:.0e})"
        for dtype, worst in found.items()
    )
    return (
        f"Gate: {len(cases)} shapes against the PyTorch path in float64, value and every gradient, worst relative RMS "
        f"{told}; of a parameter's gradient, a sum that mostly cancels, a tenth is counted."
    )


def _differences(shape: ImageShape, dtype: torch.dtype, device: Device) -> dict[str, float]:
    """Return the relative RMS of y and each gradient, the inputs rounded to dtype for both."""
    inputs = {name: t.to(device.device) for name, t in shape.inputs().items()}
    inputs |= {name: inputs[name].to(dtype).double() for name in CAST}

    def in_dtype(**given: Tensor) -> Tensor:
        cast = {name: t.to(dtype if name in CAST else torch.float32) for name, t in given.items()}
        return ss2d_scan(**cast, backend=device.scan_backend)

    # The PyTorch path in float64: tests hold it to the definition within 1e-12, and it takes a fiftieth of the time.
    expected = value_and_gradients(partial(ss2d_scan, backend="torch"), inputs)
    actual = value_and_gradients(in_dtype, inputs)
    return {name: relative_rms(actual[name], expected[name]) for name in expected}


class Span:
    """One implementation of the span on one input, in training: forward and backward apart."""

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor]) -> None:
        self.run, self.x, self.leaves = run, x, [x, *leaves]
        self.y = self._forward()
        self.dy = torch.randn(self.y.shape, device=x.device, generator=_seeded(x.device)).to(self.y)
        self.gradients: tuple[Tensor, ...] = ()

    def _forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16):
            return self.run(self.x)

    def forward(self) -> None:
        self.y = self._forward()

    def backward(self) -> None:
        self.gradients = torch.autograd.grad(self.y, self.leaves, self.dy)

    def sample(self, device: Device) -> list[float]:
        times = device.spans([self.forward, self.backward])
        self.gradients = ()
        return times


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def spans_of(stage: Stage, official: Official | None, device: Device) -> dict[str, Span]:
    """Build every implementation of one stage's span, each on the same values."""
    s = stage.shape
    weights = Weights.drawn(s, device.device)
    size = (s.batch, s.height, s.width, s.channels)
    tokens = F.silu(torch.randn(size, device=device.device)).bfloat16()
    plain = partial(materialised, w=weights, backend=device.scan_backend)
    runs = {
        "fused": partial(fused, w=weights, backend=device.scan_backend),
        "plain": plain,
        "plain, float32 outputs": partial(plain, wide=True),
    }
    spans = {name: Span(run, tokens.clone().requires_grad_(), weights.leaves()) for name, run in runs.items()}
    if official is not None and s.state == 1:
        run, leaves = official.span(s, weights)
        spans["official"] = Span(run, tokens.permute(0, 3, 1, 2).contiguous().requires_grad_(), leaves)
        spans["official"].dy = spans["fused"].dy.permute(0, 3, 1, 2).contiguous().float()
    for name in runs:
        spans[name].dy = spans["fused"].dy.to(spans[name].y.dtype)
    return spans


def disagreement(spans: dict[str, Span]) -> dict[str, float]:
    """Return by how much each rival differs from the fused span: the worst relative RMS of value and gradients."""
    values: dict[str, list[Tensor]] = {}
    for name, span in spans.items():
        span.forward()
        span.backward()
        y, dx = span.y, span.gradients[0]
        if name == "official":
            y, dx = y.permute(0, 2, 3, 1), dx.permute(0, 2, 3, 1)
        values[name] = [y.detach(), dx, *span.gradients[1:]]
    ours = values.pop("fused")
    return {
        name: max(relative_rms(a.reshape(b.shape), b) for a, b in zip(theirs, ours, strict=True))
        for name, theirs in values.items()
    }


@dataclass(frozen=True)
class Rates:
    """What the machine can do, measured in this run."""

    bytes_per_s: float
    special_per_s: float

    def bounds_ms(self, stage: Stage) -> list[tuple[float, float]]:
        """Return, forward and backward, the ms of the traffic and of the special functions."""
        return [
            (1e3 * moved / self.bytes_per_s, 1e3 * results / self.special_per_s)
            for moved, results in zip(stage.least_bytes(), stage.special_results(), strict=True)
        ]


def core(model: list[Stage], official: Official | None, repetitions: int, device: Device) -> list[str]:
    """Time the span of every stage; tell them and the whole model's sum."""
    measured: list[dict[str, list[float]]] = []
    differences: dict[str, float] = {}
    clocks = (0.0, 0.0)
    for stage in model:
        spans = spans_of(stage, official, device)
        for rival, difference in disagreement(spans).items():
            differences[rival] = max(difference, differences.get(rival, 0.0))
        if stage is model[0]:
            clocks = device.clocks_mhz(spans["fused"].forward)
        samples = {rival: partial(span.sample, device) for rival, span in spans.items()}
        measured.append(interleaved(samples, repetitions))
        say(f"{stage}: " + ", ".join(f"{k} {f:.3f} + {b:.3f} ms" for k, (f, b) in measured[-1].items()))
    multiprocessors = device.properties.multi_processor_count if isinstance(device, Gpu) else 1
    copied = device.copy_bytes_per_s()
    rates = Rates(copied, SPECIAL_PER_CLOCK * multiprocessors * clocks[1] * 1e6)
    return [
        "Span: from the depthwise convolution's output to out_norm's input, in training under bfloat16 autocast. "
        f"Medians of {repetitions} samples in turn, forward / backward, each from a cold L2 cache and without launch "
        "times (all is queued before the GPU starts). Weights, inputs and output gradients are the same; fused and "
        "plain take and give (B, H, W, C), the official one (B, C, H, W).",
        *(
            f"{rival.capitalize()} differs from fused by a relative RMS of {difference:.1e} at most."
            for rival, difference in differences.items()
        ),
        "",
        *_times(model, measured),
        "",
        *_roofline(model, measured, rates, clocks),
        *_launch_bound(device),
    ]


def _times(model: list[Stage], measured: list[dict[str, list[float]]]) -> list[str]:
    rivals = list(measured[0])
    total = {
        rival: [
            sum(stage.blocks * times[rival][way] for stage, times in zip(model, measured, strict=True))
            for way in (0, 1)
        ]
        for rival in rivals
    }
    rows = [
        (
            label,
            *(f"{times[rival][0]:.3f} / {times[rival][1]:.3f}" for rival in rivals),
            *(f"{sum(times[rival]) / sum(times['fused']):.2f}×" for rival in rivals[1:]),
        )
        for label, times in [*zip(map(str, model), measured, strict=True), ("**all blocks**", total)]
    ]
    columns = ("blocks × shape", *(f"{r}, ms" for r in rivals), *(f"{r} / fused" for r in rivals[1:]))
    return table(columns, rows)


def _roofline(
    model: list[Stage], measured: list[dict[str, list[float]]], rates: Rates, clocks: tuple[float, float]
) -> list[str]:
    bounds = [rates.bounds_ms(stage) for stage in model]
    rows = []
    for stage, times, (forward, backward) in zip(model, measured, bounds, strict=True):
        row = [str(stage)]
        for taken, bound in zip(times["fused"], (forward, backward), strict=True):
            row += [f"{bound[0]:.3f}", f"{bound[1]:.3f}", f"{taken:.3f}", f"{max(bound) / taken:.0%}"]
        rows.append(row)
    whole = ["**all blocks**"]
    for way in (0, 1):
        sums = [sum(s.blocks * b[way][kind] for s, b in zip(model, bounds, strict=True)) for kind in (0, 1)]
        floor = sum(s.blocks * max(b[way]) for s, b in zip(model, bounds, strict=True))
        taken = sum(s.blocks * t["fused"][way] for s, t in zip(model, measured, strict=True))
        whole += [f"{sums[0]:.3f}", f"{sums[1]:.3f}", f"{taken:.3f}", f"**{floor / taken:.0%}**"]
    ways = ("forward", "backward")
    columns = [
        f"{way}: {what}" for way in ways for what in ("traffic, ms", "special, ms", "fused, ms", "roofline")
    ]
    return [
        f"Roofline: the larger of two times. Traffic: the least, at {rates.bytes_per_s / 1e12:.2f} TB/s of copying "
        "measured here (forward x in and y out; backward x, the output's gradient and the projection in, both "
        f"gradients out; bfloat16). Special functions: {SPECIAL_PER_CLOCK} results a clock and multiprocessor at "
        f"{clocks[1]:.0f} MHz, read under load (limit {clocks[0]:.0f}); for an element and direction 2 + N results "
        "forward (softplus, and a decay for each state) and 3 + N backward (softplus's slope too). "
        "The fused times include the projection's matrix products.",
        "",
        *table(("blocks × shape", *columns), [*rows, whole]),
    ]


def _launch_bound(device: Device) -> list[str]:
    count = device.launch_bound if isinstance(device, Gpu) else 0
    return ["", f"In {count} samples the GPU waited for launches."] if count else []


_started = time.monotonic()


def say(line: str) -> None:
    """Tell progress at once: a run that is cut short shows how far it came."""
    print(f"[{time.monotonic() - _started:6.1f} s] {line}", flush=True)


def imported(checkout: Path | None) -> tuple[Official | None, str]:
    """Import the official checkout where one is named, or say why there is none."""
    if checkout is None:
        return None, "Official: not measured, as no checkout was named (--official PATH)."
    try:
        return Official(checkout), "Official: the checkout's own SS2D with its CUDA kernel (oflex)."
    except Exception as error:  # noqa: BLE001 a foreign package may fail in any way, and costs us a column alone
        return None, f"Official: not measured, as it cannot be imported ({type(error).__name__}: {error})."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("core", "vanilla", *models_gpu.PARTS)
    parser.add_argument(
        "parts", nargs="+", choices=parts, help="what to measure, in this order; vanilla: N = 16"
    )
    parser.add_argument("--eager", action="store_true", help="models run op by op (the default)")
    parser.add_argument("--replayed", action="store_true", help="the same, replayed as CUDA graphs")
    parser.add_argument("--compiled", action="store_true", help="models run through torch.compile")
    parser.add_argument(
        "--graphed", action="store_true", help="compiled, as CUDA graphs; one contender a run"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=models_gpu.CONTENDERS, default=models_gpu.CONTENDERS
    )
    parser.add_argument(
        "--official", type=Path, metavar="PATH", help="an official checkout, its extension built"
    )
    parser.add_argument(
        "--ungated", action="store_true", help="the same code was compared with float64 already"
    )
    parser.add_argument("--repetitions", type=int, default=20, help="samples of each, in turn (default 20)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the tables there too")
    parser.add_argument(
        "--rehearse", action="store_true", help=argparse.SUPPRESS
    )  # on a CPU, figures mean nothing
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.rehearse):
        sys.exit("ss2d_gpu.py needs a CUDA device; there is none here")
    device: Device = Rehearsal() if args.rehearse else Gpu()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    folders = [*([] if args.rehearse else [RESULTS]), *([args.out] if args.out else [])]
    official, about_official = imported(args.official)
    say(about_official)
    agreed = "Gate: not run (--ungated)." if args.ungated else gate(device)
    say(agreed)
    engines = [e for e in models_gpu.ENGINES if getattr(args, e)] or ["eager"]
    tiny, vanilla = (REHEARSED, REHEARSED[:1]) if args.rehearse else (TINY, VANILLA_TINY)
    failed = []
    for part, engine in itertools.product(args.parts, engines):
        alone = part in ("core", "vanilla")  # these know no engine
        if alone and engine != engines[0]:
            continue
        say(part if alone else f"{part}, {engine}")
        try:
            if part == "core":
                name, title = "ss2d_core_gpu", "The fused scan on a GPU: VMamba-T's span"
                lines = core(tiny, official, args.repetitions, device)
            elif part == "vanilla":
                name, title = "ss2d_vanilla_gpu", "The fused scan on a GPU: vanilla VMamba-T's span, N = 16"
                lines = core(vanilla, None, max(3, args.repetitions // 4), device)
            else:
                setting = models_gpu.Setting(device, engine, args.contenders, official, args.repetitions, say)
                name, title, lines = models_gpu.PARTS[part](setting)
            publish(name, title, [agreed, about_official, "", *lines], folders)
        except Exception:  # noqa: BLE001 the parts that follow are worth their time all the same
            traceback.print_exc()
            failed.append(part)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
