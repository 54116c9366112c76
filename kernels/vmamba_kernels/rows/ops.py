# mypy: allow-untyped-calls
"""Arithmetic on rows as `torch.library` ops: Triton on CUDA (and where it is interpreted), plain torch elsewhere.

Law: x is (M, C); `keep` (samples) scales the rows of each sample, `per` rows a sample; sums and statistics
are float32 (float64 for float64). `norm`, `add_norm`, `add_branch` and `linear_gelu` have autograd formulas (`keep`,
drawn and not learned, gets none and is refused one); the others are the parts that a hand-written backward is put
together from, and a second derivative through them is refused. One of them, `gelu_backward_`, writes over its inputs.
To a FLOP counter they are nothing, as torch's own norms and sums are, but for `linear_gelu`'s product: a fused model
counts what the plain one does. A compiled model needs none of them: inductor fuses the plain one.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba_kernels.backend import backend_for, generation, interpreted
from vmamba_kernels.launch import custom_op, launch

if importlib.util.find_spec("triton") is not None:
    import triton

    from vmamba_kernels.rows.triton_rows import (
        rows_gelu_backward,
        rows_linear_gelu,
        rows_norm,
        rows_norm_backward,
        rows_scale,
    )

# Programs that walk rows and sum: enough to fill a GPU, and as many on each, as the order of sums follows from it.
PROGRAMS = 1024
TILE = 2048  # elements a program holds at once
COLUMNS = 128


class Product(NamedTuple):
    """How a product is cut: a program's rows, columns and step along K, tiles of rows side by side, warps, stages."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


def _as_triton(x: Tensor) -> bool:
    asked = "triton" if interpreted() and x.dtype != torch.float64 else "auto"
    return x.numel() > 0 and backend_for(asked, x) == "triton"


