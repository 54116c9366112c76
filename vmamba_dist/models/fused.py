"""A block's forward and backward in one autograd node: what Block's modules compute, with less kept and fewer launches.

Law: it equals the composition of the block's modules but for rounding; a test holds the two together, and everything
that must see the modules (compile, hooks, selective recompute) gets the composition. Kept for the backward are the
residual stream and the scan's inputs and states; norms, SiLU, GELU and the MLP's first product are computed again in
the backward: the hidden tokens were a third of what a block kept, and cost 2 % of a step to make again. Weights are
cast in one call a forward.

Shapes: M = B*H*W rows of C channels; D inner channels, F hidden ones, K = 4 directions, R time-step rank, N states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_dist.models.ss2d import LN_EPS, SS2D, LayerNorm, at_least_float32
from vmamba_kernels import rows
from vmamba_kernels.launch import own_code, unobserved
from vmamba_kernels.ss2d.op import scan_backward, scan_forward, scan_weight_gradients, scan_weights

if TYPE_CHECKING:
    from vmamba_dist.models.vmamba import Block

K = 4


class Plan(NamedTuple):
    """What of a block is no tensor."""

    eps: float
    pattern: str
    backend: str


class Weights(NamedTuple):
    """A block's parameters, or what it computes with: products' and the convolution's in the compute's precision."""

    norm_weight: Tensor
    norm_bias: Tensor
    out_norm_weight: Tensor
    out_norm_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    x_proj: Tensor  # these five as in Core
    dt_proj: Tensor
    dt_bias: Tensor
    a: Tensor
    ds: Tensor
    in_proj: Tensor
    out_proj: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    conv: Tensor
    conv_bias: Tensor | None


CORE = slice(Weights._fields.index("x_proj"), Weights._fields.index("in_proj"))


class Ops(NamedTuple):
    """The operations of a block that are not torch's own."""

    norm: Callable[..., Any]
    add_norm: Callable[..., Any]
    add_branch: Callable[..., Any]
    scan_weights: Callable[..., Any]
    scan: Callable[..., Any]
    linear_gelu: Callable[..., Any]
    scale_and_sum: Callable[..., Any]
    gelu_backward_: Callable[..., Any]
    norm_backward: Callable[..., Any]
    add_norm_backward: Callable[..., Any]
    scan_backward: Callable[..., Any]
    scan_weight_gradients: Callable[..., Any]


OPS = Ops(
    rows.norm, rows.add_norm, rows.add_branch, scan_weights, scan_forward, rows.linear_gelu,
    rows.scale_and_sum, rows.gelu_backward_, rows.norm_backward, rows.add_norm_backward, scan_backward,
    scan_weight_gradients,
)  # fmt: skip
OWN_CODE = Ops(*(own_code(op) for op in OPS))


def _ops(x: Tensor) -> Ops:
    return OWN_CODE if unobserved(x) else OPS


class Kept(NamedTuple):
    """What the backward begins with."""

    x: Tensor  # (M, C), and its rows' statistics
    x_stats: Tensor
    before_conv: Tensor  # (B, H, W, D)
    after_conv: Tensor  # (B, H, W, D), before SiLU
    projected: Tensor  # (B, H, W, K*P)
    states: Tensor
    y: Tensor  # (M, D), the scan's, and its rows' statistics
    y_stats: Tensor
    x1: Tensor  # (M, C), after the first branch, and its rows' statistics
    x1_stats: Tensor


def weights_of(block: Block) -> Weights:
    """The parameters of a block, in the order in which the fused block takes them."""
    op, mlp = block.op, block.mlp
    return Weights(
        block.norm.weight, block.norm.bias, op.out_norm.weight, op.out_norm.bias,
        block.norm2.weight, block.norm2.bias,
        op.x_proj_weight, op.dt_projs_weight, op.dt_projs_bias, op.A_logs, op.Ds,
        op.in_proj.weight, op.out_proj.weight,
        mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, op.conv2d.weight, op.conv2d.bias,
    )  # fmt: skip


