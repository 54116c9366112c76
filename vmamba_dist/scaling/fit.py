"""Fit L = E + Σ_k A_k / x_k^p_k to losses: variable projection, Huber loss on log residuals, many fits at once.

Law: for given exponents p the law is linear in E and A, so only the exponents are searched (variable projection, Golub
and Pereyra, 1973): the coefficients, none of them negative, follow by reweighted least squares at every step. R
weighted copies of the data, such as bootstraps, are solved together. With x = (N, D) this is approach 3 of Hoffmann et
al. (arXiv 2203.15556); that early stopping and narrow intervals spoilt theirs is Besiroglu et al. (2404.10102).

Shapes: R copies, n runs, K terms, P = K + 1 coefficients (E first). numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LOWEST, HIGHEST = 0.01, 3.0  # exponents: below, a term is a constant; above, a step
_GRID = {1: 60, 2: 20}  # starts an exponent, of the first fit
_STEPS = 100
_TINY = 1e-12


@dataclass(frozen=True)
class Solution:
    """R fits of one law. Coefficients belong to x / scale."""

    exponents: Array  # (R, K)
    coefficients: Array  # (R, P)
    objective: Array  # (R,)
    converged: NDArray[np.bool_]  # (R,)
    scale: Array  # (K,)

    @property
    def natural(self) -> Array:
        """(R, P + K): E, A_1 …, p_1 …, with A for x itself."""
        amplitudes = self.coefficients[:, 1:] * self.scale**self.exponents
        return np.concatenate([self.coefficients[:, :1], amplitudes, self.exponents], axis=1)


def predict(natural: Array, x: Array) -> Array:
    """Losses (…, m) of laws (…, P + K) at m points x (K, m)."""
    terms = x.shape[0]
    total = natural[..., :1] + np.zeros(x.shape[1])
    for k in range(terms):
        amplitude, exponent = natural[..., 1 + k, None], natural[..., 1 + terms + k, None]
        total = total + amplitude * x[k] ** -exponent
    return total


class Problem:
    """Losses y (n,) at x (K, n), and Huber's threshold on their log residuals."""

    def __init__(self, x: Array, y: Array, delta: float = np.inf) -> None:
        self.x = np.asarray(x, float)
        self.log_y = np.log(np.asarray(y, float))
        self.delta = delta
        self.scale = np.exp(np.log(self.x).mean(axis=1))
        self.log_x = np.log(self.x) - np.log(self.scale)[:, None]

    @property
    def terms(self) -> int:
        return len(self.log_x)

    def search(self) -> Solution:
        """Fit once, from a grid of exponents: R = 1."""
        axis = np.geomspace(0.03, 2.0, _GRID[self.terms])
        grid = np.stack(np.meshgrid(*[axis] * self.terms, indexing="ij"), -1).reshape(-1, self.terms)
        ones = np.ones((1, self.log_y.size))
        weights = np.broadcast_to(ones, (len(grid), self.log_y.size))
        _, objective = self._project(grid, weights, None, rounds=6)
        best = np.argsort(objective)[:12]
        found = self.solve(grid[best], np.broadcast_to(ones, (len(best), self.log_y.size)))
        winner = int(np.argmin(found.objective))
        only = slice(winner, winner + 1)
        return Solution(
            found.exponents[only],
            found.coefficients[only],
            found.objective[only],
            found.converged[only],
            self.scale,
        )

    def solve(self, start: Array, weights: Array, coefficients: Array | None = None) -> Solution:
        """Fit R weighted copies (R, n) from exponents (R, K), or from coefficients (R, P) too."""
        exponents = np.array(start, float)
        theta, objective = self._project(exponents, weights, coefficients, rounds=4)
        damping = np.full(len(exponents), 1e-3)
        going = np.arange(len(exponents))
        for _ in range(_STEPS):
            w, p, t = weights[going], exponents[going], theta[going]
            gradient, curvature = self._outer(p, w, t)
            diagonal = np.einsum("rkk->rk", curvature)
            damped = curvature.copy()
            np.einsum("rkk->rk", damped)[...] = diagonal * (1 + damping[going, None]) + _TINY
            step = np.clip(-np.linalg.solve(damped, gradient[..., None])[..., 0], -0.5, 0.5)
            tried = np.clip(p + step, LOWEST, HIGHEST)
            new_theta, new_objective = self._project(tried, w, t, rounds=2)
            old = objective[going]
            better = new_objective <= old
            moved = np.abs(tried - p).max(axis=1)
            now = going[better]
            exponents[now], theta[now], objective[now] = (
                tried[better],
                new_theta[better],
                new_objective[better],
            )
            damping[going] = np.where(better, damping[going] * 0.1, damping[going] * 10).clip(1e-9, 1e9)
            done = (better & (moved < 1e-6)) | (better & (old - new_objective <= 1e-8 * old) & (moved < 1e-3))
            done |= ~better & (damping[going] >= 1e8)
            going = going[~done]
            if not going.size:
                break
        converged = np.ones(len(exponents), bool)
        converged[going] = False
        return Solution(exponents, theta, objective, converged, self.scale)

    def residuals(self, solution: Solution) -> Array:
        """log of loss over prediction, (R, n)."""
        design = self._design(solution.exponents)
        out: Array = self.log_y - np.log(self._loss(design, solution.coefficients))
        return out

    def _design(self, exponents: Array) -> Array:
        """(R, P, n): a row of ones, and x^-p of each term."""
        out = np.empty((len(exponents), 1 + self.terms, self.log_y.size))
        out[:, 0] = 1.0
        np.exp(-exponents[:, :, None] * self.log_x, out=out[:, 1:])
        return out

    @staticmethod
    def _loss(design: Array, theta: Array) -> Array:
        out: Array = np.matmul(theta[:, None, :], design)[:, 0]
        return out

    def _huber(self, residual: Array, weights: Array) -> tuple[Array, Array]:
        """Objective (R,), and the weights (R, n) of the least squares that has its gradient."""
        size = np.abs(residual)
        if np.isinf(self.delta):
            return 0.5 * (weights * size * size).sum(axis=1), weights
        inside = np.minimum(size, self.delta)
        objective = (weights * inside * (size - 0.5 * inside)).sum(axis=1)
        return objective, weights * (inside / np.maximum(size, _TINY))

    def _project(
        self, exponents: Array, weights: Array, theta: Array | None, *, rounds: int
    ) -> tuple[Array, Array]:
        """The coefficients that belong to the exponents, by so many Gauss–Newton rounds, and the objective."""
        design = self._design(exponents)
        if theta is None:  # least squares on relative residuals
            relative = design * np.exp(-self.log_y)
            weighted = relative * weights[:, None, :]
            theta = nonnegative(np.matmul(weighted, relative.transpose(0, 2, 1)), weighted.sum(axis=2))
        loss = self._loss(design, theta)
        residual = np.log(loss) - self.log_y
        objective, huber = self._huber(residual, weights)
        for _ in range(rounds):
            relative = design / loss[:, None, :]
            weighted = relative * huber[:, None, :]
            normal = np.matmul(weighted, relative.transpose(0, 2, 1))
            right = np.matmul(weighted, (1 - residual)[..., None])[..., 0]
            tried = nonnegative(normal, right)
            tried_loss = self._loss(design, tried)
            tried_residual = np.log(tried_loss) - self.log_y
            tried_objective, tried_huber = self._huber(tried_residual, weights)
            better = tried_objective < objective
            if not better.any():
                break
            theta = np.where(better[:, None], tried, theta)
            loss = np.where(better[:, None], tried_loss, loss)
            residual = np.where(better[:, None], tried_residual, residual)
            huber = np.where(better[:, None], tried_huber, huber)
            gain = objective - np.where(better, tried_objective, objective)
            objective = objective - gain
            if np.all(gain <= 1e-13 * (objective + _TINY)):
                break
        return theta, objective

    def _outer(self, exponents: Array, weights: Array, theta: Array) -> tuple[Array, Array]:
        """Gradient (R, K) and Gauss–Newton curvature (R, K, K) of the projected objective."""
        design = self._design(exponents)
        loss = self._loss(design, theta)
        residual = np.log(loss) - self.log_y
        _, huber = self._huber(residual, weights)
        inner = design / loss[:, None, :]
        outer = -theta[:, 1:, None] * self.log_x * inner[:, 1:]
        weighted = outer * huber[:, None, :]
        gradient = np.matmul(weighted, residual[..., None])[..., 0]
        curvature = np.matmul(weighted, outer.transpose(0, 2, 1))
        across = np.matmul(weighted, inner.transpose(0, 2, 1))  # (R, K, P)
        held = theta <= 0  # a coefficient at its bound does not give way
        across = np.where(held[:, None, :], 0.0, across)
        normal = np.matmul(inner * huber[:, None, :], inner.transpose(0, 2, 1))
        normal = _masked(normal, held)
        give = np.linalg.solve(normal, across.transpose(0, 2, 1))
        return gradient, curvature - np.matmul(across, give)