def _tiles(channels: int) -> tuple[int, int, int]:
    """Rows of a tile, lanes a row and warps."""
    padded = max(16, int(triton.next_power_of_2(channels)))
    return max(1, TILE // padded), padded, 4 if padded <= TILE else 8


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scaled(branch: Tensor, keep: Tensor | None, per: int, dtype: torch.dtype) -> Tensor:
    if keep is None:
        return branch.to(dtype, copy=True)
    return (branch.view(-1, per, branch.shape[1]) * keep.view(-1, 1, 1)).to(dtype).view_as(branch)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is handed in the place of a tensor that it will not touch."""
    return other if tensor is None else tensor


def _lines(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring tensors to rows one after the other: the kernels are told no strides but that of `keep`."""
    return tuple(t.contiguous() for t in tensors)


def _stride(keep: Tensor | None) -> int:
    return 0 if keep is None else keep.stride(0)


@custom_op("vmamba::norm")
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return LayerNorm(x) in `dtype`, and of each row the mean and 1 / standard deviation (2, M)."""
    x, weight, bias = _lines(x, weight, bias)
    if not _as_triton(x):
        return _norm(x, weight, bias, eps, dtype)
    y = torch.empty_like(x, dtype=dtype)
    return y, _launch_norm(x, None, None, 1, weight, bias, x, y, eps)


@norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((2, x.shape[0]), dtype=_wide(x))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    y, mean, rstd = torch.native_layer_norm(x.to(wide), [x.shape[1]], weight.to(wide), bias.to(wide), eps)
    return y.to(dtype), torch.stack((mean.view(-1), rstd.view(-1)))


@custom_op("vmamba::add_norm")
def add_norm(
    x: Tensor, branch: Tensor, keep: Tensor | None, per: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + keep * branch in x's dtype, its LayerNorm in the branch's, and the rows' statistics (2, M)."""
    x, branch, weight, bias = _lines(x, branch, weight, bias)
    if not _as_triton(x):
        total = x + _scaled(branch, keep, per, branch.dtype)
        return (total, *_norm(total, weight, bias, eps, branch.dtype))
    total, y = torch.empty_like(x), torch.empty_like(branch)
    return total, y, _launch_norm(x, branch, keep, per, weight, bias, total, y, eps)


@add_norm.register_fake
def _(
    x: Tensor, branch: Tensor, keep: Tensor | None, per: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((2, x.shape[0]), dtype=_wide(x))
    return x.new_empty(x.shape), branch.new_empty(branch.shape), stats


@custom_op("vmamba::add_branch")
def add_branch(x: Tensor, branch: Tensor, keep: Tensor | None, per: int) -> Tensor:
    """Return x + keep * branch in x's dtype."""
    x, branch = _lines(x, branch)
    if not _as_triton(x):
        return x + _scaled(branch, keep, per, branch.dtype)
    total = torch.empty_like(x)
    _launch_norm(x, branch, keep, per, None, None, total, None, 0.0)
    return total


@add_branch.register_fake
def _(x: Tensor, branch: Tensor, keep: Tensor | None, per: int) -> Tensor:
    return x.new_empty(x.shape)


def _launch_norm(
    x: Tensor, branch: Tensor | None, keep: Tensor | None, per: int, weight: Tensor | None, bias: Tensor | None,
    total: Tensor, y: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    rows, channels = x.shape
    tile, padded, warps = _tiles(channels)
    stats = x.new_empty((2, rows if y is not None else 0), dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            rows_norm,
            (triton.cdiv(rows, tile),),
            (x, _or(branch, x), _or(keep, x), _or(weight, x), _or(bias, x), total, _or(y, x), stats, rows, per,
             _stride(keep), eps),
            {"C": channels, "CP": padded, "ROWS": tile, "BRANCH": branch is not None, "KEEP": keep is not None,
             "NORM": y is not None, "num_warps": warps},
        )  # fmt: skip
    return stats


@custom_op("vmamba::norm_backward")
def norm_backward(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, again: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx in x's dtype, d(weight, bias) (2, C), and in the dtype `again` what norm returned, else nothing."""
    dy, x, stats, weight, bias = _lines(dy, x, stats, weight, bias)
    if not _as_triton(x):
        dx, sums, y = _norm_backward(dy, x, stats, weight, bias, again)
        return dx.to(x.dtype), sums, y
    dx, y, _, sums = _launch_norm_backward(dy, x, stats, weight, bias, None, None, 1, None, again)
    return dx, sums, y


@norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, again: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=again) if again is not None else x.new_empty(0)
    return x.new_empty(x.shape), x.new_empty((2, x.shape[1]), dtype=_wide(x)), y


def _norm_backward(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, again: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x)
    mean, rstd = stats.view(2, -1, 1)
    x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), x, [x.shape[1]], mean, rstd, weight, bias, [True, True, True]
    )
    y = ((x - mean) * rstd * weight + bias).to(again) if again is not None else x.new_empty(0)
    return dx, torch.stack((dw, db)), y


@custom_op("vmamba::add_norm_backward")
def add_norm_backward(
    dy: Tensor,
    residual: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    per: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the branch, d(weight, bias) (2, C), and again the norm of the sum.

    `residual` is the gradient of the sum that comes on other ways; branch and norm are in dy's dtype.
    """
    dy, residual, total, stats, weight, bias = _lines(dy, residual, total, stats, weight, bias)
    if not _as_triton(total):
        dx, sums, y = _norm_backward(dy, total, stats, weight, bias, dy.dtype)
        dx = dx + residual
        return dx.to(total.dtype), _scaled(dx, keep, per, dy.dtype), sums, y
    dx, y, branch, sums = _launch_norm_backward(
        dy, total, stats, weight, bias, residual, keep, per, dy.dtype, dy.dtype
    )
    return dx, branch, sums, y


@add_norm_backward.register_fake
def _(
    dy: Tensor,
    residual: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    per: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = total.new_empty((2, total.shape[1]), dtype=_wide(total))
    return total.new_empty(total.shape), dy.new_empty(dy.shape), sums, dy.new_empty(dy.shape)


def _launch_norm_backward(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, keep: Tensor | None,
    per: int, branch: torch.dtype | None, again: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, channels = x.shape
    tile, padded, warps = _tiles(channels)
    programs = min(PROGRAMS, triton.cdiv(rows, tile))
    dx = torch.empty_like(x)
    shared = x.new_empty(0) if branch is None else torch.empty_like(x, dtype=branch)
    y = x.new_empty(0) if again is None else torch.empty_like(x, dtype=again)
    sums = x.new_empty((programs, 2, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            rows_norm_backward,
            (programs,),
            (dy, x, stats, weight, bias, _or(residual, x), _or(keep, x), dx, shared, y, sums, rows, per, _stride(keep)),
            {"C": channels, "CP": padded, "ROWS": tile, "PROGRAMS": programs, "RESIDUAL": residual is not None,
             "BRANCH": branch is not None, "KEEP": keep is not None, "VALUE": again is not None, "num_warps": warps},
        )  # fmt: skip
    return dx, y, shared, sums.sum(0)


@custom_op("vmamba::scale_and_sum")
def scale_and_sum(x: Tensor, keep: Tensor | None, per: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keep * x in `dtype`, and its sum over rows (C)."""
    (x,) = _lines(x)
    if not _as_triton(x):
        y = _scaled(x, keep, per, dtype)
        return y, y.sum(0, dtype=_wide(x))
    rows, channels = x.shape
    y = torch.empty_like(x, dtype=dtype)
    grid, sums = _walk(x)
    with torch.cuda.device_of(x):
        launch(
            rows_scale,
            grid,
            (x, _or(keep, x), y, sums, rows, per, _stride(keep)),
            {"C": channels, "COLUMNS": COLUMNS, "ROWS": TILE // COLUMNS, "PROGRAMS": grid[0], "KEEP": keep is not None,
             "num_warps": 4},
        )  # fmt: skip
    return y, sums.sum(0)


@scale_and_sum.register_fake
def _(x: Tensor, keep: Tensor | None, per: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[1], dtype=_wide(x))


@custom_op("vmamba::gelu_backward_", mutates=("h", "dg"))
def gelu_backward_(h: Tensor, dg: Tensor) -> Tensor:
    """Put g = GELU(h), by the error function, in the place of h and dh in that of dg; return dh's sum over rows (C).

    Raises RuntimeError where autograd would take either for what it was.
    """
    if h.requires_grad or dg.requires_grad:
        raise RuntimeError("h or dg requires a gradient, and gelu_backward_ writes over both: detach them")
    h_lines, dg_lines = _lines(h, dg)
    if _as_triton(h):
        grid, sums = _walk(h)
        with torch.cuda.device_of(h):
            launch(
                rows_gelu_backward,
                grid,
                (h_lines, dg_lines, sums, h.shape[0]),
                {"C": h.shape[1], "COLUMNS": COLUMNS, "ROWS": TILE // COLUMNS, "PROGRAMS": grid[0], "num_warps": 4},
            )  # fmt: skip
        total = sums.sum(0)
    else:
        torch.ops.aten.gelu_backward.grad_input(dg_lines, h_lines, grad_input=dg_lines)
        torch.ops.aten.gelu_(h_lines)
        total = dg_lines.sum(0, dtype=_wide(h))
    for tensor, lines in ((h, h_lines), (dg, dg_lines)):
        if lines is not tensor:
            tensor.copy_(lines)
    return total


@gelu_backward_.register_fake
def _(h: Tensor, dg: Tensor) -> Tensor:
    return h.new_empty(h.shape[1], dtype=_wide(h))


def _walk(x: Tensor) -> tuple[tuple[int, int], Tensor]:
    """A grid of programs by blocks of columns that walks all rows, and room for its partial sums."""
    rows, channels = x.shape
    blocks = triton.cdiv(channels, COLUMNS)
    programs = min(triton.cdiv(2 * PROGRAMS, blocks), triton.cdiv(rows, TILE // COLUMNS))
    return (programs, blocks), x.new_empty((programs, channels), dtype=torch.float32)


@custom_op("vmamba::linear_gelu")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x W^T + b), by the error function, of x (M, K), W (N, K) and b (N): one pass over the result.

    The sum is rounded to x's dtype before GELU, as addmm rounds it. In float32 a GPU takes torch's two calls: its
    tensor cores have no such product. Raises RuntimeError where shapes or dtypes do not fit each other.
    """
    _fit(x, weight, bias)
    if not (_as_triton(x) and weight.numel() > 0 and (x.element_size() == 2 or interpreted())):
        with torch.autocast(x.device.type, enabled=False):  # which would have the value in another dtype
            y: Tensor = torch.ops.aten.gelu_(torch.addmm(bias, x, weight.t()))
            return y
    x, weight, bias = _lines(x, weight, bias)
    (rows, inner), columns = x.shape, weight.shape[0]
    y = x.new_empty((rows, columns))
    cut = _product(inner, generation(x.device))
    with torch.cuda.device_of(x):
        launch(
            rows_linear_gelu,
            (triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns),),
            (x, weight, bias, y, rows),
            _product_constants(inner, columns, cut, fast=not interpreted()),
        )
    return y


def _fit(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    fits = x.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1]
    if not (fits and x.dtype == weight.dtype == bias.dtype):  # kernels look at no bounds
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (x, weight, bias))
        raise RuntimeError(
            f"linear_gelu takes x (M, K), weight (N, K) and bias (N) of one dtype, not {given}"
        )


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _fit(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _product(inner: int, built_for: str) -> Product:
    """How a product over `inner` (K) is cut, of any number of rows and columns: a batch changes no image's bits.

    Measured on an H200 (docs/kernels.md). Several programs fit on a multiprocessor, so that one's GELU hides behind
    another's product: by its instructions it is as long as a product over K = 240. On other GPUs, where nothing was
    measured, a program may have less than half of Hopper's shared memory.
    """
    if built_for != "sm_90":
        return Product(128, 128, 32, 8, 8, 3)
    if inner <= 128:
        return Product(128, 64, 32, 8, 4, 3)
    return Product(128, 128, 64 if inner % 64 == 0 else 32, 8, 4, 3)


def _product_constants(inner: int, columns: int, cut: Product, *, fast: bool) -> dict[str, Any]:
    return {
        "K": inner, "N": columns, "BM": cut.rows, "BN": cut.columns, "BK": cut.depth, "GROUP": cut.group,
        "FAST": fast, "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *_ = inputs
    _, stats = output
    ctx.save_for_backward(x, stats, weight, bias)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, stats, weight, bias = ctx.saved_tensors
    dx, (dw, db), _y = norm_backward(dy, x, stats, weight, bias, None)
    return dx, dw.to(weight.dtype), db.to(bias.dtype), None, None


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _x, branch, keep, ctx.per, weight, bias, _eps = inputs
    total, _y, stats = output
    ctx.branch = branch.dtype
    ctx.save_for_backward(total, stats, weight, bias, keep)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _add_norm_gradients(
    ctx: Any, d_total: Tensor | None, dy: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (*_add_branch_gradients(ctx, d_total), None, None, None)
    _refuse_keep(ctx)
    total, stats, weight, bias, keep = ctx.saved_tensors
    residual = torch.zeros_like(total) if d_total is None else d_total
    dx, d_branch, (dw, db), _y = add_norm_backward(dy, residual, total, stats, weight, bias, keep, ctx.per)
    return dx, d_branch, None, None, dw.to(weight.dtype), db.to(bias.dtype), None


def _add_branch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, branch, keep, ctx.per = inputs
    ctx.branch = branch.dtype
    ctx.save_for_backward(keep)
    ctx.set_materialize_grads(False)


def _add_branch_gradients(ctx: Any, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_total is None:
        return (None,) * 4
    _refuse_keep(ctx)
    keep = ctx.saved_tensors[-1]
    d_branch, _sums = scale_and_sum(d_total, keep, ctx.per, ctx.branch)
    return d_total, d_branch, None, None


def _linear_gelu_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _linear_gelu_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 3
    x, weight, bias = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):  # as in the forward
        hidden = torch.addmm(bias, x, weight.t())
        d_hidden = torch.ops.aten.gelu_backward(dy, hidden)
        return torch.mm(d_hidden, weight), torch.mm(d_hidden.t(), x), d_hidden.sum(0)


def _refuse_keep(ctx: Any) -> None:
    if ctx.needs_input_grad[2]:
        raise RuntimeError("keep requires a gradient, and vmamba_kernels.rows has none for it: detach it")


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "a part of a backward was differentiated: vmamba_kernels.rows has no second derivatives"
    )


norm.register_autograd(_norm_gradients, setup_context=_norm_setup)
add_norm.register_autograd(_add_norm_gradients, setup_context=_add_norm_setup)
add_branch.register_autograd(_add_branch_gradients, setup_context=_add_branch_setup)
linear_gelu.register_autograd(_linear_gelu_gradients, setup_context=_linear_gelu_setup)
for _part in (norm_backward, add_norm_backward, scale_and_sum):
    _part.register_autograd(_refuse)

_NAMES = (
    "norm",
    "add_norm",
    "add_branch",
    "norm_backward",
    "add_norm_backward",
    "scale_and_sum",
    "gelu_backward_",
)


@register_flop_formula([getattr(torch.ops.vmamba, name) for name in _NAMES])
def _flops(*args: Any, **kwargs: Any) -> int:
    return 0


@register_flop_formula(torch.ops.vmamba.linear_gelu)
def _linear_gelu_flops(x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dim of x (…, C), computed in float32 at least and returned in `dtype`."""
    y: Tensor
    y, _ = norm(x.reshape(-1, x.shape[-1]), weight, bias, eps, dtype)
    return y.view(x.shape)