def parts_of(block: Block) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules whose forward the fused block does not call, its MLP aside, and what it takes each for."""
    op, mlp = block.op, block.mlp
    return [
        (op, SS2D), (block.norm, LayerNorm), (op.out_norm, LayerNorm), (block.norm2, LayerNorm),
        (op.in_proj, nn.Linear), (op.conv2d, nn.Conv2d), (op.out_proj, nn.Linear),
        (mlp.fc1, nn.Linear), (mlp.fc2, nn.Linear),
    ]  # fmt: skip


def has_plain_settings(block: Block) -> bool:
    """Whether the modules of `parts_of` are set as the fused block computes them."""
    op, mlp, conv = block.op, block.mlp, block.op.conv2d
    norms = (
        (block.norm, op.in_proj.in_features),
        (op.out_norm, op.inner),
        (block.norm2, mlp.fc1.in_features),
    )
    return (
        all(_is_plain_norm(norm, dim) for norm, dim in norms)
        and not (_has_bias(op.in_proj) or _has_bias(op.out_proj))
        and _has_bias(mlp.fc1)
        and _has_bias(mlp.fc2)
        and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
        and (conv.padding, conv.padding_mode, conv.groups) == ((1, 1), "zeros", op.inner)
    )


def _is_plain_norm(norm: nn.LayerNorm, dim: int) -> bool:
    affine = norm.elementwise_affine and _has_bias(norm)
    return affine and norm.eps == LN_EPS and norm.normalized_shape == (dim,)


def _has_bias(part: nn.Module) -> bool:
    return part._parameters.get("bias") is not None


def run(x: Tensor, keep: Tensor | None, plan: Plan, weights: Weights) -> Tensor:
    """Return what the block's modules make of x (B, H, W, C) and keep (B, 2).

    Raises RuntimeError for a keep of another shape: kernels look at no bounds.
    """
    if keep is not None:
        keep = keep.expand(x.shape[0], 2)
    if torch.is_grad_enabled():
        out: Tensor = _FusedBlock.apply(x, keep, plan, *weights)
        return out
    return _forward(x, keep, plan, _cast(weights, plan, x), save=False)[0]


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _cast(weights: Weights, plan: Plan, x: Tensor) -> Weights:
    """Bring the weights of products and convolution to the compute's precision, the others to float32 at least."""
    dtype = _compute_dtype(x)
    norms: Sequence[Tensor] = weights[: CORE.start]  # type: ignore[assignment]  # the optional bias is the last
    wide = [t for t in weights[CORE.stop :] if t is not None and t.dtype != dtype]
    narrow = [torch.empty_like(t, dtype=dtype) for t in wide]
    if wide:
        torch._foreach_copy_(narrow, wide)
    there = iter(narrow)
    cast = [t if t is None or t.dtype == dtype else next(there) for t in weights[CORE.stop :]]
    whole = [at_least_float32(t) for t in norms]
    return Weights(*whole, *made(_core_of(weights), plan, dtype), *cast)  # type: ignore[call-arg]


class Core(NamedTuple):
    """The parameters between the convolution and out_norm, or what is computed with; in brackets what differs then."""

    x_proj: Tensor  # (K*(R+2N), D), [with a backend's filling, and in the compute's precision]
    dt_proj: Tensor  # (K*D, R) or (K, D, R) [in the compute's precision]
    dt_bias: Tensor  # (K*D) or (K, D)
    a: Tensor  # (K*D, N), the logarithms of -A [A]
    ds: Tensor  # (K*D)


def _core_of(w: Weights) -> Core:
    return Core(w.x_proj, w.dt_proj, w.dt_bias, w.a, w.ds)


def made(w: Core, plan: Plan, dtype: torch.dtype) -> Core:
    """Return what is computed with, of parameters."""
    x_proj, dt_proj, a = _ops(w.x_proj).scan_weights(w.x_proj, w.dt_proj, w.a, dtype, plan.backend)
    return Core(x_proj, dt_proj, at_least_float32(w.dt_bias), a, at_least_float32(w.ds))


def _scan_inputs(w: Core) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scan's weights: of the time steps (K, D, R) and their bias (K, D), A (K*D, N) and D (K*D)."""
    channels, rank = w.x_proj.shape[1], w.dt_proj.shape[-1]
    return w.dt_proj.view(K, channels, rank), w.dt_bias.view(K, channels), w.a, w.ds


