"""What a set of runs says: a law with intervals, its compute-optimal frontier, and the IsoFLOP parabola beside it.

Law: every interval is of a case bootstrap over runs, widened about the estimate by sqrt(n / (n - P)) for the P
parameters that were fitted (in logarithms, E as it is): plain percentiles are too narrow at tens of runs. C = 6 ×
multiply-adds of a forward × samples. Everything is a function of the runs and a seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.scaling.fit import HIGHEST, LOWEST, Array, Problem, predict

CONFIDENCE = 0.95
DELTA = 1.5  # Huber's threshold over the noise
OUTLIER = 3.0  # a residual over the noise that is listed
BOOTSTRAPS = 1000
UNLIKELY = 0.01  # a true law is rejected in so many studies
JOINT = ("E", "A", "B", "alpha", "beta")
SIMPLE = ("E", "A", "alpha")
_CLIPPED = 0.7785  # mean square of a standard normal that is clipped at DELTA
_TINY = 1e-300
_PER_GMAC = 6e9  # training FLOPs


@dataclass(frozen=True)
class Interval:
    """An estimate and its bounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.span})"

    @property
    def span(self) -> str:
        """The bounds. None where the fit is held at 0 in all bootstraps: no width there is a precision."""
        if self.value == self.low == self.high == 0:
            return "at its bound of 0"
        return f"{self.low:.4g} … {self.high:.4g}"

    def holds(self, truth: float) -> bool:
        return self.low <= truth <= self.high


