"""The four-direction scan as one custom op: compile, checkpointing and FLOP counters see the same thing.

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
from vmamba_kernels.launch import custom_op
from vmamba_kernels.scan.op import scan_flops
from vmamba_kernels.ss2d import fast
from vmamba_kernels.ss2d.order import PATTERNS
from vmamba_kernels.ss2d.tiles import padded

if importlib.util.find_spec("triton") is not None:
    from vmamba_kernels.ss2d import fused


def ss2d_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    pattern: str = "cross2d",
    backend: str = "auto",
) -> Tensor:
    """Scan x (B, H, W, C) in four directions and add the outputs -> (B, H, W, C) in x's dtype.

    projected (B, H, W, 4*P), P >= R+2N, holds [dt R | B N | C N | filling] of each direction for the un-permuted
    tokens; the filling must be finite, and a P that is a multiple of 8 is read fastest. What is not finite in one
    direction's columns of a token may reach the other directions' scans. dt_weight is (4, C, R),
    dt_bias (4, C), A (4*C, N) negative, D (4*C). The state is float32 at least.
    Raises ValueError for shapes or a pattern that do not fit, BackendError for a backend that cannot run here.
    """
    _check(x, projected, dt_weight, dt_bias, A, D, pattern)
    chosen = backend_for(backend, x)
    width = dt_weight.shape[2] + 2 * A.shape[1]
    if chosen == "torch" and projected.shape[-1] != 4 * width:
        projected = projected.reshape(*x.shape[:3], 4, -1)[..., :width].flatten(3)
    inputs = (x, projected, dt_weight, dt_bias, A, D)
    # Inference keeps no states. A scan that a checkpoint runs without gradients is run again with them.
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y: Tensor
    y, _ = scan_forward(*inputs, pattern, chosen, save)
    return y


def _check(
    x: Tensor, projected: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} is unknown; use one of {', '.join(PATTERNS)}")
    if x.dim() != 4 or dt_weight.dim() != 3 or A.dim() != 2 or x.shape[1] * x.shape[2] < 1:
        raise ValueError(
            "x must be (B, H, W, C) with H*W >= 1, dt_weight (4, C, R), A (4*C, N); "
            f"got {tuple(x.shape)}, {tuple(dt_weight.shape)}, {tuple(A.shape)}"
        )
    batch, height, width, channels = x.shape
    rank, state = dt_weight.shape[2], A.shape[1]
    wanted = {
        "projected": (projected, (batch, height, width, max(projected.shape[-1] // 4, rank + 2 * state) * 4)),
        "dt_weight": (dt_weight, (4, channels, rank)),
        "dt_bias": (dt_bias, (4, channels)),
        "A": (A, (4 * channels, state)),
        "D": (D, (4 * channels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; "
                f"with x {tuple(x.shape)}, R={rank}, N={state} it must be {shape}"
            )


@custom_op("vmamba::ss2d_scan")
def scan_forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The op itself: y and the states for the backward where `save`; `backend` is torch or triton."""
    if backend == "triton":
        return fused.forward(x, projected, dt_weight, dt_bias, A, D, pattern, save)
    return fast.forward(x, projected, dt_weight, dt_bias, A, D, pattern)


@scan_forward.register_fake
def _(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return x.new_empty(x.shape), fused.empty_saved(x, A) if save else x.new_empty(0)
    return x.new_empty(x.shape), fast.empty_saved(x, A)


@custom_op("vmamba::ss2d_scan_backward")
def scan_backward(
    grad_y: Tensor,
    saved: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The adjoint as an op: the gradients of x, projected, dt_weight, dt_bias, A and D."""
    if backend == "triton":
        return fused.backward(grad_y, saved, x, projected, dt_weight, dt_bias, A, D, pattern)
    return fast.backward(grad_y, saved, x, projected, dt_weight, dt_bias, A, D, pattern)


@scan_backward.register_fake
def _(
    grad_y: Tensor,
    saved: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = [t.new_empty(t.shape) for t in (x, projected, dt_weight, dt_bias, A, D)]
    return d[0], d[1], d[2], d[3], d[4], d[5]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pattern, ctx.backend, _save = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # none is made for the states: they are larger than x


def _backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 9
    saved, *tensors = ctx.saved_tensors
    return (*scan_backward(grad_y, saved, *tensors, ctx.pattern, ctx.backend), None, None, None)


scan_forward.register_autograd(_backward, setup_context=_setup)


def ss2d_flops(x: Sequence[int], rank: int, state: int) -> int:
    """Return the forward's FLOPs for x (B, H, W, C): the dt projection and four scans, two a multiply-add."""
    batch, height, width, channels = x
    sequences = (batch, 4 * channels, height * width)
    return 2 * math.prod(sequences) * rank + scan_flops(sequences, state, True)


@register_flop_formula(torch.ops.vmamba.ss2d_scan)
def _flops(x: Any, projected: Any, dt_weight: Any, dt_bias: Any, A: Any, *args: Any, **kwargs: Any) -> int:
    return ss2d_flops(x, dt_weight[2], A[1])


@register_flop_formula(torch.ops.vmamba.ss2d_scan_backward)
def _backward_flops(
    grad_y: Any,
    saved: Any,
    x: Any,
    projected: Any,
    dt_weight: Any,
    dt_bias: Any,
    A: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * ss2d_flops(x, dt_weight[2], A[1])


@custom_op("vmamba::ss2d_weights")
def scan_weights(
    x_proj: Tensor, dt_proj: Tensor, a_logs: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Make what a scan reads of a model's parameters: its projection's weight and the time steps', in dtype, and A.

    x_proj (4*(R+2N), C) becomes (4*P, C), for triton with rows of zeros so that P is a multiple of 8; dt_proj keeps
    its shape, whose last size is R, and A = -exp(a_logs) (4*C, N) is float32 at least.
    """
    if backend == "triton":
        return fused.weights(x_proj, dt_proj, a_logs, dtype)
    wide = torch.promote_types(a_logs.dtype, torch.float32)
    return x_proj.to(dtype, copy=True), dt_proj.to(dtype, copy=True), -torch.exp(a_logs.to(wide))


@scan_weights.register_fake
def _(
    x_proj: Tensor, dt_proj: Tensor, a_logs: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    width = dt_proj.shape[-1] + 2 * a_logs.shape[1]
    rows = 4 * (padded(width) if backend == "triton" else width)
    return (
        x_proj.new_empty(rows, x_proj.shape[1], dtype=dtype),
        dt_proj.new_empty(dt_proj.shape, dtype=dtype),
        a_logs.new_empty(a_logs.shape, dtype=torch.promote_types(a_logs.dtype, torch.float32)),
    )


@custom_op("vmamba::ss2d_weight_gradients")
def scan_weight_gradients(
    d_x_proj: Tensor, d_dt_proj: Tensor, d_A: Tensor, A: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of scan_weights: its results' gradients in, those of x_proj and dt_proj in dtype and a_logs' out."""
    if backend == "triton":
        return fused.weight_gradients(d_x_proj, d_dt_proj, d_A, A, dtype)
    return d_x_proj.to(dtype, copy=True), d_dt_proj.to(dtype, copy=True), d_A * A


@scan_weight_gradients.register_fake
def _(
    d_x_proj: Tensor, d_dt_proj: Tensor, d_A: Tensor, A: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = 4 * (d_dt_proj.shape[-1] + 2 * A.shape[1])
    return (
        d_x_proj.new_empty(rows, d_x_proj.shape[1], dtype=dtype),
        d_dt_proj.new_empty(d_dt_proj.shape, dtype=dtype),
        d_A.new_empty(d_A.shape),
    )
