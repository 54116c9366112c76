# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""The backward of the fused scan: the adjoint walks each segment from its end, states recomputed a tile at a time.

As in the forward, a first walk finds what each segment hands to the one before it, a carry links them, and a second
walk computes every gradient. lambda_t = C_t g_t + a_{t+1} lambda_{t+1}; mu_t = a_t lambda_t is what step t - 1
receives, so nothing is divided by a decay. Sums over tokens stay in registers and are written once a program; the sum
over channel blocks of a projection's gradient, and those over programs, are added afterwards in a fixed order.
"""

import triton
import triton.language as tl

from vmamba_kernels.exponents import LN2, LOG2E, exp2, widen
from vmamba_kernels.ss2d.registers import (
    ROWS,
    begin,
    input_and_output,
    join_steps,
    place,
    projected_columns,
    read,
    segments,
    slope2,
    split_steps,
    time_steps,
    weights,
    write,
)


@triton.jit
def ss2d_adjoint_ends(
    p_g, p_p, p_w, p_bias, p_A, p_order, p_ends, p_sums, L, S, Q,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    SPAN: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, MIRROR: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRAIGHT: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """Walk each segment backwards from zero: the mu it hands on (4, Q, N, C), its sum of time steps (4, Q, C)."""
    TILES: tl.constexpr = SPAN // STEPS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    SURE: tl.constexpr = FULL and C % CHANNELS == 0
    i_g, i_c, k = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < C
    b_w, b_bias = weights(p_w, p_bias, k, o_c, m_c, C, R, RP, INTERPRET)
    row, m_row = segments(i_g, k, S, Q, MIRROR)
    origin, way, inside = begin(p_order, k, i_g, S, Q, L, SPAN, STEPS, MIRROR, WIDE, STRAIGHT)
    at = (k * Q + row).to(tl.int64)[:, None]
    m_out = m_row[:, None] & m_c[None, :]
    for n in range(N):
        b_A = tl.load(p_A + (k * C + o_c) * N + n, mask=m_c, other=0.0)
        mu = tl.zeros((ROWS, CHANNELS), tl.float32)
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for back in tl.range(0, TILES, num_stages=STAGES):
            at_t, m_t = place(
                p_order, k, origin, way, inside, TILES - 1 - back, S, SPAN, STEPS, FULL, STRAIGHT
            )
            b_g = read(p_g + at_t[:, None] * C + o_c[None, :], m_t[:, None] & m_c[None, :], SURE)
            p_row = p_p + at_t * (4 * PITCH) + k * PITCH
            _b_B, b_C = input_and_output(p_row, m_t, n, R, N, PAIRED, FULL)
            _z, b_d = time_steps(p_row, m_t, b_w, b_bias, PITCH, RP, FULL, EXACT, INTERPRET, PRECISION)
            a = split_steps(exp2(b_d * b_A[None, :], not INTERPRET), STEPS, CHANNELS)
            cg = split_steps(b_C[:, None] * widen(b_g, not INTERPRET), STEPS, CHANNELS)
            d = split_steps(b_d, STEPS, CHANNELS)
            for i in tl.static_range(STEPS):
                mu = a[STEPS - 1 - i] * (cg[STEPS - 1 - i] + mu)
                total += d[i]
        tl.store(p_ends + (at * N + n) * C + o_c[None, :], mu, mask=m_out)
        if n == 0:
            tl.store(p_sums + at * C + o_c[None, :], total, mask=m_out)


@triton.jit
def ss2d_gradients(
    p_g, p_x, p_p, p_w, p_bias, p_A, p_D, p_order, p_starts, p_tiles, p_sum, p_dx, p_dp, p_parameters,
    L, S, Q, axis,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    PP: tl.constexpr, SPAN: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, MIRROR: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRAIGHT: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, CARRIED: tl.constexpr, PAIRED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Walk each segment backwards from what it receives: dx, and the partial sums of all other gradients.

    dx is summed in place in float32, as y is. dp is (BLOCKS, Q / S, L, 4, PITCH) by block of channels, in the walk's
    units of logarithms. The parameters' are by group of 16 rows, a row of dw (4, C, R), dbias (4, C), dA (4, C, N) and
    dD (C).
    """
    TILES: tl.constexpr = SPAN // STEPS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    SURE: tl.constexpr = FULL and C % CHANNELS == 0
    i_g, i_c = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < C
    o_r = tl.arange(0, RP)
    o_p = tl.arange(0, PP)
    b_D = tl.load(p_D + o_c, mask=m_c, other=0.0)
    narrow: tl.constexpr = tl.float32 if INTERPRET else p_x.dtype.element_ty
    p_row_of_sums = p_parameters + i_g.to(tl.int64) * (4 * C * (R + 1 + N) + C)
    for sense in tl.static_range(2):
        k = axis + 2 * sense
        b_w, b_bias = weights(p_w, p_bias, k, o_c, m_c, C, R, RP, INTERPRET)
        b_wide, _bias = weights(p_w, p_bias, k, o_c, m_c, C, R, PP, INTERPRET)
        row, m_row = segments(i_g, k, S, Q, MIRROR)
        origin, way, inside = begin(p_order, k, i_g, S, Q, L, SPAN, STEPS, MIRROR, WIDE, STRAIGHT)
        at = (k * Q + row).to(tl.int64)[:, None]
        m_out = m_row[:, None] & m_c[None, :]
        b_dw = tl.zeros((RP, CHANNELS), tl.float32)
        b_dbias = tl.zeros((ROWS, CHANNELS), tl.float32)
        b_dD = tl.zeros((ROWS, CHANNELS), tl.float32)
        for n in range(N):
            b_A = tl.load(p_A + (k * C + o_c) * N + n, mask=m_c, other=0.0)
            b_A2 = b_A * LN2
            # One-hot columns: products with them are sums over channels, put where the gradients of B and C belong.
            to_B = tl.where((o_p == R + n)[None, :] & (o_c >= 0)[:, None], 1.0, 0.0).to(narrow)
            to_C = tl.where((o_p == R + N + n)[None, :] & (o_c >= 0)[:, None], 1.0, 0.0).to(narrow)
            if CARRIED:
                mu = tl.load(p_starts + (at * N + n) * C + o_c[None, :], mask=m_out, other=0.0)
            else:
                mu = tl.zeros((ROWS, CHANNELS), tl.float32)
            b_dA = tl.zeros((ROWS, CHANNELS), tl.float32)
            for back in tl.range(0, TILES, num_stages=STAGES):
                j = TILES - 1 - back
                at_t, m_t = place(p_order, k, origin, way, inside, j, S, SPAN, STEPS, FULL, STRAIGHT)
                m = m_t[:, None] & m_c[None, :]
                o_x = at_t[:, None] * C + o_c[None, :]
                b_x = widen(read(p_x + o_x, m, SURE), not INTERPRET)
                b_g = widen(read(p_g + o_x, m, SURE), not INTERPRET)
                p_row = p_p + at_t * (4 * PITCH) + k * PITCH
                b_B, b_C = input_and_output(p_row, m_t, n, R, N, PAIRED, FULL)
                p_tile = p_tiles + ((at * TILES + j) * N + n) * C + o_c[None, :]
                h = widen(read(p_tile, m_out, SURE), not INTERPRET)
                b_z, b_d = time_steps(p_row, m_t, b_w, b_bias, PITCH, RP, FULL, EXACT, INTERPRET, PRECISION)
                x = split_steps(b_x, STEPS, CHANNELS)
                g = split_steps(b_g, STEPS, CHANNELS)
                d = split_steps(b_d, STEPS, CHANNELS)
                z = split_steps(b_z, STEPS, CHANNELS)
                a = split_steps(exp2(b_d * b_A[None, :], not INTERPRET), STEPS, CHANNELS)
                Bs = split_steps(b_B[:, None], STEPS, 1)
                Cs = split_steps(b_C[:, None], STEPS, 1)
                h = (h,)
                for i in tl.static_range(STEPS):
                    h = h + (a[i] * h[i] + d[i] * (Bs[i] * x[i]),)
                all_dx = ()
                all_dz = ()
                all_dB = ()
                all_dC = ()
                # Everything of one step before the next: what is live at once must fit in registers.
                for i in tl.static_range(STEPS):
                    lam = Cs[STEPS - 1 - i] * g[STEPS - 1 - i] + mu
                    mu = a[STEPS - 1 - i] * lam
                    ah = a[STEPS - 1 - i] * h[STEPS - 1 - i]
                    ld = lam * d[STEPS - 1 - i]
                    slope = slope2(z[STEPS - 1 - i], EXACT, INTERPRET)
                    # The gradient of z, times ln(2).
                    dz = lam * (Bs[STEPS - 1 - i] * x[STEPS - 1 - i] + b_A2[None, :] * ah) * slope
                    b_dA += ld * ah
                    b_dbias += dz
                    if FIRST and sense == 0:
                        b_dD += g[STEPS - 1 - i] * x[STEPS - 1 - i]
                    all_dx = (ld * Bs[STEPS - 1 - i],) + all_dx
                    all_dz = (dz.to(narrow),) + all_dz
                    all_dB = ((ld * x[STEPS - 1 - i]).to(narrow),) + all_dB
                    all_dC = ((g[STEPS - 1 - i] * h[STEPS - i]).to(narrow),) + all_dC
                if FIRST and sense == 0:
                    if n == 0:
                        b_dx = b_D[None, :] * b_g
                    else:
                        b_dx = read(p_sum + o_x, m, SURE)
                else:
                    b_dx = read(p_sum + o_x, m, SURE)
                b_dx += join_steps(all_dx, STEPS, CHANNELS)
                if FIRST or sense == 0 or n < N - 1:
                    write(p_sum + o_x, b_dx, m, SURE)
                else:
                    write(p_dx + o_x, b_dx, m, SURE)
                b_dz = join_steps(all_dz, STEPS, CHANNELS)
                b_dB = join_steps(all_dB, STEPS, CHANNELS)
                b_dC = join_steps(all_dC, STEPS, CHANNELS)
                b_dp = tl.dot(b_dz, tl.trans(b_wide), input_precision=PRECISION)
                b_dp = tl.dot(b_dB, to_B, b_dp, input_precision=PRECISION)
                b_dp = tl.dot(b_dC, to_C, b_dp, input_precision=PRECISION)
                p_out = (
                    p_dp
                    + (i_c.to(tl.int64) * (Q // S) * L + at_t)[:, None] * (4 * PITCH)
                    + k * PITCH
                    + o_p[None, :]
                )
                m_p = m_t[:, None] & (o_p < PITCH)[None, :]
                if n > 0:
                    b_dp += tl.load(p_out, mask=m_p, other=0.0).to(tl.float32)
                write(p_out, b_dp, m_p, FULL and PP == PITCH)
                b_dt = projected_columns(p_row, m_t, PITCH, RP, FULL, INTERPRET)
                b_dw = tl.dot(b_dt, b_dz, b_dw, input_precision=PRECISION)
            tl.store(p_row_of_sums + 4 * C * (R + 1) + (k * C + o_c) * N + n, tl.sum(b_dA, 0) * LN2, mask=m_c)
            # What one lane stored another reads in the next walk.
            tl.debug_barrier()
        tl.store(p_row_of_sums + 4 * C * R + k * C + o_c, tl.sum(b_dbias, 0) * LOG2E, mask=m_c)
        m_w = (o_r < R)[:, None] & m_c[None, :]
        tl.store(p_row_of_sums + (k * C + o_c)[None, :] * R + o_r[:, None], b_dw * LOG2E, mask=m_w)
        if FIRST and sense == 0:
            # It met every token once a state.
            tl.store(p_row_of_sums + 4 * C * (R + 1 + N) + o_c, tl.sum(b_dD, 0) / N, mask=m_c)


@triton.jit
def ss2d_projected_sum(
    p_dp,
    p_out,
    COUNT,
    BLOCKS: tl.constexpr,
    PITCH: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the partial dp (BLOCKS, COUNT) in the order of their blocks, in natural units; PITCH divides COUNT."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < COUNT
    total = tl.zeros((TILE,), tl.float32)
    p_block = p_dp + at
    for _block in tl.range(0, BLOCKS, loop_unroll_factor=4):
        total += tl.load(p_block, mask=inside, other=0.0).to(tl.float32)
        p_block += COUNT  # blocks together may pass 2**31 elements where one does not
    column = (at % PITCH).to(tl.int32)
    total *= tl.where(column < R, LOG2E, tl.where(column < R + N, LN2, 1.0))
    tl.store(p_out + at, total.to(p_out.dtype.element_ty), mask=inside)
