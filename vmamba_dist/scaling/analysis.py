"""What a set of runs says together: which are fitted and which are not and why, the law, and what follows from it.

Law: every run that came in is in exactly one of `used`, `held_out` and `left_out`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.scaling.fit import Array
from vmamba_dist.scaling.laws import (
    BOOTSTRAPS,
    JOINT,
    Frontier,
    Law,
    Misfit,
    Parabola,
    Work,
    as_plain,
    fit_law,
    fit_simple,
    frontier,
    misfit,
    outliers,
    parabola,
    plain,
    seed_noise,
    work_of,
)
from vmamba_dist.scaling.runs import FEW, RunRecord

Measure = Literal["loss", "top1"]
Dimension = Literal["samples", "params", "resolution", "width", "depth"]
# What has to be equal among the runs of a law along one dimension.
_FIXED: Mapping[str, tuple[str, ...]] = {
    "samples": ("params", "resolution"),
    "params": ("samples", "resolution"),
    "resolution": ("params", "samples"),
    "width": ("depth", "samples", "resolution"),
    "depth": ("width", "samples", "resolution"),
}
_LEVELS = 4  # of compute, where they are interpolated
_BEYOND = 100.0  # the frontier of a law that is not rejected is drawn so far beyond the runs' compute


@dataclass(frozen=True)
class SimpleLaw:
    """A law along one dimension, of runs that agree in the others."""

    of: Measure
    against: Dimension
    fixed: Mapping[str, float]
    runs: tuple[RunRecord, ...]
    law: Law


@dataclass(frozen=True)
class HeldOut:
    """A run that was not fitted, beside what the law says of it."""

    run: RunRecord
    predicted: float
    low: float  # of one more run: the law's interval and a run's noise
    high: float

    @property
    def error(self) -> float:
        """Loss over prediction, less one."""
        assert self.run.loss is not None
        return self.run.loss / self.predicted - 1


@dataclass(frozen=True)
class Analysis:
    """A fitted study."""

    used: tuple[RunRecord, ...]
    held_out: tuple[HeldOut, ...]
    left_out: tuple[RunRecord, ...]
    law: Law
    work: Work
    frontier: Frontier
    parabola: Parabola | None
    interpolated: bool  # the parabola's levels are, between the runs of each size
    seeds: float | None  # noise of log loss between runs of one point
    misfit: Misfit | None  # None: no point has two runs
    simple: tuple[SimpleLaw, ...]

    @property
    def outliers(self) -> list[tuple[RunRecord, float]]:
        """Runs, fitted all the same, that lie far from the law, with their residuals."""
        return [(self.used[i], float(self.law.residuals[i])) for i in outliers(self.law)]

    @property
    def range(self) -> dict[str, tuple[float, float]]:
        """What the fitted runs span."""
        sizes, counts = ([getattr(r, name) for r in self.used] for name in ("params", "samples"))
        return {"params": (min(sizes), max(sizes)), "samples": (min(counts), max(counts))}

    @property
    def rejected(self) -> str:
        """Why the law is not to be believed, where its own runs reject it; "" where they do not."""
        if self.misfit is None or not self.misfit.rejects:
            return ""
        return (
            "the runs reject this law: their points lie further from it than runs of one point from each other, "
            f"{self.misfit} (noise around the law {self.law.noise:.1%}, between seeds {self.seeds:.1%}); mean "
            f"residuals by samples: {', '.join(self._residuals_by_samples())}. Its parameters, intervals, frontier and "
            "predictions are those of a curve that is not the runs'; inside its interval shows little, as the misfit "
            "counts there as noise"
        )

    def _residuals_by_samples(self) -> Iterator[str]:
        counts = np.array([r.samples for r in self.used])
        for count in np.unique(counts):
            yield f"{count:.7g} {np.expm1(self.law.residuals[counts == count].mean()):+.0%}"

    def remarks(self) -> list[str]:
        """What a reader must know before believing it, the worst first."""
        found = [self.rejected] if self.rejected else []
        found += [*self._few(), *self.law.remarks(), *self._flat()]
        if self.misfit is None:
            found.append(
                "no point has two runs that differ, so a law that is wrong cannot be told from noise"
            )
        if len(self.resolutions) > 1:
            found.append(
                f"runs at {' and '.join(f'{px:g}' for px in self.resolutions)} px are fitted as one law, which knows "
                "no resolution: what resolution changes is in its noise; fit each alone, or against=resolution"
            )
        if self.work.assumed:
            found.append("no multiply-adds were given (column gmacs): the frontier assumes C = 6 N D")
        if any(r.branched_from for r in self.used):
            found.append(
                "runs that branch share a beginning with the longest of their size and seed, so they are not "
                "independent: the bootstrap, which takes them as such, may be too narrow"
            )
        lost, all_ = self.law.unconverged, len(self.law.bootstraps)
        if lost > 0.01 * all_:
            found.append(f"{lost} of {all_} bootstraps had not converged and stand as they were")
        if self.parabola is None:
            found.append(
                "no three sizes have a like compute, so there is no IsoFLOP parabola to compare with"
            )
        elif self.interpolated:
            found.append(
                "the runs are a grid of samples: IsoFLOP levels are interpolated along each size's runs, in logarithms"
            )
        return found

    @property
    def resolutions(self) -> list[float]:
        return sorted({r.resolution for r in self.used if r.resolution is not None})

    def _few(self) -> Iterator[str]:
        few = sum(r.classes is not None and r.samples < FEW * r.classes for r in self.used)
        if few:
            yield (
                f"{few} of the {len(self.used)} runs saw fewer than {FEW} samples a class, where losses have shown a "
                "transition of learning rather than a power law"
            )

    def _flat(self) -> Iterator[str]:
        x, y = points(self.used)
        for name, at, amplitude, exponent in zip(
            ("params", "samples"), x, self.law.value[1:3], self.law.value[3:5], strict=True
        ):
            if np.ptp(amplitude * at**-exponent) <= max(self.law.noise, 1e-9) * float(np.median(y)):
                yield (
                    f"over the {name} that ran the loss falls by no more than a run's noise: nothing is known of its "
                    "exponent"
                )


def points(runs: Sequence[RunRecord]) -> tuple[Array, Array]:
    """(N, D) as (2, n), and losses."""
    x = np.array([[r.params for r in runs], [r.samples for r in runs]], float)
    return x, np.array([r.loss for r in runs], float)


def analyse(
    records: Sequence[RunRecord], *, bootstraps: int = BOOTSTRAPS, delta: float | None = None, seed: int = 0
) -> Analysis:
    """Fit the finished runs of the grid that are not held out. Raises ConfigError where they are too few."""
    records = [r for r in records if r.phase == "grid"]
    left_out = tuple(r for r in records if not r.finished)
    used = tuple(r for r in records if r.finished and not r.held_out)
    held = [r for r in records if r.finished and r.held_out]
    x, y = points(used)
    try:
        law = fit_law(x, y, JOINT, bootstraps=bootstraps, delta=delta, seed=seed)
    except ConfigError as error:
        told = ", ".join(f"{r.name} ({r.why})" for r in left_out[:6])
        more = f" and {len(left_out) - 6} more" if len(left_out) > 6 else ""
        raise ConfigError(f"{error}" + (f"; left out: {told}{more}" if told else "")) from error
    gmacs = [r.gmacs for r in used]
    known = np.array([g for g in gmacs if g is not None])
    work = work_of(x[0], known if len(known) == len(gmacs) else None)
    flops = work.flops(x[0]) * x[1]
    if len(known) == len(gmacs):
        flops = 6e9 * known * x[1]
    cells = [(r.params, r.samples, r.resolution) for r in used]
    found_misfit = misfit(cells, law.residuals, len(law.names))
    beyond = 1.0 if found_misfit is not None and found_misfit.rejects else _BEYOND
    grid = np.geomspace(flops.min(), beyond * flops.max(), 41)
    naive = parabola(x[0], flops, y, seed=seed)
    between = _interpolated(x[0], flops, y) if naive is None or len(naive.valleys) < 2 else None
    if between is not None:
        naive = parabola(*between, seed=seed)
    return Analysis(
        used,
        _predicted(law, held),
        left_out,
        law,
        work,
        frontier(law, work, grid),
        naive,
        between is not None,
        seed_noise(cells, y),
        found_misfit,
        tuple(
            found
            for of in ("loss", "top1")
            for against in ("samples", "width", "depth", "resolution")
            for found in simple_laws(used, of, against, bootstraps=min(bootstraps, 200), seed=seed)
        ),
    )


def _interpolated(params: Array, flops: Array, loss: Array) -> tuple[Array, Array, Array] | None:
    """Sizes, C and losses at levels of compute between the runs, where three sizes or more reach; None: nowhere.

    Each size's mean log losses over seeds are joined by straight lines in log C.
    """
    lines = []
    for size in np.unique(params):
        mine = params == size
        at, where = np.unique(np.log(flops[mine]), return_inverse=True)
        mean = np.bincount(where, np.log(loss[mine])) / np.bincount(where)
        lines.append((float(size), at, mean))
    ends = np.array([(at[0], at[-1]) for _, at, _ in lines])
    edges = np.unique(ends)
    reached = [c for c in edges if ((ends[:, 0] <= c) & (c <= ends[:, 1])).sum() >= 3]
    if len(reached) < 2:
        return None
    found = [
        (size, np.exp(level), np.exp(np.interp(level, at, mean)))
        for level in np.linspace(reached[0], reached[-1], _LEVELS)
        for size, at, mean in lines
        if at[0] - 1e-9 <= level <= at[-1] + 1e-9
    ]
    sizes, levels, losses = (np.array(column, float) for column in zip(*found, strict=True))
    return sizes, levels, losses


def _predicted(law: Law, held: Sequence[RunRecord]) -> tuple[HeldOut, ...]:
    if not held:
        return ()
    x, _ = points(held)
    value, _, _ = law.loss(x)
    low, high = law.new_run(x)
    return tuple(
        HeldOut(r, float(v), float(a), float(b)) for r, v, a, b in zip(held, value, low, high, strict=True)
    )


def measured(run: RunRecord, of: Measure) -> float | None:
    """The loss, or the top-1 error in %."""
    if of == "loss":
        return run.loss
    return None if run.top1 is None else 100 - run.top1


def simple_laws(
    runs: Sequence[RunRecord],
    of: Measure,
    against: Dimension,
    *,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> list[SimpleLaw]:
    """Fit y = E + A / x^alpha to each group of runs with four points along a dimension that agree in all others.

    y is the loss, or 100 - top-1.
    """
    groups: dict[tuple[float | None, ...], list[RunRecord]] = {}
    for run in runs:
        y = measured(run, of)
        if run.finished and y is not None and y > 0 and getattr(run, against) is not None:
            groups.setdefault(tuple(getattr(run, name) for name in _FIXED[against]), []).append(run)
    found = []
    for key, members in groups.items():
        x = np.array([getattr(r, against) for r in members], float)
        if len(np.unique(x)) < 4:
            continue
        losses = np.array([measured(r, of) for r in members], float)
        fixed = {name: value for name, value in zip(_FIXED[against], key, strict=True) if value is not None}
        found.append(
            SimpleLaw(
                of, against, fixed, tuple(members), fit_simple(x, losses, bootstraps=bootstraps, seed=seed)
            )
        )
    return found


# As plain values


def details(found: Analysis) -> dict[str, Any]:
    """Everything of an analysis as plain values: what a report shows and a prediction needs."""
    law = found.law
    x, _ = points(found.used)
    fitted, _, _ = law.loss(x)
    front = found.frontier
    return {
        "law": "loss = E + A / params^alpha + B / samples^beta; params without the classifier, samples seen",
        "parameters": plain(law),
        "simultaneous": as_plain(law.simultaneous),
        "noise": law.noise,
        "delta": law.delta,
        "noise_between_seeds": found.seeds,
        "misfit": None
        if found.misfit is None
        else {"F": found.misfit.f, "free": list(found.misfit.free), "p": found.misfit.chance},
        "rejected": found.rejected,
        "range": {name: list(span) for name, span in found.range.items()},
        "resolutions": found.resolutions,
        "remarks": found.remarks(),
        "runs": [
            _run(r) | {"predicted": float(p), "residual": float(e)}
            for r, p, e in zip(found.used, fitted, law.residuals, strict=True)
        ],
        "outliers": [r.name for r, _ in found.outliers],
        "left_out": [_run(r) for r in found.left_out],
        "held_out": [
            _run(h.run) | {"predicted": h.predicted, "low": h.low, "high": h.high, "error": h.error}
            for h in found.held_out
        ],
        "flops_a_sample": {
            "rule": "6e9 × gmacs × params ^ power",
            "gmacs": found.work.gmacs,
            "power": found.work.power,
        },
        "frontier": {
            "exponent_params": as_plain({"a": front.a})["a"],
            "exponent_samples": as_plain({"b": front.b})["b"],
            "flops": front.flops.tolist(),
            "params": [part.tolist() for part in front.params],
            "samples": [part.tolist() for part in front.samples],
            "loss": [part.tolist() for part in front.loss],
        },
        "parabola": None
        if found.parabola is None
        else {
            "interpolated": found.interpolated,
            "exponent_params": as_plain({"a": found.parabola.a})["a"] if found.parabola.a else None,
            "levels": [
                {"flops": v.flops, "params": v.params, "loss": v.loss, "inside": v.inside}
                for v in found.parabola.valleys
            ],
        },
        "simple": [simple_plain(s) for s in found.simple],
        "names": list(law.names),
        "value": law.value.tolist(),
        "bootstraps": [[float(f"{v:.7g}") for v in row] for row in law.bootstraps.tolist()],
    }


def simple_plain(found: SimpleLaw) -> dict[str, Any]:
    return {
        "of": "loss" if found.of == "loss" else "100 - top1",
        "against": found.against,
        "fixed": dict(found.fixed),
        "runs": len(found.runs),
        **plain(found.law),
    }


def _run(run: RunRecord) -> dict[str, Any]:
    told = (
        "name",
        "status",
        "why",
        "params",
        "samples",
        "loss",
        "top1",
        "gmacs",
        "lr",
        "seed",
        "branched_from",
    )
    values = {name: getattr(run, name) for name in told}
    return {name: value for name, value in values.items() if value == value}  # a table's lost number is nan


def law_of(plain_details: Mapping[str, Any]) -> Law:
    """The law that details hold. Raises ConfigError where they hold none."""
    try:
        return Law(
            tuple(plain_details["names"]),
            np.array(plain_details["value"], float),
            np.array(plain_details["bootstraps"], float),
            float(plain_details["delta"]),
            float(plain_details["noise"]),
            np.array([run["residual"] for run in plain_details["runs"]], float),
            0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"these are no details of a fit ({error!r}): write them with details=FILE"
        ) from error
