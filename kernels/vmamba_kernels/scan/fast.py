"""The selective scan on plain torch: time-major chunks and a hand-written adjoint.

The forward saves the states between chunks; the backward goes through the chunks from last to first and
recomputes the rest, so what stays alive between the two is a few states instead of every step. A sequence of one
chunk is small enough to save its steps.
"""

import torch
from torch import Tensor

from vmamba_kernels.scan.recurrence import chunk_backward, chunk_forward, chunk_length, saved_shape

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compute_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype of the state: float32 at least, whatever the input's."""
    return torch.promote_types(u.dtype, torch.float32)


def empty_saved(u: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return room for what a forward over u (B, K*C, L) saves; see recurrence.saved_shape."""
    batch, width, length = u.shape
    groups = B.shape[1]
    shape = saved_shape(length, (A.shape[1], batch, groups, width // groups))
    return u.new_empty(shape, dtype=compute_dtype(u))


def _time_major(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring (B, X, L) to (L, B, X) by a matrix transpose, which torch blocks for the cache.

    The result may share the input's memory (L = 1, or one channel of one sample): read it, never write to it.
    """
    batch, width, length = t.shape
    return t.to(dtype).reshape(batch * width, length).t().contiguous().view(length, batch, width)


def _from_time_major(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return t.reshape(shape[-1], -1).t().contiguous().view(shape).to(dtype)


class _Operands:
    """The inputs as the recurrence wants them: x, z (L, B, K, C), A (N, 1, K, C), B and C (L, N, B, K, 1)."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None
    ) -> None:
        dtype = compute_dtype(u)
        batch, width, length = u.shape
        groups, state = B.shape[1], A.shape[1]
        shape = (length, batch, groups, width // groups)
        self.x = _time_major(u, dtype).view(shape)
        self.z = _time_major(delta, dtype).view(shape)
        if bias is not None:
            self.z = self.z + bias.to(dtype).view(shape[2:])
        self.A = A.to(dtype).t().reshape(state, 1, *shape[2:]).contiguous()
        self.B = B.to(dtype).permute(3, 2, 0, 1).unsqueeze(-1).contiguous()
        self.C = C.to(dtype).permute(3, 2, 0, 1).unsqueeze(-1).contiguous()
        self.state_shape = (state, *shape[1:])
        self.chunk = chunk_length(length, batch * width * state)
        self.starts = range(0, length, self.chunk)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, K*C, L) in u's dtype and what the backward needs beside the inputs."""
    op = _Operands(u, delta, A, B, C, delta_bias)
    y = torch.empty_like(op.x)
    saved = empty_saved(u, A, B)
    whole = saved if len(op.starts) == 1 else None
    state = op.x.new_zeros(op.state_shape)
    for i, start in enumerate(op.starts):
        s = slice(start, start + op.chunk)
        if whole is None:
            saved[i] = state
        y[s], state = chunk_forward(op.x[s], op.z[s], op.A, op.B[s], op.C[s], state, delta_softplus, whole)
    if D is not None:
        y.addcmul_(op.x, D.to(y.dtype).view(op.x.shape[2:]))
    return _from_time_major(y, u.shape, u.dtype), saved


def backward(
    grad_y: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Gradients:
    """Return the gradients of u, delta, A, B, C, D and delta_bias, each in its tensor's dtype.

    Those of an absent D or delta_bias are empty tensors.
    """
    op = _Operands(u, delta, A, B, C, delta_bias)
    g = _time_major(grad_y, op.x.dtype).view(op.x.shape)
    d_x, d_z = torch.empty_like(op.x), torch.empty_like(op.z)
    d_A, d_B, d_C = torch.zeros_like(op.A), torch.empty_like(op.B), torch.empty_like(op.C)
    d_state = initial = op.x.new_zeros(op.state_shape)
    whole = saved if len(op.starts) == 1 else None
    for i in reversed(range(len(op.starts))):
        s = slice(op.starts[i], op.starts[i] + op.chunk)
        state = saved[i] if whole is None else initial
        chunk = (op.x[s], op.z[s], op.A, op.B[s], op.C[s], state)
        grads = chunk_backward(*chunk, delta_softplus, g[s], d_state, whole)
        d_x[s], d_z[s], d_B[s, ..., 0], d_C[s, ..., 0] = grads.x, grads.z, grads.B, grads.C
        d_A += grads.A
        d_state = grads.state
    d_D, d_bias = u.new_empty(0), u.new_empty(0)
    if D is not None:
        d_D = (g * op.x).sum((0, 1)).view(D.shape).to(D.dtype)
        d_x.addcmul_(g, D.to(g.dtype).view(g.shape[2:]))
    if delta_bias is not None:
        d_bias = d_z.sum((0, 1)).view(delta_bias.shape).to(delta_bias.dtype)
    return (
        _from_time_major(d_x, u.shape, u.dtype),
        _from_time_major(d_z, delta.shape, delta.dtype),
        d_A.view(A.shape[1], -1).t().to(A.dtype).contiguous(),
        d_B.squeeze(-1).permute(2, 3, 1, 0).to(B.dtype).contiguous(),
        d_C.squeeze(-1).permute(2, 3, 1, 0).to(C.dtype).contiguous(),
        d_D,
        d_bias,
    )
