# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""The forward of the fused scan: every segment of every direction in parallel, by two walks and a carry between them.

A sequence is cut into segments of SPAN steps, 16 segments are the rows of a tile, and a program walks its rows' steps
for a block of channels. The first walk starts each segment from zero and keeps its end and its decay; the carry links
the segments of an image; the second starts from the true state and adds its share of y to a sum in place, one axis a
launch and both senses in one program, so that no direction has a tensor of its own.
"""

import triton
import triton.language as tl

from vmamba_kernels.exponents import LN2, exp2
from vmamba_kernels.scan.steps import follow
from vmamba_kernels.ss2d.registers import (
    ROWS,
    begin,
    channel_order,
    column,
    input_and_output,
    join_steps,
    neighbours,
    nothing,
    overlap,
    place,
    projected_rows,
    read_product,
    segments,
    skips,
    split_steps,
    time_steps,
    to_memory,
    to_product,
    weights,
    window,
    write_product,
)


@triton.jit
def ss2d_ends(
    p_x, p_p, p_w, p_bias, p_A, p_order, p_ends, p_decays, L, S, Q,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    SPAN: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRAIGHT: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PAIRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Walk each segment but an image's last from zero: its end and its steps' decays' product, each (4, Q, N, C)."""
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
    row, m_row = segments(i_g, k, S, Q, False, 1)
    origin, way, inside = begin(p_order, k, i_g, S, Q, L, SPAN, STEPS, False, WIDE, STRAIGHT, 1)
    at = (k * Q + row).to(tl.int64)[:, None]
    m_out = m_row[:, None] & m_c[None, :]
    for n in range(N):
        b_A = tl.load(p_A + (k * C + o_f) * N + n, mask=m_f, other=0.0)
        h = nothing(b_w, RP, CHANNELS, EXACT, INTERPRET, PRECISION)
        decay = tl.full((ROWS, CHANNELS), 1.0, tl.float32)
        for j in tl.range(0, SPAN // STEPS, num_stages=STAGES):
            shift, at_t, m_t = place(p_order, k, origin, way, inside, j, S, SPAN, STEPS, FULL, STRAIGHT, WIDE)
            m = m_t[:, None] & m_c[None, :]
            o_x = at_t[:, None] * C + o_c[None, :]
            b_x = read_product(p_x + shift * C + o_x, m, SURE, STEPS * ROWS, CHANNELS, PLAIN, INTERPRET)
            p_t, o_p = p_p + shift * (4 * PITCH), at_t * (4 * PITCH)
            b_dt = projected_rows(p_t + first, o_p, m_t, PITCH, RP, FULL, INTERPRET)
            if HELD:
                b_B = column(b_dt, before + R + n, RP, PRECISION) * LN2
            else:
                b_B, _b_C = input_and_output(p_t + k * PITCH, o_p, m_t, n, R, N, PAIRED, FULL)
            _z, b_d = time_steps(b_dt, m_t, b_w, b_bias, FULL, EXACT, INTERPRET, PRECISION)
            a = split_steps(exp2(b_d * b_A[None, :], not INTERPRET), STEPS, CHANNELS)
            u = split_steps(b_d * (b_B[:, None] * b_x), STEPS, CHANNELS)
            for i in tl.static_range(STEPS):
                h = a[i] * h + u[i]
                decay *= a[i]
        at_n = (at * N + n) * C + o_c[None, :]
        tl.store(p_ends + at_n, to_memory(h, ROWS, CHANNELS, PLAIN), mask=m_out)
        tl.store(p_decays + at_n, to_memory(decay, ROWS, CHANNELS, PLAIN), mask=m_out)


@triton.jit
def ss2d_carry(
    p_ends, p_decays, p_starts, S, Q,
    C: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Give each segment the state it starts with, (4, Q, N, C); REVERSE links from the last segment to the first.

    SEGMENTS of them are linked at once: one by one, a large image would wait for memory as often as it has segments.
    """
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    i_b, i_c, k, n = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1), tl.program_id(2)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    o_s = tl.arange(0, SEGMENTS)[:, None]
    m_c = o_c < C
    way = -1 if REVERSE else 1
    first = (k * Q + i_b * S + (S - 1 if REVERSE else 0)).to(tl.int64)
    state = tl.zeros((1, CHANNELS), tl.float32)
    overlap(EARLY)
    tl.store(p_starts + (first * N + n) * C + o_c[None, :], state, mask=m_c[None, :])
    for s in tl.range(0, S - 1, SEGMENTS, num_stages=STAGES):
        m = (s + o_s < S - 1) & m_c[None, :]  # the last one's end is nobody's start
        at = first + (s + o_s) * way
        at_n = (at * N + n) * C + o_c[None, :]
        decay = tl.load(p_decays + at_n, mask=m, other=1.0)
        end = tl.load(p_ends + at_n, mask=m, other=0.0)
        decay, end = tl.associative_scan((decay, end), 0, follow)
        after = decay * state + end
        tl.store(p_starts + ((at + way) * N + n) * C + o_c[None, :], after, mask=m)
        state = tl.sum(tl.where(o_s == SEGMENTS - 1, after, 0.0), 0)[None, :]


@triton.jit
def ss2d_output(
    p_x, p_p, p_w, p_bias, p_A, p_D, p_order, p_starts, p_tiles, p_sum, p_y, L, S, Q, axis,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    SPAN: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, MIRROR: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRAIGHT: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, CARRIED: tl.constexpr, PAIRED: tl.constexpr,
    SAVE: tl.constexpr, EVERY: tl.constexpr,
    FIRST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Walk each segment from its start and add its share to a sum (Q / S, L, C); the last walk writes y.

    FIRST begins the sum. The skip D x, most of y as a rule, is added last, so that what lies in memory between walks,
    and is rounded there where p_sum is y itself, is the scan's share alone.

    SAVE keeps the state before every EVERY steps, (4, Q, SPAN / EVERY, N, C), for the backward.
    """
    TILES: tl.constexpr = SPAN // STEPS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    SURE: tl.constexpr = FULL and C % CHANNELS == 0
    PLAIN: tl.constexpr = EXACT or CHANNELS < 32
    HELD: tl.constexpr = not EXACT and RP >= R + 2 * N  # what is loaded for the time steps has B and C too
    i_g, i_c = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o_c = i_c * CHANNELS + neighbours(CHANNELS, PLAIN)
    o_f = i_c * CHANNELS + channel_order(CHANNELS, PLAIN)
    o_r = tl.arange(0, RP)
    m_c, m_f = o_c < C, o_f < C
    b_D = skips(p_D, o_f, m_f, C)
    for sense in tl.static_range(2):
        k = axis + 2 * sense
        first, before = window(k, PITCH, RP)
        b_w, b_bias = weights(p_w, p_bias, k, o_r - before, o_f, m_f, C, R, INTERPRET)
        row, m_row = segments(i_g, k, S, Q, MIRROR)
        origin, way, inside = begin(p_order, k, i_g, S, Q, L, SPAN, STEPS, MIRROR, WIDE, STRAIGHT)
        at = (k * Q + row).to(tl.int64)[:, None]
        m_out = m_row[:, None] & m_c[None, :]
        if sense == 0:
            overlap(EARLY)
        for n in range(N):
            b_A = tl.load(p_A + (k * C + o_f) * N + n, mask=m_f, other=0.0)
            if CARRIED:
                h = tl.load(p_starts + (at * N + n) * C + o_c[None, :], mask=m_out, other=0.0)
                h = to_product(h, ROWS, CHANNELS, PLAIN) + nothing(
                    b_w, RP, CHANNELS, EXACT, INTERPRET, PRECISION
                )
            else:
                h = nothing(b_w, RP, CHANNELS, EXACT, INTERPRET, PRECISION)
            for j in tl.range(0, TILES, num_stages=STAGES):
                shift, at_t, m_t = place(
                    p_order, k, origin, way, inside, j, S, SPAN, STEPS, FULL, STRAIGHT, WIDE
                )
                m = m_t[:, None] & m_c[None, :]
                at_x = shift * C
                o_x = at_t[:, None] * C + o_c[None, :]
                b_x = read_product(p_x + at_x + o_x, m, SURE, STEPS * ROWS, CHANNELS, PLAIN, INTERPRET)
                p_t, o_p = p_p + shift * (4 * PITCH), at_t * (4 * PITCH)
                b_dt = projected_rows(p_t + first, o_p, m_t, PITCH, RP, FULL, INTERPRET)
                if HELD:
                    b_B = column(b_dt, before + R + n, RP, PRECISION) * LN2
                    b_C = column(b_dt, before + R + N + n, RP, PRECISION)
                else:
                    b_B, b_C = input_and_output(p_t + k * PITCH, o_p, m_t, n, R, N, PAIRED, FULL)
                _z, b_d = time_steps(b_dt, m_t, b_w, b_bias, FULL, EXACT, INTERPRET, PRECISION)
                a = split_steps(exp2(b_d * b_A[None, :], not INTERPRET), STEPS, CHANNELS)
                u = split_steps(b_d * (b_B[:, None] * b_x), STEPS, CHANNELS)
                states = ()
                for i in tl.static_range(STEPS):
                    if SAVE and i % EVERY == 0:
                        at_tile = (at * (SPAN // EVERY) + (j * STEPS + i) // EVERY) * N + n
                        p_tile = p_tiles + at_tile * C + o_c[None, :]
                        write_product(p_tile, h, m_out, SURE, ROWS, CHANNELS, PLAIN)
                    h = a[i] * h + u[i]
                    states = states + (h,)
                b_y = b_C[:, None] * join_steps(states, STEPS, CHANNELS)
                if not FIRST or sense == 1 or n > 0:
                    b_y += read_product(p_sum + at_x + o_x, m, SURE, STEPS * ROWS, CHANNELS, PLAIN, INTERPRET)
                if FIRST or sense == 0 or n < N - 1:
                    write_product(p_sum + at_x + o_x, b_y, m, SURE, STEPS * ROWS, CHANNELS, PLAIN)
                else:
                    b_all = b_y + b_D[None, :] * b_x
                    write_product(p_y + at_x + o_x, b_all, m, SURE, STEPS * ROWS, CHANNELS, PLAIN)
            # What one lane stored another reads in the next walk.
            tl.debug_barrier()
