"""One chunk of the recurrence and of its adjoint, vectorised over everything but time.

Time comes first, so that a step is one fused multiply-add over a contiguous row. A chunk takes the state before
its first step and hands on the state after its last; its adjoint takes the cotangent of the latter and hands back
that of the former, so chunks compose in either direction and only the states between them need be kept.

Axes: T steps, N state, P and Q any two batch-like axes (batch and groups), C channels. x, z and g are (T, P, Q, C),
B and C are (T, N, P, Q, 1), A is (N, P or 1, Q or 1, C) and the state is (N, P, Q, C). Views of any strides will do.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = 1.4426950408889634
CHUNK_ELEMENTS = (
    1 << 17
)  # elements of one scratch row block: small enough for the cache, large against a call's cost


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


def positive(z: Tensor) -> Tensor:
    """Return softplus(z); in float32 as max(z, 0) + 2 atanh(e / (2 + e)) with e = exp(-|z|).

    That is log1p(e) to the last bit or two at a seventh of the time: torch's log1p on a CPU is not vectorised.
    """
    if z.dtype != torch.float32:
        return F.softplus(z)
    e = z.abs().mul_(-LOG2E).exp2_()
    return torch.add(z.clamp(min=0), e.div_(e + 2).atanh_(), alpha=2)


def _states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return decay and h (T, N, P, Q, C) and delta*x (T, P, Q, C)."""
    shape = (x.shape[0], *state.shape)
    decay = torch.mul(delta.unsqueeze(1), A * LOG2E, out=x.new_empty(shape)).exp2_()
    dx = delta * x
    h = torch.mul(dx.unsqueeze(1), B, out=x.new_empty(shape))
    previous = state
    for decay_t, h_t in zip(decay.unbind(0), h.unbind(0), strict=True):
        previous = h_t.addcmul_(decay_t, previous)
    return decay, h, dx


def _over_state(product: Tensor) -> Tensor:
    """Sum (T, N, P, Q, C) over N; a state of one needs no pass."""
    return product.squeeze(1) if product.shape[1] == 1 else product.sum(1)


def chunk_forward(
    x: Tensor, z: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return y without the D term, (T, P, Q, C), and the state after the chunk."""
    delta = positive(z) if softplus else z
    _, h, _ = _states(x, delta, A, B, state)
    after = h[-1].clone()
    return _over_state(h.mul_(C)), after


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
) -> ChunkGradients:
    """Return the cotangents of a chunk from those of its y (g) and of the state after it, recomputing its states."""
    delta = positive(z) if softplus else z
    decay, h, dx = _states(x, delta, A, B, state)
    d_C = torch.mul(h, g.unsqueeze(1)).sum(-1)

    # The state's cotangent: lam_t = C_t g_t + decay_{t+1} lam_{t+1}.
    lam = torch.mul(g.unsqueeze(1), C, out=torch.empty_like(h))
    steps, decays = lam.unbind(0), decay.unbind(0)
    following = steps[-1].add_(after)
    for t in range(len(steps) - 2, -1, -1):
        following = steps[t].addcmul_(decays[t + 1], following)
    d_state = decays[0] * following

    # h is no longer needed: its place takes lam_t decay_t h_{t-1}, the part that reaches delta and A.
    q = decay
    q[0].mul_(state)
    q[1:].mul_(h[:-1])
    q.mul_(lam)
    d_B = torch.mul(lam, dx.unsqueeze(1), out=h).sum(-1)
    lam_B = _over_state(lam.mul_(B))
    d_delta = _over_state(q * A).addcmul_(lam_B, x)
    d_x = lam_B.mul_(delta)
    d_A = q.mul_(delta.unsqueeze(1)).sum(0).sum_to_size(A.shape)
    d_z = torch.sigmoid(z).mul_(d_delta) if softplus else d_delta
    return ChunkGradients(d_x, d_z, d_A, d_B, d_C, d_state)
