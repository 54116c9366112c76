# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""The adjoint of the selective scan as one Triton kernel.

A program walks its chunks from the last to the first. In each it runs the forward again from the state saved before the
chunk, then the recurrence of the state's cotangent, lam_t = C_t g_t + a_{t+1} lam_{t+1}, in the same manner: every
segment from zero, the segments against one another from right to left, every segment again. What goes on to the left
is mu_t = a_t lam_t; nothing is ever divided by a decay, which may be 0. Summed over what shares the tensor,

    dC_t = g_t h_t    dB_t = lam_t delta_t u_t    dA = delta_t lam_t a_t h_{t-1}    du_t = D g_t + delta_t lam_t B_t
    ddelta_t = lam_t (A a_t h_{t-1} + B_t u_t)

B and C are shared by a group's channels, and A, D and the bias by the batch: programs write partial sums, added
afterwards in a fixed order. There are no atomics, and two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba_kernels.exponents import LOG2E, exp2
from vmamba_kernels.scan.steps import (
    across,
    across_back,
    lane,
    load_steps,
    slope,
    softplus,
    stack,
    store_steps,
)
from vmamba_kernels.scan.triton_fwd import INTEGERS, TABLE, Launch, Pinned, configurations

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def add_pairs(a1, b1, a2, b2):
    return a1 + a2, b1 + b2


