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

from vmamba_kernels.exponents import exp2, widen
from vmamba_kernels.scan.steps import follow
from vmamba_kernels.ss2d.registers import (
    ROWS,
    begin,
    input_and_output,
    join_steps,
    place,
    read,
    segments,
    split_steps,
    time_steps,
    weights,
    write,
)


@triton.jit
def ss2d_ends(
    p_x, p_p, p_w, p_bias, p_A, p_order, p_ends, p_sums, L, S, Q,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, RP: tl.constexpr,
    SPAN: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, MIRROR: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRAIGHT: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """Walk each segment from zero: its end (4, Q, N, C) and its sum of time steps (4, Q, C), in units of log2."""
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
        h = tl.zeros((ROWS, CHANNELS), tl.float32)
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for j in tl.range(0, SPAN // STEPS, num_stages=STAGES):
            at_t, m_t = place(p_order, k, origin, way, inside, j, S, SPAN, STEPS, FULL, STRAIGHT)
            b_x = read(p_x + at_t[:, None] * C + o_c[None, :], m_t[:, None] & m_c[None, :], SURE)
            p_row = p_p + at_t * (4 * PITCH) + k * PITCH
            b_B, _b_C = input_and_output(p_row, m_t, n, R, N, PAIRED, FULL)
            _z, b_d = time_steps(p_row, m_t, b_w, b_bias, PITCH, RP, FULL, EXACT, INTERPRET, PRECISION)
            a = split_steps(exp2(b_d * b_A[None, :], not INTERPRET), STEPS, CHANNELS)
            u = split_steps(b_d * (b_B[:, None] * widen(b_x, not INTERPRET)), STEPS, CHANNELS)
            d = split_steps(b_d, STEPS, CHANNELS)
            for i in tl.static_range(STEPS):
                h = a[i] * h + u[i]
                total += d[i]
        tl.store(p_ends + (at * N + n) * C + o_c[None, :], h, mask=m_out)
        if n == 0:
            tl.store(p_sums + at * C + o_c[None, :], total, mask=m_out)


@triton.jit
def ss2d_carry(
    p_ends, p_sums, p_A, p_starts, S, Q,
    C: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
    INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Give each segment the state it starts with, (4, Q, N, C); REVERSE links from the last segment to the first.

    SEGMENTS of them are linked at once: one by one, a large image would wait for memory as often as it has segments.
    """
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    i_b, i_c, k, n = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1), tl.program_id(2)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    o_s = tl.arange(0, SEGMENTS)[:, None]
    m_c = o_c < C
    b_A = tl.load(p_A + (k * C + o_c) * N + n, mask=m_c, other=0.0)[None, :]
    way = -1 if REVERSE else 1
    first = (k * Q + i_b * S + (S - 1 if REVERSE else 0)).to(tl.int64)
    state = tl.zeros((1, CHANNELS), tl.float32)
    tl.store(p_starts + (first * N + n) * C + o_c[None, :], state, mask=m_c[None, :])
    for s in tl.range(0, S - 1, SEGMENTS, num_stages=STAGES):
        m = (s + o_s < S - 1) & m_c[None, :]  # the last one's end is nobody's start
        at = first + (s + o_s) * way
        sums = tl.load(p_sums + at * C + o_c[None, :], mask=m, other=0.0)
        end = tl.load(p_ends + (at * N + n) * C + o_c[None, :], mask=m, other=0.0)
        decay, end = tl.associative_scan((exp2(sums * b_A, not INTERPRET), end), 0, follow)
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
    SAVE: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Walk each segment from its start and add its share to a float32 sum (Q / S, L, C); the last walk writes y.

    FIRST begins the sum, with the skip D x.

    SAVE keeps the state before each tile, (4, Q, SPAN / STEPS, N, C), for the backward.
    """
    TILES: tl.constexpr = SPAN // STEPS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    SURE: tl.constexpr = FULL and C % CHANNELS == 0
    i_g, i_c = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < C
    b_D = tl.load(p_D + o_c, mask=m_c, other=0.0)
    for sense in tl.static_range(2):
        k = axis + 2 * sense
        b_w, b_bias = weights(p_w, p_bias, k, o_c, m_c, C, R, RP, INTERPRET)
        row, m_row = segments(i_g, k, S, Q, MIRROR)
        origin, way, inside = begin(p_order, k, i_g, S, Q, L, SPAN, STEPS, MIRROR, WIDE, STRAIGHT)
        at = (k * Q + row).to(tl.int64)[:, None]
        m_out = m_row[:, None] & m_c[None, :]
        for n in range(N):
            b_A = tl.load(p_A + (k * C + o_c) * N + n, mask=m_c, other=0.0)
            if CARRIED:
                h = tl.load(p_starts + (at * N + n) * C + o_c[None, :], mask=m_out, other=0.0)
            else:
                h = tl.zeros((ROWS, CHANNELS), tl.float32)
            for j in tl.range(0, TILES, num_stages=STAGES):
                at_t, m_t = place(p_order, k, origin, way, inside, j, S, SPAN, STEPS, FULL, STRAIGHT)
                m = m_t[:, None] & m_c[None, :]
                o_x = at_t[:, None] * C + o_c[None, :]
                b_x = widen(read(p_x + o_x, m, SURE), not INTERPRET)
                p_row = p_p + at_t * (4 * PITCH) + k * PITCH
                b_B, b_C = input_and_output(p_row, m_t, n, R, N, PAIRED, FULL)
                _z, b_d = time_steps(p_row, m_t, b_w, b_bias, PITCH, RP, FULL, EXACT, INTERPRET, PRECISION)
                if SAVE:
                    p_tile = p_tiles + ((at * TILES + j) * N + n) * C + o_c[None, :]
                    write(p_tile, h, m_out, SURE)
                a = split_steps(exp2(b_d * b_A[None, :], not INTERPRET), STEPS, CHANNELS)
                u = split_steps(b_d * (b_B[:, None] * b_x), STEPS, CHANNELS)
                states = ()
                for i in tl.static_range(STEPS):
                    h = a[i] * h + u[i]
                    states = states + (h,)
                if FIRST and sense == 0:
                    if n == 0:
                        b_y = b_D[None, :] * b_x
                    else:
                        b_y = read(p_sum + o_x, m, SURE)
                else:
                    b_y = read(p_sum + o_x, m, SURE)
                b_y += b_C[:, None] * join_steps(states, STEPS, CHANNELS)
                if FIRST or sense == 0 or n < N - 1:
                    write(p_sum + o_x, b_y, m, SURE)
                else:
                    write(p_y + o_x, b_y, m, SURE)
            # What one lane stored another reads in the next walk.
            tl.debug_barrier()