def core(u: Tensor, plan: Plan, w: Core, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Project and scan u (B, H, W, D): y, the projection (B, H, W, K*P), and the states where `save` asks for them."""
    projected = F.linear(u, w.x_proj)
    y, states = _ops(u).scan(u, projected, *_scan_inputs(w), plan.pattern, plan.backend, save)
    return y, projected, states


def core_backward(
    d_y: Tensor, u: Tensor, projected: Tensor, states: Tensor, plan: Plan, w: Core, dtype: torch.dtype
) -> tuple[Tensor, Core]:
    """Return the gradients of u and of the parameters that w was made of; x_proj's and dt_proj's in dtype."""
    ops, channels = _ops(u), u.shape[-1]
    d_u, d_projected, d_dt, d_dt_bias, d_a, d_ds = ops.scan_backward(
        d_y, states, u, projected, *_scan_inputs(w), plan.pattern, plan.backend
    )
    d_projected = d_projected.flatten(0, 2)
    total = d_u.view(-1, channels)
    torch.addmm(total, d_projected, w.x_proj, out=total)  # addmm_ is counted by no FLOP counter
    d_x_proj = torch.mm(d_projected.t(), u.view(-1, channels))
    d_x_proj, d_dt, d_a = ops.scan_weight_gradients(d_x_proj, d_dt, d_a, w.a, dtype, plan.backend)
    return d_u, Core(d_x_proj, d_dt.view(w.dt_proj.shape), d_dt_bias.view(w.dt_bias.shape), d_a, d_ds)


def _forward(
    x: Tensor, keep: Tensor | None, plan: Plan, w: Weights, *, save: bool
) -> tuple[Tensor, Kept | None]:
    batch, height, width, dim = x.shape
    per, dtype = height * width, w.in_proj.dtype
    first, second = _columns(keep)
    ops = _ops(x)
    x_rows = x.reshape(-1, dim).contiguous()
    normed, x_stats = ops.norm(x_rows, w.norm_weight, w.norm_bias, plan.eps, dtype)
    before = torch.mm(normed, w.in_proj.t()).view(batch, height, width, -1)
    after = _convolve(before, w)
    u = F.silu(after)
    channels = u.shape[-1]
    y, projected, states = core(u, plan, _core_of(w), save=save)
    del u
    y = y.view(-1, channels)
    normed, y_stats = ops.norm(y, w.out_norm_weight, w.out_norm_bias, plan.eps, dtype)
    branch = torch.mm(normed, w.out_proj.t())
    x1, normed, x1_stats = ops.add_norm(x_rows, branch, first, per, w.norm2_weight, w.norm2_bias, plan.eps)
    g = ops.linear_gelu(normed, w.fc1, w.fc1_bias)
    del normed, branch
    branch = torch.addmm(w.fc2_bias, g, w.fc2.t())
    del g
    # No view: what a node returns must be free to be changed in place, and FSDP2 warns of views.
    out: Tensor = torch.ops.aten._unsafe_view(ops.add_branch(x1, branch, second, per), x.shape)
    if not save:
        return out, None
    return out, Kept(x_rows, x_stats, before, after, projected, states, y, y_stats, x1, x1_stats)


def _columns(keep: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if keep is None else (keep[:, 0], keep[:, 1])


def _convolve(before: Tensor, w: Weights) -> Tensor:
    channels = before.shape[-1]
    out = F.conv2d(before.permute(0, 3, 1, 2), w.conv, w.conv_bias, padding=1, groups=channels)
    return out.permute(0, 2, 3, 1).contiguous()


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor | None, plan: Plan, *parameters: Tensor | None) -> Tensor:
        weights = Weights(*parameters)  # type: ignore[arg-type]
        cast = _cast(weights, plan, x)
        out, kept = _forward(x, keep, plan, cast, save=True)
        assert kept is not None
        ctx.plan, ctx.shape = plan, x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in weights]
        ctx.save_for_backward(keep, *cast, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        keep, *kept = ctx.saved_tensors
        w = Weights(*kept[: len(Weights._fields)])
        del kept[: len(Weights._fields)]
        whole = ctx.dtypes[CORE.start]
        d_x, d_weights = _backward(d_out.contiguous(), keep, ctx.plan, w, whole, kept, ctx.shape)
        needed = ctx.needs_input_grad[3:]
        wanted = [d if ok else None for d, ok in zip(d_weights, needed, strict=True)]
        return (
            d_x.view(ctx.shape) if ctx.needs_input_grad[0] else None,
            None,
            None,
            *_as(wanted, ctx.dtypes),
        )


def _as(gradients: list[Tensor | None], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """Bring gradients to their parameters' precisions, all in one call."""
    narrow = [g for g, to in zip(gradients, dtypes, strict=True) if g is not None and g.dtype != to]
    if not narrow:
        return gradients
    wide = [
        torch.empty_like(g, dtype=to)
        for g, to in zip(gradients, dtypes, strict=True)
        if g is not None and g.dtype != to
    ]
    torch._foreach_copy_(wide, narrow)
    there = iter(wide)
    return [g if g is None or g.dtype == to else next(there) for g, to in zip(gradients, dtypes, strict=True)]


def _backward(
    d_out: Tensor,
    keep: Tensor | None,
    plan: Plan,
    w: Weights,
    whole: torch.dtype,
    kept: list[Tensor],
    shape: torch.Size,
) -> tuple[Tensor, Weights]:
    """Return the gradients of x and the weights. `kept` are the tensors of a Kept, and the list is emptied.

    `whole` is the precision of the parameters that the scan's weights were made of.

    With activation checkpointing a step's memory is most here. Each tensor is let go or written over once it is used
    up; what was kept too: of a block that was run again nobody else holds it.
    """
    x, x_stats, before_conv, after_conv, projected, states, y, y_stats, x1, x1_stats = Kept(*kept)
    kept.clear()
    _, height, width, dim = shape
    per, dtype = height * width, w.in_proj.dtype
    channels = y.shape[1]
    first, second = _columns(keep)
    ops = _ops(d_out)

    # The MLP, from its branch's end.
    d_out = d_out.view(-1, dim)
    d_branch, d_fc2_bias = ops.scale_and_sum(d_out, second, per, dtype)
    normed, _ = ops.norm(x1, w.norm2_weight, w.norm2_bias, plan.eps, dtype)
    hidden = torch.addmm(w.fc1_bias, normed, w.fc1.t())
    d_hidden = torch.mm(d_branch, w.fc2)  # of GELU's value, until GELU's backward: then of the hidden tokens
    d_fc1_bias = ops.gelu_backward_(hidden, d_hidden)
    g = hidden
    d_fc2 = torch.mm(d_branch.t(), g)
    del hidden, g, d_branch
    d_fc1 = torch.mm(d_hidden.t(), normed)
    del normed
    d_normed = torch.mm(d_hidden, w.fc1)
    del d_hidden
    d_x1, d_branch, d_norm2, again = ops.add_norm_backward(
        d_normed, d_out, x1, x1_stats, w.norm2_weight, w.norm2_bias, first, per
    )
    del d_out, d_normed, again, x1

    # SS2D, from out_proj to in_proj.
    d_y, d_out_norm, normed = ops.norm_backward(
        torch.mm(d_branch, w.out_proj), y, y_stats, w.out_norm_weight, w.out_norm_bias, dtype
    )
    d_out_proj = torch.mm(d_branch.t(), normed)
    del d_branch, normed, y
    u = F.silu(after_conv)
    d_u, d_core = core_backward(d_y.view(u.shape), u, projected, states, plan, _core_of(w), whole)
    del d_y, states, projected, u
    d_after = torch.ops.aten.silu_backward(d_u, after_conv)
    del d_u, after_conv
    d_before, d_conv, d_conv_bias = torch.ops.aten.convolution_backward(
        d_after.permute(0, 3, 1, 2), before_conv.permute(0, 3, 1, 2), w.conv,
        None if w.conv_bias is None else [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], channels,
        [True, True, w.conv_bias is not None],
    )  # fmt: skip
    del d_after, before_conv
    d_before = d_before.permute(0, 2, 3, 1).reshape(-1, channels)
    # The residual's gradient joins here; nothing is kept of it.
    d_x, _, d_norm, normed = ops.add_norm_backward(
        torch.mm(d_before, w.in_proj), d_x1, x, x_stats, w.norm_weight, w.norm_bias, None, per
    )
    d_in_proj = torch.mm(d_before.t(), normed)
    gradients = Weights(
        d_norm[0], d_norm[1], d_out_norm[0], d_out_norm[1], d_norm2[0], d_norm2[1], *d_core,
        d_in_proj, d_out_proj,
        d_fc1, d_fc1_bias, d_fc2, d_fc2_bias, d_conv, d_conv_bias if w.conv_bias is not None else None,
    )  # fmt: skip
    return d_x, gradients
