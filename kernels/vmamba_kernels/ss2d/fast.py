"""The four-direction scan on plain torch: all directions in one recurrence, gathered a chunk at a time.

Tokens are brought to (L, B, C) once; a walk then copies whole rows of B*C numbers, so that no (B, 4C, L) tensor
is made. The forward saves the states between chunks, or the steps of a sequence that is one chunk.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_kernels.scan.fast import compute_dtype
from vmamba_kernels.scan.recurrence import chunk_backward, chunk_forward, chunk_length, saved_shape
from vmamba_kernels.ss2d.order import scan_order

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Walk(NamedTuple):
    """One chunk of all four directions: its steps, and the row of x and of the projections for each (T*4,)."""

    steps: int
    tokens: Tensor
    projections: Tensor


@lru_cache(maxsize=256)
def _walks(pattern: str, height: int, width: int, chunk: int, device: torch.device) -> tuple[_Walk, ...]:
    tokens = scan_order(pattern, height, width).t()
    projections = tokens + torch.arange(4, device="cpu") * tokens.shape[0]
    parts = zip(torch.split(tokens, chunk), torch.split(projections, chunk), strict=True)
    return tuple(_Walk(len(t), t.flatten().to(device), p.flatten().to(device)) for t, p in parts)


def empty_saved(x: Tensor, A: Tensor) -> Tensor:
    """Return room for what a forward over x (B, H, W, C) saves; see recurrence.saved_shape."""
    batch, height, width, channels = x.shape
    shape = saved_shape(height * width, (A.shape[1], 4, batch, channels))
    return x.new_empty(shape, dtype=compute_dtype(x))


def _token_major(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring (B, H, W, C) to (L, B*C); a view where B is 1."""
    return t.to(dtype).permute(1, 2, 0, 3).reshape(t.shape[1] * t.shape[2], -1)


def _add_tokens(total: Tensor, walk: _Walk, added: Tensor, *, at_once: bool) -> None:
    """Add (T, 4, B, C) to (L, B*C) along a walk, in place.

    A direction meets a token once, four meet it four times, and a GPU adds what comes at once in any order: there
    one direction after the other, so that the same input gives the same bits.
    """
    tokens, rows = walk.tokens, added.view(len(walk.tokens), total.shape[1])
    if at_once:
        total.index_add_(0, tokens, rows)
        return
    for k in range(4):
        total.index_add_(0, tokens[k::4], rows[k::4])


class _Chunk(NamedTuple):
    """What a chunk's recurrence reads: x and z (T, 4, B, C), B and C (T, N, 4, B, 1), dt (T, 4, B, R)."""

    x: Tensor
    z: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor


def _by_direction(t: Tensor) -> Tensor:
    """Copy (T, 4, B, X) to (4, T*B, X), the batches of a matrix product."""
    return t.transpose(0, 1).reshape(4, -1, t.shape[-1])


