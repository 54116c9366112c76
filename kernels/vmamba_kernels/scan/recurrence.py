"""One chunk of the recurrence and of its adjoint, vectorised over everything but time.

Time comes first, so that a step is one fused multiply-add over a contiguous row. A chunk takes the state before
its first step and hands on the state after its last; its adjoint takes the cotangent of the latter and hands
back that of the former. So chunks compose either way, and only the states between them need be kept.

Axes: T steps, N state, P and Q any two batch-like axes (batch and groups), C channels. x, z and g are
(T, P, Q, C), B and C are (T, N, P, Q, 1), A is (N, P or 1, Q or 1, C) and the state is (N, P, Q, C).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = 1.4426950408889634
CHUNK_ELEMENTS = (
    1 << 17
)  # of one (T, N, P, Q, C) buffer: a few fit the cache, and a call's cost is small against it
NARROW = (
    512  # below this row width a step costs its call, not its arithmetic: run blocks of steps side by side
)


class ChunkGradients(NamedTuple):
    """Cotangents of one chunk: x and z (T, P, Q, C), A as A, B and C (T, N, P, Q), state (N, P, Q, C)."""

    x: Tensor
    z: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor


def chunk_length(length: int, width: int) -> int:
    """Return how many steps of `width` elements a chunk holds: at least 16, at most `length`, never 0."""
    return max(1, min(length, max(16, CHUNK_ELEMENTS // max(1, width))))


def saved_shape(length: int, state: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what a forward over `length` steps saves for its backward, for states (N, P, Q, C).

    Several chunks: the state before each, (chunks, N, P, Q, C); the backward recomputes the rest. One chunk is small
    and its cost is that of calls: its delta and all its states, (T, 1 + N, P, Q, C).
    """
    chunk = chunk_length(length, math.prod(state))
    if chunk == length:
        return (length, 1 + state[0], *state[1:])
    return (-(-length // chunk), *state)


def positive(z: Tensor, out: Tensor | None = None) -> Tensor:
    """Return softplus(z); in float32 as max(z, 0) + 2 atanh(e / (2 + e)) with e = exp(-|z|).

    That is log1p(e) to a relative 1e-7 (1 + |z|) in a seventh of the time: torch's own is not vectorised on a CPU.
    """
    if z.dtype != torch.float32:
        return F.softplus(z) if out is None else out.copy_(F.softplus(z))
    e = z.abs().mul_(-LOG2E).exp2_()
    return torch.add(z.clamp(min=0), e.div_(e + 2).atanh_(), alpha=2, out=out)


def recur(x: Tensor, factor: Tensor, previous: Tensor, *, reverse: bool = False) -> Tensor:
    """Turn x (T, W) in place into x_t + factor_t x_{t-1}, where x_{-1} is previous (W,), and return the last row.

    With reverse the recurrence runs from the last row to the first, x_t + factor_t x_{t+1}, and returns row 0.
    """
    steps, width = x.shape
    block = math.isqrt(steps // 2)
    if width >= NARROW or block < 4:
        return _recur_rows(x, factor, previous, reverse)
    whole = steps - steps % block
    if reverse:
        previous = _recur_rows(x[whole:], factor[whole:], previous, reverse)
        return _recur_blocks(x[:whole], factor[:whole], previous, block, reverse)
    previous = _recur_blocks(x[:whole], factor[:whole], previous, block, reverse)
    return _recur_rows(x[whole:], factor[whole:], previous, reverse)


def _recur_rows(x: Tensor, factor: Tensor, previous: Tensor, reverse: bool) -> Tensor:
    way = -1 if reverse else 1
    for row, row_factor in zip(x.unbind(0)[::way], factor.unbind(0)[::way], strict=True):
        previous = row.addcmul_(row_factor, previous)
    return previous


def _recur_blocks(x: Tensor, factor: Tensor, previous: Tensor, block: int, reverse: bool) -> Tensor:
    """Run all blocks from zero side by side, pass the carries from block to block, then add what each carry adds."""
    way = -1 if reverse else 1
    x_GSW = x.view(len(x) // block, block, x.shape[1])
    reach_GSW = factor.view_as(x_GSW).clone()  # the product of factors from a block's first step to this one
    rows, reaches = x_GSW.unbind(1)[::way], reach_GSW.unbind(1)[::way]
    factors = factor.view_as(x_GSW).unbind(1)[::way]
    for s in range(1, block):
        rows[s].addcmul_(factors[s], rows[s - 1])
        reaches[s].mul_(reaches[s - 1])
    carries = torch.empty_like(rows[-1])
    for carry, end, reach in zip(
        carries.unbind(0)[::way], rows[-1].unbind(0)[::way], reaches[-1].unbind(0)[::way], strict=True
    ):
        previous = torch.addcmul(end, reach, carry.copy_(previous))
    x_GSW.addcmul_(reach_GSW, carries.unsqueeze(1))
    return previous


def _decay(delta: Tensor, A: Tensor) -> Tensor:
    """Return exp(delta A), (T, N, P, Q, C)."""
    decay = delta.new_empty(len(delta), len(A), *delta.shape[1:])
    return torch.mul(delta.unsqueeze(1), A * LOG2E, out=decay).exp2_()


def _states(
    x: Tensor, z: Tensor, A: Tensor, B: Tensor, state: Tensor, softplus: bool, out: Tensor | None
) -> Tensor:
    """Return delta and after it every state, (T, 1 + N, P, Q, C)."""
    saved = x.new_empty(len(x), 1 + len(state), *state.shape[1:]) if out is None else out
    delta, h = saved[:, 0], saved[:, 1:]
    if softplus:
        positive(z, delta)
    else:
        delta.copy_(z)
    torch.mul((delta * x).unsqueeze(1), B, out=h)
    recur(h.view(len(h), -1), _decay(delta, A).view(len(h), -1), state.flatten())
    return saved


def _over_state(product: Tensor) -> Tensor:
    """Sum (T, N, P, Q, C) over N; a state of one needs no pass."""
    return product.squeeze(1) if product.shape[1] == 1 else product.sum(1)


def chunk_forward(
    x: Tensor,
    z: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    softplus: bool,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y without the D term, (T, P, Q, C), and the state after the chunk; fill saved if it is given."""
    h = _states(x, z, A, B, state, softplus, saved)[:, 1:]
    return _over_state(h * C), h[-1]


def chunk_backward(
    x: Tensor,
    z: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    softplus: bool,
    g: Tensor,
    after: Tensor,
    saved: Tensor | None = None,
) -> ChunkGradients:
    """Return a chunk's cotangents from those of its y (g) and of the state after it; recompute what is not saved."""
    steps = _states(x, z, A, B, state, softplus, None) if saved is None else saved
    delta, h = steps[:, 0], steps[:, 1:]
    decay, dx = _decay(delta, A), delta * x
    product = h * g.unsqueeze(1)
    d_C = product.sum(-1)

    # The state's cotangent: lam_t = C_t g_t + decay_{t+1} lam_{t+1}.
    lam = torch.mul(g.unsqueeze(1), C, out=torch.empty_like(decay))
    lam[-1].add_(after)
    rows, factors = lam.view(len(lam), -1), decay.view(len(lam), -1)
    recur(rows[:-1], factors[1:], rows[-1], reverse=True)
    d_state = decay[0] * lam[0]

    # lam_t decay_t h_{t-1}, what reaches delta and A; decay itself is not needed again.
    q = decay
    q[0].mul_(state)
    q[1:].mul_(h[:-1])
    q.mul_(lam)
    d_B = torch.mul(lam, dx.unsqueeze(1), out=product).sum(-1)
    lam_B = _over_state(lam.mul_(B))
    d_delta = _over_state(q * A).addcmul_(lam_B, x)
    d_x = lam_B.mul_(delta)
    d_A = q.mul_(delta.unsqueeze(1)).sum(0).sum_to_size(A.shape)
    d_z = torch.sigmoid(z).mul_(d_delta) if softplus else d_delta
    return ChunkGradients(d_x, d_z, d_A, d_B, d_C, d_state)
