"""The selective scan on plain torch: time-major chunks and a hand-written adjoint.

The forward keeps the states between chunks; the backward goes through the chunks from last to first and
recomputes the rest, so what stays alive between the two is a few states instead of every step.
"""

import torch
from torch import Tensor

from vmamba_kernels.scan.recurrence import chunk_backward, chunk_forward, chunk_length

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compute_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype of the state: float32 at least, whatever the input's."""
    return torch.promote_types(u.dtype, torch.float32)


def num_chunks(u: Tensor, A: Tensor) -> int:
    """Return how many chunks the fast path cuts the sequence of u (B, K*C, L) into."""
    batch, width, length = u.shape
    return -(-length // chunk_length(length, batch * width * A.shape[1]))


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
    """Return y (B, K*C, L) in u's dtype and the states before each chunk (chunks, N, B, K, C)."""
    op = _Operands(u, delta, A, B, C, delta_bias)
    y = torch.empty_like(op.x)
    states = op.x.new_empty(len(op.starts), *op.state_shape)
    state = op.x.new_zeros(op.state_shape)
    for i, start in enumerate(op.starts):
        s = slice(start, start + op.chunk)
        states[i] = state
        y[s], state = chunk_forward(op.x[s], op.z[s], op.A, op.B[s], op.C[s], state, delta_softplus)
    if D is not None:
        y.addcmul_(op.x, D.to(y.dtype).view(op.x.shape[2:]))
    return _from_time_major(y, u.shape, u.dtype), states


def backward(
    grad_y: Tensor,
    states: Tensor,
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
    d_state = op.x.new_zeros(op.state_shape)
    for i in reversed(range(len(op.starts))):
        s = slice(op.starts[i], op.starts[i] + op.chunk)
        grads = chunk_backward(
            op.x[s], op.z[s], op.A, op.B[s], op.C[s], states[i], delta_softplus, g[s], d_state
        )
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