class _Operands:
    """The inputs by rows, x (L, B*C) and projections (4*L, B*P), and the small ones as the recurrence wants."""

    def __init__(
        self,
        x: Tensor,
        projected: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        pattern: str,
    ) -> None:
        dtype = compute_dtype(x)
        self.batch, self.height, self.width, self.channels = x.shape
        self.rank, self.state = dt_weight.shape[2], A.shape[1]
        self.inner = self.rank + 2 * self.state
        self.length = self.height * self.width
        self.x = _token_major(x, dtype)
        self.projected = (
            projected.to(dtype)
            .reshape(self.batch, self.length, 4, self.inner)
            .permute(2, 1, 0, 3)
            .reshape(4 * self.length, self.batch * self.inner)
        )
        self.weight = dt_weight.to(dtype)
        self.bias = dt_bias.to(dtype).view(4, 1, self.channels)
        self.A = A.to(dtype).t().reshape(self.state, 4, 1, self.channels).contiguous()
        self.D = D.to(dtype).view(4, self.channels)
        chunk = chunk_length(self.length, 4 * self.batch * self.channels * self.state)
        self.walks = _walks(pattern, self.height, self.width, chunk, x.device)

    def initial_state(self) -> Tensor:
        return self.x.new_zeros(self.state, 4, self.batch, self.channels)

    def tokens(self, rows: Tensor, walk: _Walk) -> Tensor:
        """Gather (L, B*C) along a walk -> (T, 4, B, C)."""
        return rows.index_select(0, walk.tokens).view(walk.steps, 4, self.batch, self.channels)

    def chunk(self, walk: _Walk) -> _Chunk:
        """Gather a walk's tokens and projections and project its time steps."""
        p = self.projected.index_select(0, walk.projections).view(walk.steps, 4, self.batch, self.inner)
        dt, B, C = torch.split(p, [self.rank, self.state, self.state], dim=-1)
        if self.rank == 1:
            z = torch.addcmul(self.bias, dt, self.weight.transpose(1, 2))
        else:
            z = torch.baddbmm(self.bias, _by_direction(dt), self.weight.transpose(1, 2))
            z = z.view(4, walk.steps, self.batch, self.channels).transpose(0, 1).contiguous()
        B, C = B.permute(0, 3, 1, 2).unsqueeze(-1), C.permute(0, 3, 1, 2).unsqueeze(-1)
        return _Chunk(self.tokens(self.x, walk), z, B, C, dt)

    def projection_gradients(self, d_z: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the dt weights (4, C, R) and of dt (T, 4, B, R)."""
        if self.rank == 1:
            d_weight = (d_z * dt).sum(0).sum(1).unsqueeze(-1)
            return d_weight, (d_z * self.weight.transpose(1, 2)).sum(-1, keepdim=True)
        d_z_rows = _by_direction(d_z)
        d_weight = torch.bmm(d_z_rows.transpose(1, 2), _by_direction(dt))
        d_dt = torch.bmm(d_z_rows, self.weight).view(4, len(dt), self.batch, self.rank)
        return d_weight, d_dt.transpose(0, 1)

    def image(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy (L, B*C) back to (B, H, W, C)."""
        tokens = rows.view(self.height, self.width, self.batch, self.channels)
        return tokens.permute(2, 0, 1, 3).to(dtype).contiguous()


def forward(
    x: Tensor, projected: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> tuple[Tensor, Tensor]:
    """Return y (B, H, W, C) in x's dtype and what the backward needs beside the inputs."""
    op = _Operands(x, projected, dt_weight, dt_bias, A, D, pattern)
    state = op.initial_state()
    saved = empty_saved(x, A)
    whole = saved if len(op.walks) == 1 else None
    y = (op.x.view(op.length, op.batch, op.channels) * op.D.sum(0)).view_as(op.x)
    for i, walk in enumerate(op.walks):
        if whole is None:
            saved[i] = state
        c = op.chunk(walk)
        y_chunk, state = chunk_forward(c.x, c.z, op.A, c.B, c.C, state, True, whole)
        _add_tokens(y, walk, y_chunk, at_once=not y.is_cuda)
    return op.image(y, x.dtype), saved


def backward(
    grad_y: Tensor,
    saved: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
) -> Gradients:
    """Return the gradients of x, projected, dt_weight, dt_bias, A and D, each in its tensor's dtype."""
    op = _Operands(x, projected, dt_weight, dt_bias, A, D, pattern)
    g = _token_major(grad_y, op.x.dtype)
    g_tokens = g.view(op.length, op.batch, op.channels)
    d_x = (g_tokens * op.D.sum(0)).view_as(op.x)
    d_D = (g_tokens * op.x.view_as(g_tokens)).sum((0, 1)).expand(4, -1).reshape(-1)
    d_projected = torch.empty_like(op.projected)
    d_weight, d_bias, d_A = torch.zeros_like(op.weight), torch.zeros_like(op.bias), torch.zeros_like(op.A)
    d_state = initial = op.initial_state()
    whole = saved if len(op.walks) == 1 else None
    for i in reversed(range(len(op.walks))):
        walk = op.walks[i]
        c = op.chunk(walk)
        state = saved[i] if whole is None else initial
        g_chunk = op.tokens(g, walk)
        grads = chunk_backward(c.x, c.z, op.A, c.B, c.C, state, True, g_chunk, d_state, whole)
        d_state = grads.state
        d_A += grads.A
        _add_tokens(d_x, walk, grads.x, at_once=not d_x.is_cuda)
        d_bias += grads.z.sum(0).sum(1, keepdim=True)
        d_weight_chunk, d_dt = op.projection_gradients(grads.z, c.dt)
        d_weight += d_weight_chunk
        d_p = torch.cat([d_dt, grads.B.permute(0, 2, 3, 1), grads.C.permute(0, 2, 3, 1)], dim=-1)
        d_projected.index_copy_(0, walk.projections, d_p.view(len(walk.projections), d_projected.shape[1]))
    d_projected = d_projected.view(4, op.length, op.batch, op.inner).permute(2, 1, 0, 3)
    return (
        op.image(d_x, x.dtype),
        d_projected.reshape(projected.shape).to(projected.dtype),
        d_weight.to(dt_weight.dtype),
        d_bias.view(dt_bias.shape).to(dt_bias.dtype),
        d_A.view(op.state, -1).t().to(A.dtype).contiguous(),
        d_D.to(D.dtype),
    )