def _masked(normal: Array, held: NDArray[np.bool_]) -> Array:
    """The normal matrices with rows and columns of held coefficients taken out: identity there."""
    size = normal.shape[-1]
    either = held[:, :, None] | held[:, None, :]
    ridge = 1e-13 * np.einsum("rpp->rp", normal)
    out: Array = (
        np.where(either, 0.0, normal) + np.eye(size) * (np.where(held, 1.0, ridge + 1e-300)[:, :, None])
    )
    return out


def nonnegative(normal: Array, right: Array) -> Array:
    """Least squares (R, P) from normal equations with no negative coefficient: exact, by trying every set of zeros."""
    count = normal.shape[-1]
    free = _masked(normal, np.zeros(right.shape, bool))
    found: Array = np.linalg.solve(free, right[..., None])[..., 0].astype(np.float64, copy=False)
    bad = np.flatnonzero((found < 0).any(axis=1))
    if not bad.size:
        return found
    normal, right = normal[bad], right[bad]
    best = np.zeros(right.shape)
    gain = np.zeros(len(right))
    for chosen in range(1, 2**count - 1):
        held = np.array([not chosen >> i & 1 for i in range(count)])
        masked = np.broadcast_to(held, right.shape)
        tried = np.linalg.solve(_masked(normal, masked), np.where(held, 0.0, right)[..., None])[..., 0]
        value = np.where((tried >= 0).all(axis=1), (tried * right).sum(axis=1), -np.inf)
        better = value > gain
        best[better], gain[better] = tried[better], value[better]
    found[bad] = best
    return found
