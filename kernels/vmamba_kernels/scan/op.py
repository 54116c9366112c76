"""The selective scan as one custom op, so that compile, checkpointing and FLOP counters see the same thing.

The op is functional and chooses its implementation here, once. It returns y and what its adjoint needs.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba_kernels.backend import backend_for
from vmamba_kernels.scan import fast

if importlib.util.find_spec("triton") is not None:
    from vmamba_kernels.scan import triton_bwd, triton_fwd


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """Run h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t over the last axis.

    u and delta are (B, K*C, L), A is (K*C, N), B and C are (B, K, N, L), D and delta_bias (K*C) or None; delta is
    softplus(delta + delta_bias) first. Returns y (B, K*C, L) in u's dtype; the state is float32 at least. auto takes
    Triton on CUDA for every dtype but float64.
    Raises ValueError for shapes that do not fit, BackendError for a backend that cannot run here.
    """
    _check(u, delta, A, B, C, D, delta_bias)
    chosen = backend_for(backend, u)
    y: Tensor
    y, _ = _selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, chosen)
    return y


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    if u.dim() != 3 or A.dim() != 2 or B.dim() != 4:
        raise ValueError(
            f"u must be (B, K*C, L), A (K*C, N), B (B, K, N, L); got {_shape(u)}, {_shape(A)}, {_shape(B)}"
        )
    batch, width, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    if length < 1 or groups < 1 or state < 1 or width % groups:
        raise ValueError(
            f"u {_shape(u)} needs L >= 1 and its channels a multiple of the {groups} groups of B"
        )
    wanted = {
        "delta": (delta, (batch, width, length)),
        "A": (A, (width, state)),
        "B": (B, (batch, groups, state, length)),
        "C": (C, (batch, groups, state, length)),
        "D": (D, (width,)),
        "delta_bias": (delta_bias, (width,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {_shape(tensor)}; with u {_shape(u)} and B {_shape(B)} it must be {shape}"
            )


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


@torch.library.custom_op("vmamba::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = triton_fwd.forward if backend == "triton" else fast.forward
    return run(u, delta, A, B, C, D, delta_bias, delta_softplus)


@_selective_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    saved = triton_fwd.empty_saved(u, A) if backend == "triton" else fast.empty_saved(u, A, B)
    return u.new_empty(u.shape), saved


@torch.library.custom_op("vmamba::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = triton_bwd.backward if backend == "triton" else fast.backward
    return run(grad_y, saved, u, delta, A, B, C, D, delta_bias, delta_softplus)


@_selective_scan_backward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (u, delta, A, B, C, D, delta_bias)
    d = [u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]
    return d[0], d[1], d[2], d[3], d[4], d[5], d[6]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # none is made for the states: they are larger than x


def _backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 9
    saved, *tensors = ctx.saved_tensors
    grads = _selective_scan_backward(grad_y, saved, *tensors, ctx.delta_softplus, ctx.backend)
    kept = (g if t is not None else None for g, t in zip(grads, tensors, strict=True))
    return (*kept, None, None)


_selective_scan.register_autograd(_backward, setup_context=_setup)


def scan_flops(u: Sequence[int], state: int, with_D: bool) -> int:
    """Return the forward's FLOPs for u (B, K*C, L): two a multiply-add of the published 9*B*L*K*C*N + B*L*K*C."""
    return 2 * math.prod(u) * (9 * state + with_D)


@register_flop_formula(torch.ops.vmamba.selective_scan)
def _flops(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return scan_flops(u, A[1], D is not None)


@register_flop_formula(torch.ops.vmamba.selective_scan_backward)
def _backward_flops(
    grad_y: Any,
    saved: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * scan_flops(u, A[1], D is not None)
