# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""Kernels on rows of C channels: each tensor is read once and written once, arithmetic in float32.

A tile is ROWS whole rows, padded to CP lanes. Kernels that sum over rows walk them with a fixed number of programs,
keep their sums in registers and write one partial row each: no atomics, and the order does not depend on the device.
The one product here adds along K in tiles of a pinned size, never split over programs.
"""

import triton
import triton.language as tl

from vmamba_kernels.exponents import exp2

INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def rows_norm(
    p_x, p_branch, p_keep, p_w, p_b, p_sum, p_y, p_stats, M, per, keep_stride, eps,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BRANCH: tl.constexpr, KEEP: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """sum = x + keep * branch where BRANCH, and y = LayerNorm(sum) where NORM; `per` rows are one sample's."""
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, CP)
    m_m, m_c = o_m < M, o_c < C
    m = m_m[:, None] & m_c[None, :]
    o = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    if BRANCH:
        b_branch = tl.load(p_branch + o, mask=m, other=0.0).to(tl.float32)
        if KEEP:
            b_keep = tl.load(p_keep + o_m // per * keep_stride, mask=m_m, other=0.0).to(tl.float32)
            # Rounded as the branch is: a kept branch is added as it would be stored.
            b_branch = (b_branch * b_keep[:, None]).to(p_branch.dtype.element_ty).to(tl.float32)
        b_x += b_branch
        tl.store(p_sum + o, b_x.to(p_sum.dtype.element_ty), mask=m)
    if NORM:
        mean = tl.sum(b_x, 1) / C
        d = tl.where(m_c[None, :], b_x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(d * d, 1) / C + eps)
        b_w = tl.load(p_w + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_b = tl.load(p_b + o_c, mask=m_c, other=0.0).to(tl.float32)
        y = d * rstd[:, None] * b_w[None, :] + b_b[None, :]
        tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)
        tl.store(p_stats + o_m, mean, mask=m_m)
        tl.store(p_stats + M + o_m, rstd, mask=m_m)


@triton.jit
def rows_norm_backward(
    p_dy, p_x, p_stats, p_w, p_b, p_residual, p_keep, p_dx, p_dbranch, p_y, p_sums, M, per, keep_stride,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, RESIDUAL: tl.constexpr,
    BRANCH: tl.constexpr, KEEP: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """dx of y = LayerNorm(x), plus what the residual hands back; keep * dx for the branch; y again; partial dw, db."""
    i_p = tl.program_id(0)
    o_c = tl.arange(0, CP)
    m_c = o_c < C
    b_w = tl.load(p_w + o_c, mask=m_c, other=0.0).to(tl.float32)
    if VALUE:
        b_b = tl.load(p_b + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dw = tl.zeros((ROWS, CP), tl.float32)
    b_db = tl.zeros((ROWS, CP), tl.float32)
    for first in range(i_p * ROWS, M, PROGRAMS * ROWS):
        o_m = first + tl.arange(0, ROWS)
        m_m = o_m < M
        m = m_m[:, None] & m_c[None, :]
        o = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
        b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        mean = tl.load(p_stats + o_m, mask=m_m, other=0.0)
        rstd = tl.load(p_stats + M + o_m, mask=m_m, other=0.0)
        x_hat = tl.where(m, (b_x - mean[:, None]) * rstd[:, None], 0.0)
        w_dy = b_dy * b_w[None, :]
        along = tl.sum(x_hat * w_dy, 1) / C
        level = tl.sum(w_dy, 1) / C
        b_dx = (w_dy - x_hat * along[:, None] - level[:, None]) * rstd[:, None]
        if RESIDUAL:
            b_dx += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
        if BRANCH:
            if KEEP:
                b_keep = tl.load(p_keep + o_m // per * keep_stride, mask=m_m, other=0.0).to(tl.float32)
                b_dx *= b_keep[:, None]
            tl.store(p_dbranch + o, b_dx.to(p_dbranch.dtype.element_ty), mask=m)
        if VALUE:
            y = x_hat * b_w[None, :] + b_b[None, :]
            tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)
        b_dw += b_dy * x_hat
        b_db += b_dy
    tl.store(p_sums + i_p * 2 * C + o_c, tl.sum(b_dw, 0), mask=m_c)
    tl.store(p_sums + i_p * 2 * C + C + o_c, tl.sum(b_db, 0), mask=m_c)


@triton.jit
def rows_scale(
    p_x, p_keep, p_y, p_sums, M, per, keep_stride,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y = keep * x in y's precision, and partial sums of y's columns."""
    i_p, i_c = tl.program_id(0), tl.program_id(1)
    o_c = i_c * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < C
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(i_p * ROWS, M, PROGRAMS * ROWS):
        o_m = first + tl.arange(0, ROWS)
        m_m = o_m < M
        m = m_m[:, None] & m_c[None, :]
        o = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
        b_y = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        if KEEP:
            b_keep = tl.load(p_keep + o_m // per * keep_stride, mask=m_m, other=0.0).to(tl.float32)
            b_y *= b_keep[:, None]
        tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)
        b_sum += b_y
    tl.store(p_sums + i_p * C + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit
def rows_gelu_backward(
    p_h, p_dg, p_sums, M,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """g = GELU(h) over h, its dh over dg, and partial sums of dh's columns.

    In place: an element belongs to one program's one turn, and what is stored there was computed from what was loaded.
    """
    i_p, i_c = tl.program_id(0), tl.program_id(1)
    o_c = i_c * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < C
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(i_p * ROWS, M, PROGRAMS * ROWS):
        o_m = first + tl.arange(0, ROWS)
        m = (o_m < M)[:, None] & m_c[None, :]
        o = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
        b_h = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
        b_dg = tl.load(p_dg + o, mask=m, other=0.0).to(tl.float32)
        share = 0.5 * (1.0 + tl.erf(b_h * INV_SQRT_2))
        b_dh = b_dg * (share + b_h * INV_SQRT_2PI * tl.exp(-0.5 * b_h * b_h))
        tl.store(p_h + o, (b_h * share).to(p_h.dtype.element_ty), mask=m)
        tl.store(p_dg + o, b_dh.to(p_dg.dtype.element_ty), mask=m)
        b_sum += b_dh
    tl.store(p_sums + i_p * C + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit
def gelu(x, FAST: tl.constexpr):
    """x times the normal distribution's share below x: 11 instructions on Hopper, by tl.erf 31.

    To 6e-6 of itself from -5.5 on; below, where it is less than 2e-7, to 1e-12.

    It is max(x, 0) less |x| times the share below -|x|, which nothing cancels. NaN stays NaN, and infinity infinity.
    """
    t = tl.minimum(tl.abs(x), 14.0)
    # log2 of the share below -t: of all polynomials of degree 7 the nearest one for t <= 5.5, the share to 4e-6 of
    # itself. Beyond, it goes on falling, below -150 at 14: the share is 0.
    p = -1.793454771359393e-06 * t + 6.090417082305066e-05
    p = p * t - 0.000926029053516686
    p = p * t + 0.00849375780671835
    p = p * t - 0.053937844932079315
    p = p * t - 0.45848050713539124
    p = p * t - 1.1512467861175537
    p = p * t - 0.9999954700469971
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * exp2(p, FAST)


@triton.jit
def rows_linear_gelu(
    p_x, p_w, p_b, p_y, M,
    K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """y = GELU(x w^T + b), x (M, K), w (N, K): the sum rounded as y is, then GELU of that, rounded.

    Programs side by side share GROUP tiles of rows: x comes from memory once, and for its other columns from L2.
    """
    i_p = tl.program_id(0)
    num_n = tl.cdiv(N, BN)
    first = i_p // (GROUP * num_n) * GROUP
    group = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    i_m = first + i_p % (GROUP * num_n) % group
    i_n = i_p % (GROUP * num_n) // group
    o_m, o_n, o_k = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # What lies beyond the last row or column is the last one again, and not stored: no load needs a mask for it.
    p_xs = p_x + tl.minimum(o_m, M - 1).to(tl.int64)[:, None] * K + o_k[None, :]
    p_ws = p_w + tl.minimum(o_n, N - 1).to(tl.int64)[None, :] * K + o_k[:, None]
    b_h = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if K % BK == 0:
            b_x, b_w = tl.load(p_xs + k), tl.load(p_ws + k)
        else:
            m_k = o_k < K - k
            b_x = tl.load(p_xs + k, mask=m_k[None, :], other=0.0)
            b_w = tl.load(p_ws + k, mask=m_k[:, None], other=0.0)
        if not FAST:  # the interpreter multiplies the bits of bfloat16
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_h = tl.dot(b_x, b_w, b_h, input_precision="ieee")
    m_n = o_n < N
    b_h += tl.load(p_b + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_y = gelu(b_h.to(p_y.dtype.element_ty).to(tl.float32), FAST)
    o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=(o_m < M)[:, None] & m_n[None, :])
