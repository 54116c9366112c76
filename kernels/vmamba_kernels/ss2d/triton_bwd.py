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

from vmamba_kernels.exponents import LN2, LOG2E, exp2, narrow
from vmamba_kernels.ss2d.registers import (
    ROWS,
    add_rows,
    begin,
    channel_order,
    column,
    input_and_output,
    join_channels,
    join_steps,
    neighbours,
    no_sum,
    nothing,
    overlap,
    place,
    projected_columns,
    projected_rows,
    read_product,
    segments,
    skips,
    slope2,
    split_channels,
    split_columns,
    split_steps,
    time_steps,
    to_memory,
    to_product,
    weights,
    window,
    write_product,
)


@triton.jit
def ss2d_adjoint_ends(
    p_g, p_p, p_w, p_bias, p_A, p_order, p_ends, p_decays, L, S, Q,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    SPAN: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRAIGHT: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PAIRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Walk each segment but an image's first backwards from zero: the mu it hands on, its decay, each (4, Q, N, C)."""
    TILES: tl.constexpr = SPAN // STEPS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    SURE: tl.constexpr = FULL and C % CHANNELS == 0
    PLAIN: tl.constexpr = EXACT or CHANNELS < 32
    HELD: tl.constexpr = not EXACT and RP >= R + 2 * N  # what is loaded for the time steps has B and C too
    overlap(EARLY)
    i_g, i_c, k = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    o_c = i_c * CHANNELS + neighbours(CHANNELS, PLAIN)
    o_f = i_c * CHANNELS + channel_order(CHANNELS, PLAIN)
    o_r = tl.arange(0, RP)
    m_c, m_f = o_c < C, o_f < C
    first, before = window(k, PITCH, RP)
    b_w, b_bias = weights(p_w, p_bias, k, o_r - before, o_f, m_f, C, R, INTERPRET)
    row, m_row = segments(i_g, k, S, Q, False, -1)
    origin, way, inside = begin(p_order, k, i_g, S, Q, L, SPAN, STEPS, False, WIDE, STRAIGHT, -1)
    at = (k * Q + row).to(tl.int64)[:, None]
    m_out = m_row[:, None] & m_c[None, :]
    for n in range(N):
        b_A = tl.load(p_A + (k * C + o_f) * N + n, mask=m_f, other=0.0)
        mu = nothing(b_w, RP, CHANNELS, EXACT, INTERPRET, PRECISION)
        decay = tl.full((ROWS, CHANNELS), 1.0, tl.float32)
        for back in tl.range(0, TILES, num_stages=STAGES):
            shift, at_t, m_t = place(
                p_order, k, origin, way, inside, TILES - 1 - back, S, SPAN, STEPS, FULL, STRAIGHT, WIDE
            )
            m = m_t[:, None] & m_c[None, :]
            o_x = at_t[:, None] * C + o_c[None, :]
            b_g = read_product(p_g + shift * C + o_x, m, SURE, STEPS * ROWS, CHANNELS, PLAIN, INTERPRET)
            p_t, o_p = p_p + shift * (4 * PITCH), at_t * (4 * PITCH)
            b_dt = projected_rows(p_t + first, o_p, m_t, PITCH, RP, FULL, INTERPRET)
            if HELD:
                b_C = column(b_dt, before + R + N + n, RP, PRECISION)
            else:
                _b_B, b_C = input_and_output(p_t + k * PITCH, o_p, m_t, n, R, N, PAIRED, FULL)
            _z, b_d = time_steps(b_dt, m_t, b_w, b_bias, FULL, EXACT, INTERPRET, PRECISION)
            a = split_steps(exp2(b_d * b_A[None, :], not INTERPRET), STEPS, CHANNELS)
            cg = split_steps(b_C[:, None] * b_g, STEPS, CHANNELS)
            for i in tl.static_range(STEPS):
                mu = a[STEPS - 1 - i] * (cg[STEPS - 1 - i] + mu)
                decay *= a[i]
        at_n = (at * N + n) * C + o_c[None, :]
        tl.store(p_ends + at_n, to_memory(mu, ROWS, CHANNELS, PLAIN), mask=m_out)
        tl.store(p_decays + at_n, to_memory(decay, ROWS, CHANNELS, PLAIN), mask=m_out)


@triton.jit
def ss2d_gradients(
    p_g, p_x, p_p, p_w, p_bias, p_A, p_D, p_order, p_starts, p_tiles, p_sum, p_dx, p_dp, p_dBC, p_weights, p_others,
    L, S, Q, axis,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    PP: tl.constexpr, SPAN: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, MIRROR: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRAIGHT: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, CARRIED: tl.constexpr, PAIRED: tl.constexpr, FIRST: tl.constexpr, APART: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Walk each segment backwards from what it receives: dx, and the partial sums of all other gradients.

    dx is summed in place, as y is. dp is (BLOCKS, Q / S, L, 4, PITCH) by block of channels, in the walk's units of
    logarithms. The parameters' are by group of 16 rows: in p_weights a row of dw (4, C, R) and dbias (4, C), in
    p_others one of dA (4, C, N) and dD (C).

    APART, for one state: p_dp is dz (4, Q / S, L, C), of which ss2d_projected_product makes the gradient of the time
    steps and ss2d_weight_product those of p_weights, and p_dBC are the sums of dB and dC, (4, BLOCKS, Q / S, L, 2) by
    block of channels.
    """
    TILES: tl.constexpr = SPAN // STEPS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    SURE: tl.constexpr = FULL and C % CHANNELS == 0
    PLAIN: tl.constexpr = EXACT or CHANNELS < 32
    # What is loaded for the time steps has B and C too; with 16 channels reading them from there took longer.
    HELD: tl.constexpr = not EXACT and RP >= R + 2 * N and CHANNELS == 32
    PARTS: tl.constexpr = 2 if CHANNELS == 32 and not APART else 1
    PART: tl.constexpr = CHANNELS // PARTS
    i_g, i_c = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o_c = i_c * CHANNELS + neighbours(CHANNELS, PLAIN)
    o_f = i_c * CHANNELS + channel_order(CHANNELS, PLAIN)
    m_c, m_f = o_c < C, o_f < C
    # A thread's consecutive channels are dealt to the parts in turn.
    o_part = split_columns(o_f, CHANNELS, PARTS)
    o_r = tl.arange(0, RP)
    # Of 64 columns a thread would have 32 bytes, which no store takes at once.
    AS_IT_LIES: tl.constexpr = EXACT or PP > 32 or APART
    o_columns = neighbours(PP, AS_IT_LIES)
    o_pf = channel_order(PP, AS_IT_LIES)
    b_D = skips(p_D, o_f, m_f, C)
    operand: tl.constexpr = tl.float32 if INTERPRET else p_x.dtype.element_ty
    p_row_of_weights = p_weights + i_g.to(tl.int64) * (4 * C * (R + 1))
    p_row_of_others = p_others + i_g.to(tl.int64) * (4 * C * N + C)
    for sense in tl.static_range(2):
        k = axis + 2 * sense
        row, m_row = segments(i_g, k, S, Q, MIRROR)
        origin, way, inside = begin(p_order, k, i_g, S, Q, L, SPAN, STEPS, MIRROR, WIDE, STRAIGHT)
        at = (k * Q + row).to(tl.int64)[:, None]
        m_out = m_row[:, None] & m_c[None, :]
        first, before = window(k, PITCH, RP)
        w, bias, wide, dw, dbias, dD = (), (), (), (), (), ()
        for part in tl.static_range(PARTS):
            o = o_part[part]
            b_w, b_bias = weights(p_w, p_bias, k, o_r - before, o, o < C, C, R, INTERPRET)
            w, bias = w + (b_w,), bias + (b_bias,)
            if not APART:
                b_wide, _bias = weights(p_w, p_bias, k, o_pf, o, o < C, C, R, INTERPRET)
                wide += (b_wide,)
                dw += (tl.zeros((RP, PART), tl.float32),)
            zeros = no_sum(nothing(b_w, RP, PART, EXACT, INTERPRET, PRECISION), PART, EXACT)
            dbias, dD = dbias + (zeros,), dD + (zeros,)
        if sense == 0:
            overlap(EARLY)
        for n in range(N):
            # One-hot columns: products with them are sums over channels, put where the gradients of B and C belong.
            if not APART:
                to_B = tl.where((o_pf == R + n)[None, :] & (o_part[0] >= 0)[:, None], 1.0, 0.0).to(operand)
                to_C = tl.where((o_pf == R + N + n)[None, :] & (o_part[0] >= 0)[:, None], 1.0, 0.0).to(
                    operand
                )
            if CARRIED:
                b_mu = tl.load(p_starts + (at * N + n) * C + o_c[None, :], mask=m_out, other=0.0)
                b_mu = to_product(b_mu, ROWS, CHANNELS, PLAIN)
            else:
                b_mu = tl.zeros((ROWS, CHANNELS), tl.float32)
            mu = split_channels(b_mu, ROWS, CHANNELS, PARTS)
            A, dA = (), ()
            for part in tl.static_range(PARTS):
                o = o_part[part]
                A += (tl.load(p_A + (k * C + o) * N + n, mask=o < C, other=0.0),)
                dA += (no_sum(tl.zeros((ROWS, PART), tl.float32), PART, EXACT),)
            for back in tl.range(0, TILES, num_stages=STAGES):
                j = TILES - 1 - back
                shift, at_t, m_t = place(
                    p_order, k, origin, way, inside, j, S, SPAN, STEPS, FULL, STRAIGHT, WIDE
                )
                m = m_t[:, None] & m_c[None, :]
                at_x = shift * C
                o_x = at_t[:, None] * C + o_c[None, :]
                b_x = read_product(p_x + at_x + o_x, m, SURE, STEPS * ROWS, CHANNELS, PLAIN, INTERPRET)
                b_g = read_product(p_g + at_x + o_x, m, SURE, STEPS * ROWS, CHANNELS, PLAIN, INTERPRET)
                p_t, o_p = p_p + shift * (4 * PITCH), at_t * (4 * PITCH)
                p_tile = p_tiles + ((at * TILES + j) * N + n) * C + o_c[None, :]
                b_h = read_product(p_tile, m_out, SURE, ROWS, CHANNELS, PLAIN, INTERPRET)
                b_dt = projected_rows(p_t + first, o_p, m_t, PITCH, RP, FULL, INTERPRET)
                if HELD:
                    b_B = column(b_dt, before + R + n, RP, PRECISION) * LN2
                    b_C = column(b_dt, before + R + N + n, RP, PRECISION)
                else:
                    b_B, b_C = input_and_output(p_t + k * PITCH, o_p, m_t, n, R, N, PAIRED, FULL)
                if not EXACT and not APART:
                    b_dt_turned = projected_columns(p_t + first, o_p, m_t, PITCH, RP, FULL, INTERPRET)
                x = split_channels(b_x, STEPS * ROWS, CHANNELS, PARTS)
                g = split_channels(b_g, STEPS * ROWS, CHANNELS, PARTS)
                h = split_channels(b_h, ROWS, CHANNELS, PARTS)
                all_dx, all_dz, new_mu, new_dA, new_dw, new_dbias, new_dD = (), (), (), (), (), (), ()
                b_dp = tl.zeros((STEPS * ROWS, PP), tl.float32)
                b_dC = b_dp  # summed apart where APART: ones, unlike one-hot columns, take no registers
                # Everything of one part before the next: what is live at once must fit in registers.
                for part in tl.static_range(PARTS):
                    b_z, b_d = time_steps(b_dt, m_t, w[part], bias[part], FULL, EXACT, INTERPRET, PRECISION)
                    dx, dz, dB, dC, part_mu, part_dA, part_dbias, part_dD = _steps(
                        x[part], g[part], b_B, b_C, h[part], b_z, b_d, A[part],
                        mu[part], dA[part], dbias[part], dD[part],
                        STEPS, PART, not APART, FIRST and sense == 0, operand, EXACT, INTERPRET,
                    )  # fmt: skip
                    if APART:
                        ones = tl.full((PART, PP), 1.0, operand)
                        b_dp = tl.dot(dB, ones, b_dp, input_precision=PRECISION)
                        b_dC = tl.dot(dC, ones, b_dC, input_precision=PRECISION)
                        all_dz += (dz,)
                    else:
                        b_dp = tl.dot(dz, tl.trans(wide[part]), b_dp, input_precision=PRECISION)
                        b_dp = tl.dot(dB, to_B, b_dp, input_precision=PRECISION)
                        b_dp = tl.dot(dC, to_C, b_dp, input_precision=PRECISION)
                        if EXACT:  # so late, or a product of float32 holds it in registers all the while
                            b_dt_turned = projected_columns(p_t + first, o_p, m_t, PITCH, RP, FULL, INTERPRET)
                        new_dw += (tl.dot(b_dt_turned, dz, dw[part], input_precision=PRECISION),)
                    all_dx += (dx,)
                    new_mu, new_dA = new_mu + (part_mu,), new_dA + (part_dA,)
                    new_dbias, new_dD = new_dbias + (part_dbias,), new_dD + (part_dD,)
                mu, dA, dw, dbias, dD = new_mu, new_dA, new_dw, new_dbias, new_dD
                b_dx = join_channels(all_dx, STEPS * ROWS, CHANNELS, PARTS)
                if not FIRST or sense == 1 or n > 0:
                    b_dx += read_product(
                        p_sum + at_x + o_x, m, SURE, STEPS * ROWS, CHANNELS, PLAIN, INTERPRET
                    )
                if FIRST or sense == 0 or n < N - 1:
                    write_product(p_sum + at_x + o_x, b_dx, m, SURE, STEPS * ROWS, CHANNELS, PLAIN)
                else:
                    b_all = b_dx + b_D[None, :] * b_g
                    write_product(p_dx + at_x + o_x, b_all, m, SURE, STEPS * ROWS, CHANNELS, PLAIN)
                if APART:
                    b_dz = join_channels(all_dz, STEPS * ROWS, CHANNELS, PARTS)
                    p_dz = p_dp + tl.cast(k, tl.int64) * (Q // S) * L * C + at_x + o_x
                    write_product(p_dz, b_dz, m, SURE, STEPS * ROWS, CHANNELS, PLAIN)
                    p_out = p_dBC + ((k * BLOCKS + i_c.to(tl.int64)) * (Q // S) * L + shift) * 2
                    p_out += at_t[:, None] * 2 + o_columns[None, :]
                    b_dp = tl.where((o_columns == 0)[None, :], b_dp, b_dC)
                    tl.store(p_out, b_dp, mask=m_t[:, None] & (o_columns < 2)[None, :])
                else:
                    p_out = (
                        p_dp
                        + (i_c.to(tl.int64) * (Q // S) * L + shift) * (4 * PITCH)
                        + k * PITCH
                        + (o_p[:, None] + o_columns[None, :])
                    )
                    m_p = m_t[:, None] & (o_columns < PITCH)[None, :]
                    if n > 0:
                        b_dp += read_product(p_out, m_p, False, STEPS * ROWS, PP, AS_IT_LIES, INTERPRET)
                    write_product(p_out, b_dp, m_p, FULL and PP == PITCH, STEPS * ROWS, PP, AS_IT_LIES)
            for part in tl.static_range(PARTS):
                o = o_part[part]
                p_dA = p_row_of_others + (k * C + o) * N + n
                tl.store(p_dA, tl.sum(dA[part], 0) * LN2, mask=o < C)
            # What one lane stored another reads in the next walk.
            tl.debug_barrier()
        for part in tl.static_range(PARTS):
            o = o_part[part]
            if not APART:
                p_dbias = p_row_of_weights + 4 * C * R + k * C + o
                tl.store(p_dbias, tl.sum(dbias[part], 0) * LOG2E, mask=o < C)
                r = o_r - before
                p_dw = p_row_of_weights + (k * C + o)[None, :] * R + r[:, None]
                tl.store(p_dw, dw[part] * LOG2E, mask=((r >= 0) & (r < R))[:, None] & (o < C)[None, :])
            if FIRST and sense == 0:
                # It met every token once a state.
                tl.store(p_row_of_others + 4 * C * N + o, tl.sum(dD[part], 0) / N, mask=o < C)


@triton.jit
def _steps(
    b_x, b_g, b_B, b_C, h, b_z, b_d, b_A, mu, b_dA, b_dbias, b_dD,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, operand: tl.constexpr,
    EXACT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Walk a tile's steps backwards: dx, dz times ln(2), dB and dC by channel; then mu and the sums, carried on."""
    b_A2 = b_A * LN2
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
    # Everything of one step before the next, likewise.
    for i in tl.static_range(STEPS):
        lam = Cs[STEPS - 1 - i] * g[STEPS - 1 - i] + mu
        mu = a[STEPS - 1 - i] * lam
        ah = a[STEPS - 1 - i] * h[STEPS - 1 - i]
        ld = lam * d[STEPS - 1 - i]
        slope = slope2(z[STEPS - 1 - i], EXACT, INTERPRET)
        dz = lam * (Bs[STEPS - 1 - i] * x[STEPS - 1 - i] + b_A2[None, :] * ah) * slope
        b_dA = add_rows(b_dA, ld * ah, CHANNELS, EXACT)
        if BIAS:
            b_dbias = add_rows(b_dbias, dz, CHANNELS, EXACT)
        if SKIP:
            b_dD = add_rows(b_dD, g[STEPS - 1 - i] * x[STEPS - 1 - i], CHANNELS, EXACT)
        all_dx = (ld * Bs[STEPS - 1 - i],) + all_dx
        all_dz = (dz,) + all_dz
        all_dB = (ld * x[STEPS - 1 - i],) + all_dB
        all_dC = (g[STEPS - 1 - i] * h[STEPS - i],) + all_dC
    return (
        join_steps(all_dx, STEPS, CHANNELS),
        narrow(join_steps(all_dz, STEPS, CHANNELS), operand, not INTERPRET),
        narrow(join_steps(all_dB, STEPS, CHANNELS), operand, not INTERPRET),
        narrow(join_steps(all_dC, STEPS, CHANNELS), operand, not INTERPRET),
        mu,
        b_dA,
        b_dbias,
        b_dD,
    )


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
    EARLY: tl.constexpr,
):
    """Add the partial dp (BLOCKS, COUNT) in the order of their blocks, in natural units; PITCH divides COUNT."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < COUNT
    total = tl.zeros((TILE,), tl.float32)
    p_block = p_dp + at
    overlap(EARLY)
    for _block in tl.range(0, BLOCKS, loop_unroll_factor=4):
        total += tl.load(p_block, mask=inside, other=0.0).to(tl.float32)
        p_block += COUNT  # blocks together may pass 2**31 elements where one does not
    column = (at % PITCH).to(tl.int32)
    total *= tl.where(column < R, LOG2E, tl.where(column < R + N, LN2, 1.0))
    tl.store(p_out + at, total.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def ss2d_projected_product(
    p_dz, p_dBC, p_w, p_out, TOKENS,
    C: tl.constexpr, R: tl.constexpr, PITCH: tl.constexpr, PP: tl.constexpr, BLOCKS: tl.constexpr,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr, INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Make dp (TOKENS, 4, PITCH) of dz (4, TOKENS, C) and of dB and dC (4, BLOCKS, TOKENS, 2), in natural units."""
    k = tl.program_id(1)
    o_t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_r, o_b = tl.arange(0, PP), tl.arange(0, AT_ONCE)
    m_t = o_t < TOKENS
    b_dB, b_dC = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    overlap(EARLY)
    for first in tl.range(0, BLOCKS, AT_ONCE):
        block = k * BLOCKS + first + o_b
        p_block = p_dBC + (block.to(tl.int64)[:, None] * TOKENS + o_t[None, :]) * 2
        m = (first + o_b < BLOCKS)[:, None] & m_t[None, :]
        b_dB += tl.sum(tl.load(p_block, mask=m, other=0.0), 0)
        b_dC += tl.sum(tl.load(p_block + 1, mask=m, other=0.0), 0)
    p_rows = p_dz + (k.to(tl.int64) * TOKENS + o_t)[:, None] * C
    b_dp = tl.zeros((TILE, PP), tl.float32)
    for first in tl.range(0, C, CHANNELS, num_stages=STAGES):
        o_c = first + tl.arange(0, CHANNELS)
        m_c = o_c < C
        b_dz = tl.load(p_rows + o_c[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0)
        p_wide = p_w + (k * C + o_c)[:, None] * R + o_r[None, :]
        b_wide = tl.load(p_wide, mask=m_c[:, None] & (o_r < R)[None, :], other=0.0)
        if INTERPRET:
            b_dz, b_wide = b_dz.to(tl.float32), b_wide.to(tl.float32)
        b_dp = tl.dot(b_dz, b_wide, b_dp, input_precision=PRECISION)
    b_dp = tl.where((o_r == R)[None, :], b_dB[:, None] * LN2, b_dp * LOG2E)
    b_dp = tl.where((o_r == R + 1)[None, :], b_dC[:, None], b_dp)
    p_out += o_t.to(tl.int64)[:, None] * (4 * PITCH) + k * PITCH + o_r[None, :]
    tl.store(p_out, b_dp.to(p_out.dtype.element_ty), mask=m_t[:, None] & (o_r < PITCH)[None, :])


@triton.jit
def ss2d_weight_product(
    p_dz, p_p, p_weights, TOKENS,
    C: tl.constexpr, R: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Make dw and dbias of dz (4, TOKENS, C) and the projection (TOKENS, 4, PITCH), a row by group of GROUP tokens."""
    i_c, k, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, before = window(k, PITCH, RP)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    o_r = tl.arange(0, RP)
    r = o_r - before
    m_c = o_c < C
    b_dw = tl.zeros((CHANNELS, RP), tl.float32)
    overlap(EARLY)
    for tile in tl.range(0, GROUP, TILE, num_stages=STAGES):
        o_t = i_g * GROUP + tile + tl.arange(0, TILE)
        m_t = o_t < TOKENS
        p_rows = p_dz + (k.to(tl.int64) * TOKENS + o_t)[:, None] * C
        b_dz = tl.load(p_rows + o_c[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0)
        p_dt = p_p + first + o_t.to(tl.int64)[:, None] * (4 * PITCH) + o_r[None, :]
        b_dt = tl.load(p_dt, mask=m_t[:, None] & (o_r < 4 * PITCH)[None, :], other=0.0)
        if INTERPRET:
            b_dz, b_dt = b_dz.to(tl.float32), b_dt.to(tl.float32)
        b_dt = tl.where((r == R)[None, :], 1.0, b_dt)  # of which comes the sum of dz
        b_dw = tl.dot(tl.trans(b_dz), b_dt.to(b_dz.dtype), b_dw, input_precision=PRECISION)
    b_dw *= LOG2E
    p_row = p_weights + i_g.to(tl.int64) * (4 * C * (R + 1)) + r[None, :]
    p_dw = p_row + (k * C + o_c)[:, None] * R
    tl.store(p_dw, b_dw, mask=m_c[:, None] & ((r >= 0) & (r < R))[None, :])
    p_dbias = p_row - R + 4 * C * R + (k * C + o_c)[:, None]
    tl.store(p_dbias, b_dw, mask=m_c[:, None] & (r == R)[None, :])


@triton.jit
def ss2d_parameter_sum(
    p_weights, p_others, p_dw, p_dbias, p_dA, p_dD, WEIGHT_GROUPS, GROUPS,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, AT_ONCE: tl.constexpr, TILE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Add the parameters' gradients over groups and write each where it belongs; dD four times."""
    AT_BIAS: tl.constexpr = 4 * C * R
    WEIGHTS: tl.constexpr = AT_BIAS + 4 * C
    AT_D: tl.constexpr = 4 * C * N
    OTHERS: tl.constexpr = AT_D + C
    TILES: tl.constexpr = (WEIGHTS + TILE - 1) // TILE
    i = tl.program_id(0)
    overlap(EARLY)
    if i < TILES:
        o = i * TILE + tl.arange(0, TILE)
        found = _add_groups(p_weights, o, WEIGHT_GROUPS, WEIGHTS, AT_ONCE, TILE)
        tl.store(p_dw + o, found.to(p_dw.dtype.element_ty), mask=o < AT_BIAS)
        m = (o >= AT_BIAS) & (o < WEIGHTS)
        tl.store(p_dbias + o - AT_BIAS, found.to(p_dbias.dtype.element_ty), mask=m)
    else:
        o = (i - TILES) * TILE + tl.arange(0, TILE)
        found = _add_groups(p_others, o, GROUPS, OTHERS, AT_ONCE, TILE)
        tl.store(p_dA + o, found.to(p_dA.dtype.element_ty), mask=o < AT_D)
        for k in tl.static_range(4):
            p_out = p_dD + k * C + o - AT_D
            tl.store(p_out, found.to(p_dD.dtype.element_ty), mask=(o >= AT_D) & (o < OTHERS))


@triton.jit
def _add_groups(p, o, GROUPS, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr, TILE: tl.constexpr):
    """Add the columns o of (GROUPS, WIDTH), AT_ONCE rows together."""
    o_g = tl.arange(0, AT_ONCE)[:, None]
    total = tl.zeros((AT_ONCE, TILE), tl.float32)
    for g in tl.range(0, GROUPS, AT_ONCE):
        m = (g + o_g < GROUPS) & (o < WIDTH)[None, :]
        total += tl.load(p + (g + o_g).to(tl.int64) * WIDTH + o[None, :], mask=m, other=0.0)
    return tl.sum(total, 0)