@dataclass(frozen=True)
class Law:
    """A fitted law: parameters as `names` say, E and amplitudes first, then the exponents."""

    names: tuple[str, ...]
    value: Array  # (parameters,)
    bootstraps: Array  # (R, parameters), widened
    delta: float
    noise: float  # of a run's log loss, robust, by the residuals
    residuals: Array  # (n,), of log loss
    unconverged: int  # bootstraps that the solver gave up on; they are used as they stand

    @property
    def estimates(self) -> dict[str, Interval]:
        """Each parameter with its own interval."""
        return self._box((1 - CONFIDENCE) / 2)

    @property
    def simultaneous(self) -> dict[str, Interval]:
        """A box that holds all parameters at once in so many of the bootstraps."""
        rank = np.argsort(np.argsort(self.bootstraps, axis=0), axis=0) / (len(self.bootstraps) - 1)
        tail = np.minimum(rank, 1 - rank).min(axis=1)
        return self._box(float(np.quantile(tail, 1 - CONFIDENCE)))

    def _box(self, tail: float) -> dict[str, Interval]:
        low, high = np.quantile(self.bootstraps, [tail, 1 - tail], axis=0)
        return {
            name: Interval(float(self.value[i]), float(low[i]), float(high[i]))
            for i, name in enumerate(self.names)
        }

    def loss(self, x: Array) -> tuple[Array, Array, Array]:
        """The law at points x (K, m): its value and the bounds of its interval, of the law and not of one run."""
        low, high = _bounds(predict(self.bootstraps, x))
        return predict(self.value, x), low, high

    def new_run(self, x: Array, seed: int = 0) -> tuple[Array, Array]:
        """Bounds for the loss of one more run at points x: the law's, and a run's noise."""
        drawn = np.random.default_rng(seed).standard_normal((len(self.bootstraps), x.shape[1]))
        return _bounds(predict(self.bootstraps, x) * np.exp(self.noise * drawn))

    def remarks(self) -> list[str]:
        """What a reader must know before believing it."""
        found = []
        e = self.estimates["E"]
        if e.value == 0:
            found.append(
                f"E is hardly identified: it is at its bound of 0, and up to {e.high:.4g} in the bootstraps; that is "
                "no measure of what neither size nor samples lower, and predictions far outside of the runs rest on it"
            )
        elif e.low <= 0.01 * max(e.value, _TINY) or e.high - e.low > e.value:
            found.append(f"E is hardly identified: {e}; predictions far outside of the runs rest on it")
        for i, name in enumerate(self.names):
            if name in ("alpha", "beta"):
                amplitude = self.value[1 + i - (len(self.names) + 1) // 2]
                if not LOWEST * 1.01 < self.value[i] < HIGHEST * 0.99 or amplitude <= 0:
                    found.append(f"{name} is at its bound: the runs do not show how the loss falls along it")
        return found


def fit_law(
    x: Array,
    y: Array,
    names: Sequence[str] = JOINT,
    *,
    bootstraps: int = BOOTSTRAPS,
    delta: float | None = None,
    seed: int = 0,
) -> Law:
    """Fit y = E + A / x_1^alpha (+ B / x_2^beta) to n runs, x (K, n); delta None: 1.5 × the noise.

    Raises ConfigError where the runs are too few to tell the parameters.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    _check(x, names)
    free = len(names)
    problem = Problem(x, y)
    ones = np.ones((1, y.size))
    found = problem.search()
    for _ in range(3):  # least squares, then Huber at the threshold that the residuals suggest
        noise = _noise(problem.residuals(found)[0], free)
        problem = Problem(x, y, delta or max(DELTA * noise, 1e-9))
        found = problem.solve(found.exponents, ones, found.coefficients)
    residuals = problem.residuals(found)[0]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(y.size, np.full(y.size, 1 / y.size), size=bootstraps).astype(float)
    copies = problem.solve(
        np.repeat(found.exponents, bootstraps, axis=0),
        weights,
        np.repeat(found.coefficients, bootstraps, axis=0),
    )
    value = found.natural[0]
    widened = _widened(value, copies.natural, np.sqrt(y.size / max(1, y.size - free)))
    return Law(
        tuple(names),
        value,
        widened,
        problem.delta,
        _noise(residuals, free),
        residuals,
        int((~copies.converged).sum()),
    )


def outliers(law: Law) -> list[int]:
    """Which runs lie further from the law than its noise explains."""
    return [int(i) for i in np.flatnonzero(np.abs(law.residuals) > OUTLIER * max(law.noise, 1e-9))]


def seed_noise(cells: Sequence[object], y: Array) -> float | None:
    """The standard deviation of log loss between runs of one cell, pooled; None where no cell has two."""
    groups: dict[object, list[float]] = {}
    for cell, loss in zip(cells, np.log(y), strict=True):
        groups.setdefault(cell, []).append(float(loss))
    several = [np.asarray(g) for g in groups.values() if len(g) > 1]
    if not several:
        return None
    free = sum(len(g) - 1 for g in several)
    return float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in several) / free))


@dataclass(frozen=True)
class Misfit:
    """Lack of fit over pure error: whether the means of points lie further from the law than their runs explain."""

    f: float
    free: tuple[int, int]  # degrees of freedom: points less parameters, runs less points
    chance: float  # of such an F or a larger one under a law that is true

    @property
    def rejects(self) -> bool:
        return self.chance < UNLIKELY

    def __str__(self) -> str:
        return f"F({self.free[0]}, {self.free[1]}) = {self.f:.3g}, p = {self.chance:.1g}"


def misfit(cells: Sequence[object], residuals: Array, parameters: int) -> Misfit | None:
    """The F test of a law that was fitted to runs of `cells`; None where no cell has two runs that differ.

    Without runs of one point nothing tells a law that is wrong from noise. The fit is Huber's, so F is a little larger
    than that of least squares.
    """
    groups: dict[object, list[float]] = {}
    for cell, residual in zip(cells, residuals, strict=True):
        groups.setdefault(cell, []).append(float(residual))
    each = [np.asarray(group) for group in groups.values()]
    free = len(each) - parameters, residuals.size - len(each)
    pure = sum(float(((group - group.mean()) ** 2).sum()) for group in each)
    if min(free) < 1 or pure <= 0:
        return None
    lack = sum(float(group.size * group.mean() ** 2) for group in each)
    f = (lack / free[0]) / (pure / free[1])
    return Misfit(f, free, _beyond_f(f, *free))


def _beyond_f(f: float, above: int, below: int) -> float:
    """The chance of an F of (above, below) degrees of freedom beyond f: a regularized incomplete beta function."""
    x = below / (below + above * f)
    return _incomplete_beta(below / 2, above / 2, x)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (Lentz's method): scipy is not needed for a fit."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the other side converges
        return 1 - _incomplete_beta(b, a, 1 - x)
    logs = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 500):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _not_zero(1 + step * d), _not_zero(1 + step / c)
            value *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return min(1.0, math.exp(logs) * value / a)


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


# The frontier


@dataclass(frozen=True)
class Work:
    """Training FLOPs a sample as a power of the parameters: 6e9 × gmacs × N^power."""

    gmacs: float
    power: float
    assumed: bool  # no multiply-adds were given: C = 6 N D, as for a network that applies each weight once a sample

    def flops(self, params: Array) -> Array:
        return np.asarray(_PER_GMAC * self.gmacs * params**self.power)


@dataclass(frozen=True)
class Frontier:
    """The size and samples of least loss at each compute, with bounds; N* ∝ C^a, D* ∝ C^b."""

    flops: Array
    params: tuple[Array, Array, Array]  # value, low, high
    samples: tuple[Array, Array, Array]
    loss: tuple[Array, Array, Array]
    a: Interval
    b: Interval


def work_of(params: Array, gmacs: Array | None) -> Work:
    """How compute grows with size on this ladder: a straight line in logarithms."""
    if gmacs is None:
        return Work(1e-9, 1.0, True)
    unique = np.unique(np.stack([params, gmacs]), axis=1)
    if unique.shape[1] < 2:
        return Work(float(gmacs[0] / params[0]), 1.0, False)
    power, constant = np.polyfit(np.log(unique[0]), np.log(unique[1]), 1)
    return Work(float(np.exp(constant)), float(power), False)


def frontier(law: Law, work: Work, flops: Array) -> Frontier:
    """Minimise the law on each C = flops: α A N^-α = m β B D^-β with D = C / (FLOPs a sample of N), in closed form."""
    flops = np.asarray(flops, float)
    value = _optimum(law.value[None], work, flops)
    several = _optimum(law.bootstraps, work, flops)
    bounds = [_bounds(part) for part in several]
    n, d, loss = ((value[i][0], *bounds[i]) for i in range(3))
    a, b = (_exponent(law, work, which) for which in ("a", "b"))
    return Frontier(flops, n, d, loss, a, b)


def _optimum(laws: Array, work: Work, flops: Array) -> tuple[Array, Array, Array]:
    _, big_a, big_b, alpha, beta = (np.maximum(laws[:, i, None], _TINY) for i in range(5))
    m = work.power
    # log N* = (log(αA / mβB) + β log(C / c)) / (α + mβ), where a sample of size N takes c N^m FLOPs
    log_c = np.log(flops) - np.log(_PER_GMAC * work.gmacs)
    log_n = (np.log(alpha * big_a) - np.log(m * beta * big_b) + beta * log_c) / (alpha + m * beta)
    log_n = np.clip(log_n, -300, 300)
    log_d = np.clip(log_c - m * log_n, -300, 300)
    loss = laws[:, :1] + big_a * np.exp(-alpha * log_n) + big_b * np.exp(-beta * log_d)
    return np.exp(log_n), np.exp(log_d), loss


def _exponent(law: Law, work: Work, which: str) -> Interval:
    def of(laws: Array) -> Array:
        alpha, beta = laws[:, 3], laws[:, 4]
        share = alpha + work.power * beta
        return np.asarray(beta / share if which == "a" else alpha / share)

    low, high = _bounds(of(law.bootstraps)[:, None])
    return Interval(float(of(law.value[None])[0]), float(low[0]), float(high[0]))


# The parabola


@dataclass(frozen=True)
class Valley:
    """A parabola in log N through the losses of one IsoFLOP level."""

    flops: float
    params: float | None  # at its lowest point; None: it opens downwards
    loss: float | None
    inside: bool  # between the smallest and the largest size of the level
    curve: tuple[float, float, float]  # of log N, highest power first
    points: tuple[tuple[float, float], ...]  # (params, loss) that it goes through


@dataclass(frozen=True)
class Parabola:
    """Approach 2 of Hoffmann et al.: N* of each level, and N* ∝ C^a through them. Biased: arXiv 2603.22339."""

    valleys: tuple[Valley, ...]
    a: Interval | None  # None: fewer than two levels have a lowest point


def levels_of(flops: Array, *, within: float = 0.1) -> list[list[int]]:
    """Runs of like compute: neighbours in log C that lie no further apart than `within`."""
    order = np.argsort(flops)
    groups: list[list[int]] = []
    for i in order:
        if groups and np.log(flops[i] / flops[groups[-1][0]]) <= within:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    return groups


def parabola(
    params: Array, flops: Array, loss: Array, *, bootstraps: int = 200, seed: int = 0
) -> Parabola | None:
    """Fit each level with three sizes or more; None where there is none."""
    groups = [g for g in levels_of(flops) if len(np.unique(params[g])) >= 3]
    if not groups:
        return None
    log_n, rng = np.log(params), np.random.default_rng(seed)
    valleys, lowest = [], []
    for g in groups:
        x, y = log_n[g], loss[g]
        centre = x.mean()
        weights = rng.multinomial(len(g), np.full(len(g), 1 / len(g)), size=bootstraps)
        curves = _quadratics(x - centre, y, np.concatenate([np.ones((1, len(g))), weights]))
        at = (
            np.where(curves[:, 2] > 0, -curves[:, 1] / (2 * np.maximum(curves[:, 2], _TINY)), np.nan) + centre
        )
        c, b, a = curves[0]
        valleys.append(
            Valley(
                float(np.exp(np.log(flops[g]).mean())),
                None if np.isnan(at[0]) else float(np.exp(min(at[0], 300))),
                None if np.isnan(at[0]) else float(c - b * b / (4 * a)),
                bool(x.min() <= at[0] <= x.max()),
                (float(a), float(b - 2 * a * centre), float(c - b * centre + a * centre * centre)),
                tuple((float(params[i]), float(loss[i])) for i in g),
            )
        )
        lowest.append(at)
    points = np.stack(lowest, axis=1)  # (1 + R, levels)
    log_c = np.log([v.flops for v in valleys])
    slopes = np.array([_slope(log_c, row) for row in points])
    if np.isnan(slopes[0]):
        return Parabola(tuple(valleys), None)
    low, high = np.nanquantile(slopes[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Parabola(tuple(valleys), Interval(float(slopes[0]), float(low), float(high)))


def _slope(x: Array, y: Array) -> float:
    known = ~np.isnan(y)
    return float(np.polyfit(x[known], y[known], 1)[0]) if known.sum() >= 2 else float("nan")


def _quadratics(x: Array, y: Array, weights: Array) -> Array:
    """Weighted least squares of y = c + b x + a x²: (R, 3); nan where a copy has fewer than three sizes."""
    design = np.stack([np.ones_like(x), x, x * x])
    normal = np.einsum("pn,rn,qn->rpq", design, weights, design)
    right = np.einsum("pn,rn,n->rp", design, weights, y)
    enough = np.array([len(np.unique(np.round(x[w > 0], 9))) >= 3 for w in weights])
    out = np.full((len(weights), 3), np.nan)
    out[enough] = np.linalg.solve(normal[enough], right[enough][..., None])[..., 0]
    return out


# Simple laws


def fit_simple(x: Array, y: Array, **options: int) -> Law:
    """Fit y = E + A / x^alpha along one dimension: samples, resolution, width, depth."""
    return fit_law(np.asarray(x, float)[None], y, SIMPLE, **options)


def _check(x: Array, names: Sequence[str]) -> None:
    cells = np.unique(x, axis=1).shape[1]
    free = len(names)
    kinds = ", ".join(names)
    if cells < free:
        raise ConfigError(
            f"{cells} point{'s' * (cells != 1)} for {free} parameters ({kinds}): add runs at other sizes or samples"
        )
    for row, called in zip(x, ("params", "samples") if len(x) == 2 else ("x",), strict=True):
        distinct = len(np.unique(row))
        if distinct < 3:
            raise ConfigError(
                f"{called} has {distinct} distinct value{'s' * (distinct != 1)}: a power law along it needs three"
            )


def _noise(residuals: Array, free: int) -> float:
    """The standard deviation of a run, for so many parameters fitted to the residuals: Huber's proposal 2.

    Residuals beyond 1.5 of it count as 1.5. It begins at the median's, which alone is off by a third too often.
    """
    n = residuals.size
    size = np.abs(residuals)
    share = _CLIPPED * max(1, n - free)
    noise = 1.4826 * float(np.median(size)) * np.sqrt(n / max(1, n - free))
    for _ in range(30):
        noise = float(np.sqrt((np.minimum(size, DELTA * noise) ** 2).sum() / share))
    return float(noise)


def _widened(value: Array, copies: Array, factor: float) -> Array:
    out = copies.copy()
    out[:, 0] = np.maximum(0.0, value[0] + factor * (copies[:, 0] - value[0]))
    centre, logs = np.log(np.maximum(value[1:], _TINY)), np.log(np.maximum(copies[:, 1:], _TINY))
    both = (value[1:] > 0) & (copies[:, 1:] > 0)  # a coefficient at zero has no logarithm to widen
    out[:, 1:] = np.where(both, np.exp(np.clip(centre + factor * (logs - centre), -690, 690)), copies[:, 1:])
    return out


def _bounds(several: Array) -> tuple[Array, Array]:
    low, high = np.quantile(several, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def plain(law: Law) -> dict[str, dict[str, float]]:
    """{name: {value, low, high}}, fit for JSON."""
    return as_plain(law.estimates)


def as_plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: {"value": i.value, "low": i.low, "high": i.high} for name, i in intervals.items()}