@triton.jit(do_not_specialize=INTEGERS)
def scan_backward(
    p_g, p_u, p_delta, p_A, p_B, p_C, p_D, p_bias, p_states,
    p_du, p_ddelta, p_dA, p_dB, p_dC, p_dD, p_dbias,
    L, C, NT, NB, GROUPS,
    sg_b, sg_c, su_b, su_c, sd_b, sd_c, sB_b, sB_k, sB_n, sC_b, sC_k, sC_n, s_n,
    N: tl.constexpr, BC: tl.constexpr, M: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """As scan_forward; p_dB and p_dC are (blocks of channels, NB, GROUPS, N, L), p_dA, p_dD and p_dbias begin with NB.

    D, and z for its slope, are loaded again where they are needed: what runs out first is registers.
    """
    NC = tl.cdiv(C, BC)
    i_c = tl.program_id(0) % NC
    i_k = tl.program_id(0) // NC % GROUPS
    i_b = (tl.program_id(0) // NC // GROUPS).to(tl.int64)
    o_in = i_c * BC + tl.arange(0, BC)[:, None]
    m_c = o_in < C
    o_c = (i_k * C + o_in).to(tl.int64)
    o_m = tl.arange(0, M)[None, :]
    o_d = i_b * (C * GROUPS) + o_c
    p_g += (i_b * sg_b + o_c * sg_c) * V
    p_u += (i_b * su_b + o_c * su_c) * V
    p_delta += (i_b * sd_b + o_c * sd_c) * V
    p_B += (i_b * sB_b + i_k * sB_k + o_c * 0) * V
    p_C += (i_b * sC_b + i_k * sC_k + o_c * 0) * V
    p_du += o_d * L * V
    p_ddelta += o_d * L * V
    p_dB += ((i_c * NB + i_b) * GROUPS + i_k) * N * L * V
    p_dC += ((i_c * NB + i_b) * GROUPS + i_k) * N * L * V
    L = L * V
    b_bias = tl.zeros((BC, 1), tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0)
    PACKS: tl.constexpr = (N + M - 1) // M
    carries = ()
    sums_A = ()
    for _q in tl.static_range(PACKS):
        carries += (tl.zeros((BC, M), tl.float32),)
        sums_A += (tl.zeros((BC, M), tl.float32),)
    b_dD = tl.zeros((BC, M), tl.float32)
    b_dbias = tl.zeros((BC, M), tl.float32)
    for j_back in range(NT):
        j = NT - 1 - j_back
        u = load_steps(p_u, j, m_c, L, 0.0, BC, M, T, V)
        z = load_steps(p_delta, j, m_c, L, float("-inf") if SOFTPLUS else 0.0, BC, M, T, V)
        g = load_steps(p_g, j, m_c, L, 0.0, BC, M, T, V)
        d = ()
        decay = ()  # sum of lam_t A a_t h_{t-1} over states
        drive = ()  # sum of lam_t B_t over states
        b_sum = tl.zeros((BC, M), tl.float32)
        for i in tl.static_range(T):
            delta = z[i] + b_bias
            if SOFTPLUS:
                delta = softplus(delta, EXACT, FAST)
            elif HAS_BIAS:
                delta = tl.where(m_c & (j * (M * T) + o_m * T + i < L), delta, 0.0)
            b_sum += delta
            d += (delta,)
            decay += (tl.zeros((BC, M), tl.float32),)
            drive += (tl.zeros((BC, M), tl.float32),)
        passed = ()
        passed_A = ()
        for p in tl.static_range(PACKS):
            b_carry = carries[p]
            b_dA = sums_A[p]
            for n_p in range(min(M, N - p * M)):
                n = p * M + n_p
                b_A = tl.load(p_A + o_c * N + n, mask=m_c, other=0.0)
                p_state = p_states + ((i_b * (NT - 1) + j - 1) * (C * GROUPS) + o_c) * s_n + n
                b_h = tl.load(p_state, mask=m_c & (j > 0), other=0.0) + tl.zeros((BC, M), tl.float32)
                b_B = load_steps(p_B + n * sB_n.to(tl.int64) * V, j, m_c, L, 0.0, BC, M, T, V)
                b_C = load_steps(p_C + n * sC_n.to(tl.int64) * V, j, m_c, L, 0.0, BC, M, T, V)
                a = ()
                h = tl.zeros((BC, M), tl.float32)
                for i in tl.static_range(T):
                    a += (exp2(d[i] * (b_A * LOG2E), FAST),)
                    h = a[i] * h + d[i] * u[i] * b_B[i]
                mu = tl.zeros((BC, M), tl.float32)
                for i in tl.static_range(T - 1, -1, -1):
                    mu = a[i] * (b_C[i] * g[i] + mu)
                b_through = exp2(b_sum * (b_A * LOG2E), FAST)
                h, _last = across(b_through, h, b_h, o_m, BC, M)
                mu, b_first = across_back(b_through, mu, lane(b_carry, n_p, BC, M), o_m, BC, M)
                b_carry = tl.where(o_m == n_p, b_first, b_carry)
                lams = ()
                for i in tl.static_range(T - 1, -1, -1):
                    lams += (b_C[i] * g[i] + mu,)
                    mu = a[i] * lams[T - 1 - i]
                dB = ()
                dC = ()
                decay_n = ()
                drive_n = ()
                b_dA_n = tl.zeros((BC, M), tl.float32)
                for i in tl.static_range(T):
                    lam = lams[T - 1 - i]
                    left = a[i] * h * lam
                    h = a[i] * h + d[i] * u[i] * b_B[i]
                    b_dA_n += left * d[i]
                    dB += (lam * (d[i] * u[i]),)
                    dC += (g[i] * h,)
                    decay_n += (decay[i] + left * b_A,)
                    drive_n += (drive[i] + lam * b_B[i],)
                decay = decay_n
                drive = drive_n
                b_dA += tl.where(o_m == n_p, tl.sum(b_dA_n, 1, keep_dims=True), 0.0)
                b_dB, b_dC = tl.reduce((stack(dB, 0, BC, M, T), stack(dC, 0, BC, M, T)), 0, add_pairs)
                o_t = j * (M * T) + tl.arange(0, M * T)
                tl.store(p_dB + n * L.to(tl.int64) + o_t, b_dB, mask=o_t < L)
                tl.store(p_dC + n * L.to(tl.int64) + o_t, b_dC, mask=o_t < L)
            passed += (b_carry,)
            passed_A += (b_dA,)
        carries = passed
        sums_A = passed_A
        b_D = tl.zeros((BC, 1), tl.float32)
        if HAS_D:
            b_D = tl.load(p_D + o_c, mask=m_c, other=0.0)
        if EXACT and SOFTPLUS:
            z = load_steps(p_delta, j, m_c, L, 0.0, BC, M, T, V)
        du = ()
        ddelta = ()
        for i in tl.static_range(T):
            du += (d[i] * drive[i] + b_D * g[i],)
            dz = u[i] * drive[i] + decay[i]
            if SOFTPLUS:
                dz = dz * slope(z[i] + b_bias, d[i], EXACT, FAST)
            b_dbias += dz
            b_dD += g[i] * u[i]
            ddelta += (dz,)
        store_steps(p_du, du, j, m_c, L, BC, M, T, V)
        store_steps(p_ddelta, ddelta, j, m_c, L, BC, M, T, V)
    for p in tl.static_range(PACKS):
        o_n = p * M + o_m
        tl.store(p_dA + o_d * s_n + o_n, sums_A[p], mask=m_c & (o_n < N))
    if HAS_D:
        tl.store(p_dD + o_d, tl.sum(b_dD, 1, keep_dims=True), mask=m_c)
    if HAS_BIAS:
        tl.store(p_dbias + o_d, tl.sum(b_dbias, 1, keep_dims=True), mask=m_c)


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
    inputs = (u, delta, A, B, C, D, delta_bias)
    if u.numel() == 0:
        d = [u.new_empty(0) if t is None else t.new_zeros(t.shape) for t in inputs]
        return d[0], d[1], d[2], d[3], d[4], d[5], d[6]
    call = Launch((grad_y, u, delta, B, C), A, B.shape[1], D, delta_bias, delta_softplus)
    tile = call.tiles.backward
    blocks = -(-call.channels // tile.channels)

    def partial(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    d_u, d_delta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    d_A = partial(call.batch, *A.shape)
    d_B, d_C = partial(blocks, *B.shape), partial(blocks, *B.shape)
    d_D, d_bias = (partial(call.batch, 0 if t is None else call.width) for t in (D, delta_bias))
    with torch.cuda.device_of(u):
        scan_backward[(call.programs(tile),)](
            *call.rows[:3],
            call.A,
            *call.rows[3:],
            call.D,
            call.bias,
            saved,
            d_u,
            d_delta,
            d_A,
            d_B,
            d_C,
            d_D,
            d_bias,
            NB=call.batch,
            **call.sizes(),
            **call.strides("gudBC"),
            **call.compiled_for(tile),
        )
    parts = ((d_A, A), (d_B, B), (d_C, C), (d_D, D), (d_bias, delta_bias))
    sums = [part.sum(0).to(u.dtype if t is None else t.dtype) for part, t in parts]
    return d_u, d_delta, sums[0], sums[1], sums[2], sums[3], sums[4]


def pinned() -> Pinned:
    """Return name, kernel, types by argument, constants and options of each configuration that the table can choose."""
    names = ("g", "u", "delta", "A", "B", "C", "D", "bias", "states")
    gradients = ("du", "ddelta", "dA", "dB", "dC", "dD", "dbias")
    return configurations(
        scan_backward, names + gradients, {choice.backward: None for choice in TABLE.values()}
    )
