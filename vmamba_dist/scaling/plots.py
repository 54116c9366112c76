"""The plots of a study's report, as PNG. The one file that needs matplotlib (the extra `study`).

Law: a plot shows runs as points and laws as lines, in one colour a size; nothing is shown that is not in a table.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from vmamba_dist.scaling.analysis import Analysis, points
from vmamba_dist.scaling.fit import predict
from vmamba_dist.scaling.runs import RunRecord

_SIZE = (7.2, 4.4)
_COLOURS = colormaps["viridis"]


def png(figure: Figure) -> bytes:
    """The bytes of a figure; the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="both", alpha=0.2)
    return figure, axes


def _colour(value: float, low: float, high: float) -> tuple[float, float, float, float]:
    share = (np.log(value) - np.log(low)) / max(1e-9, np.log(high) - np.log(low))
    r, g, b, a = _COLOURS(0.92 * float(np.clip(share, 0, 1)))
    return float(r), float(g), float(b), float(a)


def _logarithmic(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Logarithmic axes whose labels are numbers as one says them: 200 k, 0.6."""
    if x:
        axes.set_xscale("log")
        _ticks(axes.xaxis, axes.get_xlim(), EngFormatter(sep=" "))
    if y:
        axes.set_yscale("log")
        _ticks(axes.yaxis, axes.get_ylim(), FuncFormatter(lambda value, _: f"{value:g}"))


def _ticks(axis: Axis, ends: tuple[float, float], form: EngFormatter | FuncFormatter) -> None:
    if np.log10(ends[1] / ends[0]) < 2:  # else the decades are enough, and their own labels the clearest
        few = (1.0, 2.0, 3.0, 5.0) if ends[1] / ends[0] > 5 else tuple(np.arange(2, 20) / 2)
        axis.set_major_locator(LogLocator(subs=few))
        axis.set_major_formatter(form)
        axis.set_minor_formatter(NullFormatter())


def _sizes(runs: Sequence[RunRecord]) -> list[float]:
    return sorted({r.params for r in runs})


def _million(params: float) -> str:
    return f"{params / 1e6:.3g} M"


def curves(found: Analysis) -> bytes:
    """Loss against samples: each size's runs, the law through them, and the law alone for sizes held out."""
    figure, axes = _axes("samples seen", "loss")
    held = [h.run for h in found.held_out]
    everyone = [*found.used, *held]
    sizes = _sizes(everyone)
    span = [r.samples for r in everyone]
    along = np.geomspace(min(span), max(span), 80)
    for size in sizes:
        colour = _colour(size, sizes[0], sizes[-1])
        mine = [r for r in everyone if r.params == size]
        out = any(r in held for r in mine)
        axes.plot(
            [r.samples for r in mine],
            [r.loss or np.nan for r in mine],
            "^" if out else "o",
            color=colour,
            mfc="none" if out else colour,
            label=_million(size) + (" (held out)" if out else ""),
        )
        x = np.stack([np.full_like(along, size), along])
        axes.plot(along, predict(found.law.value, x), "--" if out else "-", color=colour, lw=1)
    _logarithmic(axes, x=True, y=True)
    axes.legend(title="params", fontsize=8)
    return png(figure)


def isoflop(found: Analysis) -> bytes | None:
    """Loss against size at each level of compute, with the parabola and the law; None where there are no levels.

    Crosses are not runs but lie between runs of their size.
    """
    if found.parabola is None:
        return None
    figure, axes = _axes("params", "loss")
    valleys = found.parabola.valleys
    for valley in valleys:
        colour = _colour(valley.flops, valleys[0].flops, valleys[-1].flops)
        mine, losses = zip(*valley.points, strict=True)
        sizes = np.geomspace(min(mine), max(mine), 80)
        axes.plot(mine, losses, "x" if found.interpolated else "o", color=colour, label=f"{valley.flops:.2g}")
        samples = valley.flops / found.work.flops(sizes)
        axes.plot(sizes, predict(found.law.value, np.stack([sizes, samples])), "-", color=colour, lw=1)
        axes.plot(sizes, np.polyval(valley.curve, np.log(sizes)), ":", color=colour, lw=1)
        if valley.params is not None and valley.inside:
            axes.plot([valley.params], [valley.loss or np.nan], "v", color=colour, mfc="none")
    _logarithmic(axes, x=True)
    axes.legend(title="C, FLOPs (— law, ··· parabola)", fontsize=8)
    return png(figure)


def residuals(found: Analysis) -> bytes:
    """Each run's loss over the law's, less one, against samples; bands at one and three times the noise.

    A size has the colour that it has among the curves.
    """
    figure, axes = _axes("samples seen", "loss over the law's, less one, %")
    sizes = _sizes([*found.used, *(h.run for h in found.held_out)])
    for run, residual in zip(found.used, found.law.residuals, strict=True):
        axes.plot(
            [run.samples], [100 * np.expm1(residual)], "o", color=_colour(run.params, sizes[0], sizes[-1])
        )
    for times in (1, 3):
        axes.axhspan(-100 * times * found.law.noise, 100 * times * found.law.noise, color="grey", alpha=0.12)
    axes.axhline(0, color="black", lw=0.8)
    _logarithmic(axes, x=True)
    return png(figure)


def frontier(found: Analysis) -> bytes:
    """Compute-optimal size and samples against compute, with the 95 % band, and the parabola's lowest points."""
    figure = Figure(figsize=(_SIZE[0], 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    front = found.frontier
    x, _ = points(found.used)
    last = float((found.work.flops(x[0]) * x[1]).max())
    for axes, part, name in ((left, front.params, "params*"), (right, front.samples, "samples*")):
        axes.plot(front.flops, part[0], "-", color="tab:blue", label="law")
        axes.fill_between(front.flops, part[1], part[2], color="tab:blue", alpha=0.2, lw=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("C, FLOPs")
        axes.set_ylabel(name)
        axes.axvline(last, color="grey", ls=":")
        axes.grid(visible=True, alpha=0.2)
    for valley in found.parabola.valleys if found.parabola else ():
        if valley.params is not None and valley.inside:
            flops = found.work.flops(np.array([valley.params]))[0]
            left.plot([valley.flops], [valley.params], "v", color="tab:red", mfc="none")
            right.plot([valley.flops], [valley.flops / flops], "v", color="tab:red", mfc="none")
    left.set_title(
        "line: law with 95 % band; triangles: parabola;\nextrapolated to the right of the dotted line",
        fontsize=8,
    )
    return png(figure)


def predictions(found: Analysis) -> bytes | None:
    """Loss of the held-out runs against what was predicted, with one run's interval; None where none is held out."""
    if not found.held_out:
        return None
    figure, axes = _axes("predicted loss", "loss")
    for h in found.held_out:
        axes.errorbar(
            [h.predicted],
            [h.run.loss or np.nan],
            xerr=[[h.predicted - h.low], [h.high - h.predicted]],
            fmt="^",
            color="tab:red",
            capsize=3,
        )
    x, y = points(found.used)
    axes.plot(predict(found.law.value, x), y, "o", color="grey", ms=4, label="fitted")
    axes.plot([], [], "^", color="tab:red", label="held out")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="black", lw=0.8)
    axes.legend(fontsize=8)
    return png(figure)


def pace(runs: Sequence[RunRecord]) -> bytes | None:
    """Throughput, MFU and memory of each size, as the runs measured them; None where no run did."""
    panels = [
        ("samples_per_s", "samples/s", 1.0),
        ("mfu", "MFU, %", 100.0),
        ("memory_gib", "peak memory, GiB", 1.0),
    ]
    shown = [(key, title, by) for key, title, by in panels if any(getattr(r, key) for r in runs)]
    if not shown:
        return None
    figure = Figure(figsize=(_SIZE[0], 3.2), layout="constrained")
    for axes, (key, title, by) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        mine = [r for r in runs if getattr(r, key)]
        axes.plot([r.params for r in mine], [by * getattr(r, key) for r in mine], "o", color="tab:blue", ms=4)
        _logarithmic(axes, x=True, y=key == "samples_per_s")
        axes.set_xlabel("params")
        axes.set_title(title, fontsize=9)
        axes.grid(visible=True, alpha=0.2)
    return png(figure)
