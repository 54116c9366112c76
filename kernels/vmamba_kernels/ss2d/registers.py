# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""Triton functions that the fused scan's kernels share: where a tile lies, its time steps, and moves in registers.

A tile is (STEPS * ROWS, CHANNELS) in the layout of a matrix product's result: row i * ROWS + r is step i of row r, and
a thread holds all steps of its rows. Each row is a segment of a sequence of its own, so the recurrence needs no
exchange between threads; splitting a tile by steps renames registers and moves nothing. Exponents are powers of two.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from vmamba_kernels.exponents import LN2, LOG2E, exp2, log2, reciprocal, widen
from vmamba_kernels.ss2d import tiles

ROWS = tl.constexpr(tiles.ROWS)


@triton.jit
def overlap(EARLY: tl.constexpr):
    """Wait for the kernel before, where this one began without it (EARLY 2), and let the next begin (1 and 2).

    Programmatic dependent launch: a kernel's programs take the places that the last of the one before leave free, and
    read weights and work out addresses until those are done. What is read before this call must be older than the
    kernel before, and nothing may be written before it.
    """
    if EARLY == 2:
        gdc_wait()
    if EARLY > 0:
        gdc_launch_dependents()


@triton.jit
def softplus2(z, EXACT: tl.constexpr, INTERPRET: tl.constexpr):
    """log2(1 + 2**z): a few ulp when EXACT, else within 3e-7, or 3e-7 of it where it is more than 1."""
    if EXACT:
        e = exp2(-tl.abs(z), not INTERPRET)
        u = 1.0 + e
        # log(u) * e / (u - 1) undoes the rounding of 1 + e.
        tail = tl.where(u == 1.0, e * LOG2E, log2(u, not INTERPRET) * (e / (u - 1.0)))
        return tl.maximum(z, 0.0) + tail
    else:
        # One instruction fewer than by -|z|. The bound keeps 2**z finite; from there on the value is z.
        return tl.maximum(z, log2(1.0 + power2(z, INTERPRET), not INTERPRET))


@triton.jit
def power2(z, INTERPRET: tl.constexpr):
    """2**z, finite: at most 2**126."""
    return exp2(tl.minimum(z, 126.0), not INTERPRET)


@triton.jit
def slope2(z, EXACT: tl.constexpr, INTERPRET: tl.constexpr):
    """The derivative of softplus2: the logistic function of z ln(2); within 6e-8 unless EXACT."""
    if EXACT:
        e = exp2(-tl.abs(z), not INTERPRET)
        return tl.where(z >= 0, 1.0, e) / (1.0 + e)
    else:
        return 1.0 - reciprocal(1.0 + power2(z, INTERPRET), not INTERPRET)


@triton.jit
def read(p, mask, SURE: tl.constexpr):
    """Load what the mask allows, 0 elsewhere; all of it where it is SURE to be there: a mask costs a copy's select."""
    if SURE:
        return tl.load(p)
    else:
        return tl.load(p, mask=mask, other=0.0)


@triton.jit
def write(p, value, mask, SURE: tl.constexpr):
    """Store where the mask allows, in the type of the memory; everywhere where it is SURE."""
    value = value.to(p.dtype.element_ty)
    if SURE:
        tl.store(p, value)
    else:
        tl.store(p, value, mask=mask)


@triton.jit
def window(k, PITCH: tl.constexpr, RP: tl.constexpr):
    """Return the first of the RP columns that are loaded for direction k, and how many of them come before its own.

    Those that are not its own meet weights that are zero, and cost less than a mask. The last direction has others'
    before its own, so that nothing is read behind the last token's.
    """
    first = tl.maximum(tl.minimum(k * PITCH, 4 * PITCH - RP), 0)
    if PITCH % 8 == 0:
        first = tl.multiple_of(first, 8)
    return first, k * PITCH - first


@triton.jit
def projected_rows(
    p_p, o_p, m_t, PITCH: tl.constexpr, RP: tl.constexpr, FULL: tl.constexpr, INTERPRET: tl.constexpr
):
    """Load the RP columns of window that a tile's rows have."""
    o_r = tl.arange(0, RP)
    m = (o_r[None, :] < 4 * PITCH) & m_t[:, None]
    b_dt = read(p_p + (o_p[:, None] + o_r[None, :]), m, FULL and RP <= 4 * PITCH)
    if INTERPRET:
        b_dt = b_dt.to(tl.float32)
    return b_dt


@triton.jit
def projected_columns(
    p_p, o_p, m_t, PITCH: tl.constexpr, RP: tl.constexpr, FULL: tl.constexpr, INTERPRET: tl.constexpr
):
    """Load what projected_rows loads as (RP, rows): a copy of its own, as a tile in two layouts is not prefetched."""
    o_r = tl.arange(0, RP)
    m = (o_r[:, None] < 4 * PITCH) & m_t[None, :]
    b_dt = read(p_p + (o_p[None, :] + o_r[:, None]), m, FULL and RP <= 4 * PITCH)
    if INTERPRET:
        b_dt = b_dt.to(tl.float32)
    return b_dt


@triton.jit
def time_steps(b_dt, m_t, b_w, b_bias, FULL: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Return z and delta, both in units of log2, of what projected_rows loaded."""
    b_z = tl.dot(b_dt, b_w, input_precision=PRECISION) * LOG2E + b_bias[None, :]
    b_d = softplus2(b_z, EXACT, INTERPRET)
    if not FULL:
        b_d = tl.where(m_t[:, None], b_d, 0.0)
    return b_z, b_d


@triton.jit
def nothing(
    b_w,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXACT: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Zeros (ROWS, CHANNELS), to begin a walk with, by a product with b_w (K, CHANNELS).

    Triton moves what a product reads into the loop that has its only use, and lays it out there anew in every tile,
    by shuffles that a warp waits for. What is used before the loop too stays in registers. In float32 it would not fit.
    """
    if EXACT:
        return tl.zeros((ROWS, CHANNELS), tl.float32)
    else:
        return tl.dot(tl.zeros((ROWS, K), b_w.dtype), b_w, input_precision=PRECISION)


@triton.jit
def column(b_dt, i, RP: tl.constexpr, PRECISION: tl.constexpr):
    """Return column i of what projected_rows loaded, a number for each row of a tile.

    By a product with a matrix that is 1 in row i: every column of the result is the one that is wanted. Loaded by
    itself its 4 bytes a row would be as many requests to L2 as a row of 64 bytes.
    """
    wanted = (tl.arange(0, RP) == i)[:, None] & (tl.arange(0, 8) >= 0)[None, :]
    return tl.max(tl.dot(b_dt, tl.where(wanted, 1.0, 0.0).to(b_dt.dtype), input_precision=PRECISION), 1)


@triton.jit
def input_and_output(
    p_p, o_p, m_t, n, R: tl.constexpr, N: tl.constexpr, PAIRED: tl.constexpr, FULL: tl.constexpr
):
    """Return B * ln(2) and C of state n for each row of a tile; PAIRED reads two 16-bit neighbours as one word."""
    if PAIRED:
        both = read((p_p + R + o_p).to(tl.pointer_type(tl.int32)), m_t, FULL)
        if p_p.dtype.element_ty == tl.bfloat16:
            b_B = (both << 16).to(tl.float32, bitcast=True)
            b_C = (both & -65536).to(tl.float32, bitcast=True)
        else:
            b_B = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            b_C = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        b_B = read(p_p + R + n + o_p, m_t, FULL).to(tl.float32)
        b_C = read(p_p + R + N + n + o_p, m_t, FULL).to(tl.float32)
    return b_B * LN2, b_C


@triton.jit
def weights(p_w, p_bias, k, o_r, o_c, m_c, C: tl.constexpr, R: tl.constexpr, INTERPRET: tl.constexpr):
    """Return the time-step weights (o_r, o_c) of direction k and its bias in units of log2."""
    p = p_w + (k * C + o_c)[None, :] * R + o_r[:, None]
    b_w = tl.load(p, mask=((o_r >= 0) & (o_r < R))[:, None] & m_c[None, :], other=0.0)
    if INTERPRET:
        b_w = b_w.to(tl.float32)
    return b_w, tl.load(p_bias + k * C + o_c, mask=m_c, other=0.0) * LOG2E


@triton.jit
def skips(p_D, o_c, m_c, C: tl.constexpr):
    """Return the sum of the four directions' skips (4, C) for each channel: all meet the same x."""
    b_D = tl.load(p_D + o_c, mask=m_c, other=0.0)
    for k in tl.static_range(1, 4):
        b_D += tl.load(p_D + k * C + o_c, mask=m_c, other=0.0)
    return b_D


@triton.jit
def begin(
    p_order, k, i_g, S, Q, L,
    SPAN: tl.constexpr, STEPS: tl.constexpr, MIRROR: tl.constexpr, WIDE: tl.constexpr, STRAIGHT: tl.constexpr,
    LEFT: tl.constexpr = 0,
):  # fmt: skip
    """Return for each row of a first tile, rows 16 i_g ... 16 i_g + 15 of direction k, its origin, its way, and a mask.

    Origins are tokens among all images'. STRAIGHT: where the row begins, and the stride from one step to the next, the
    same for every segment. Else where its image begins, and the row's place in the table. With MIRROR, directions 2
    and 3 take the segments of an image from the last to the first, so that a program meets the same tokens in both
    senses. LEFT as in which_segment.
    """
    o_m = tl.arange(0, STEPS * ROWS)
    image, segment, inside = which_segment(i_g * ROWS + o_m % ROWS, k, S, Q, MIRROR, LEFT)
    step = o_m // ROWS
    p_k = p_order + k * (S * SPAN)
    if WIDE:
        image = image.to(tl.int64)
    if STRAIGHT:
        stride = tl.load(p_k + 1) - tl.load(p_k)
        origin = image * L + tl.load(p_k + segment * SPAN, mask=inside, other=0) + step * stride
        return origin, stride, inside
    else:
        return image * L, segment * SPAN + step, inside


@triton.jit
def place(
    p_order, k, origin, way, inside, j, S,
    SPAN: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr, STRAIGHT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return, of each row of tile j, the token among all images', as a shift of all and one of its own, and a mask.

    From what begin returned. What is a row's own is the same in every tile of a STRAIGHT walk: its addresses are
    worked out once, and no load stands between a step and them, so that tiles can be asked for ahead.
    """
    if STRAIGHT:
        shift = j * STEPS * way
        return shift.to(tl.int64) if WIDE else shift, origin, inside
    else:
        p = p_order + k * (S * SPAN) + j * STEPS + way
        if FULL:
            return 0, origin + tl.load(p), inside
        else:
            token = tl.load(p, mask=inside, other=-1)
            return 0, origin + token, token >= 0


@triton.jit
def segments(i_g, k, S, Q, MIRROR: tl.constexpr, LEFT: tl.constexpr = 0):
    """Return for each of 16 rows its index among all segments of direction k, in time, and a mask."""
    image, segment, inside = which_segment(i_g * ROWS + tl.arange(0, ROWS), k, S, Q, MIRROR, LEFT)
    return image * S + segment, inside


@triton.jit
def which_segment(q, k, S, Q, MIRROR: tl.constexpr, LEFT: tl.constexpr):
    """Return the image of row q, its segment of the S there, in time, and whether there is such a row.

    LEFT leaves out a segment of each image, whose end nobody wants: 1 the last one, -1 the first.
    """
    if LEFT == 0:
        image = q // S
        segment = q - image * S
        if MIRROR:
            segment = tl.where(k < 2, segment, S - 1 - segment)
        return image, segment, q < Q
    else:
        image = q // (S - 1)
        segment = q - image * (S - 1)
        if LEFT < 0:
            segment += 1
        return image, segment, q < Q - Q // S


@triton.jit
def _halves(x, M: tl.constexpr, CHANNELS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (2, M // 2, CHANNELS)), (1, 2, 0)))


@triton.jit
def no_sum(zeros, CHANNELS: tl.constexpr, EXACT: tl.constexpr):
    """What add_rows begins with, from zeros (ROWS, CHANNELS)."""
    if EXACT:
        return zeros
    else:
        upper, _lower = _halves(zeros, ROWS, CHANNELS)
        return upper


@triton.jit
def add_rows(total, x, CHANNELS: tl.constexpr, EXACT: tl.constexpr):
    """total plus x (ROWS, CHANNELS), for a sum over rows: the first half of them and then the second.

    A thread holds a row of either half, so total takes half of the registers. Not in float32, whose products have
    another layout.
    """
    if EXACT:
        return total + x
    else:
        upper, lower = _halves(x, ROWS, CHANNELS)
        return (total + upper) + lower


@triton.jit
def split_steps(x, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Cut a tile (STEPS * ROWS, CHANNELS) into its steps, a tuple of (ROWS, CHANNELS); STEPS is 1, 2 or 4."""
    if STEPS == 1:
        return (x,)
    else:
        a, b = _halves(x, STEPS * ROWS, CHANNELS)
        if STEPS == 2:
            return (a, b)
        else:
            a0, a1 = _halves(a, 2 * ROWS, CHANNELS)
            b0, b1 = _halves(b, 2 * ROWS, CHANNELS)
            return (a0, a1, b0, b1)


@triton.jit
def channel_order(CHANNELS: tl.constexpr, PLAIN: tl.constexpr):
    """Return the channel of its block that each column of a product's tile stands for.

    In a product's result four threads share a row and each holds two columns of every eight. Were these neighbours,
    a tile of 16-bit numbers would go through shared memory, with conflicts, between its load and its use and once
    more before it is stored. So columns stand for channels in the order in which a thread's are CHANNELS / 4
    consecutive ones: with 32, the 16 bytes that it loads and stores at once. PLAIN: as they lie, where that does not
    hold: of fewer channels a thread would take 8 bytes, which cost more than the conflicts, and numbers of 32 bits
    lie otherwise.
    """
    f = tl.arange(0, CHANNELS)
    if PLAIN:
        return f
    else:
        return (f % 8) // 2 * (CHANNELS // 4) + f // 8 * 2 + f % 2


@triton.jit
def neighbours(CHANNELS: tl.constexpr, PLAIN: tl.constexpr):
    """0 ... CHANNELS - 1, of which a thread loads and stores as many together as channel_order gives it."""
    o = tl.arange(0, CHANNELS)
    if PLAIN:
        return o
    else:
        return tl.max_contiguous(o, CHANNELS // 4)


@triton.jit
def to_product(x, M: tl.constexpr, CHANNELS: tl.constexpr, PLAIN: tl.constexpr):
    """Bring a tile (M, CHANNELS) as it lies in memory into channel_order."""
    if PLAIN:
        return x
    else:
        return tl.reshape(tl.permute(tl.reshape(x, (M, 4, CHANNELS // 8, 2)), (0, 2, 1, 3)), (M, CHANNELS))


@triton.jit
def to_memory(x, M: tl.constexpr, CHANNELS: tl.constexpr, PLAIN: tl.constexpr):
    """Undo to_product."""
    if PLAIN:
        return x
    else:
        return tl.reshape(tl.permute(tl.reshape(x, (M, CHANNELS // 8, 4, 2)), (0, 2, 1, 3)), (M, CHANNELS))


@triton.jit
def read_product(
    p,
    mask,
    SURE: tl.constexpr,
    M: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLAIN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Read a tile (M, CHANNELS) into float32, in channel_order."""
    return widen(to_product(read(p, mask, SURE), M, CHANNELS, PLAIN), not INTERPRET)


@triton.jit
def write_product(
    p, value, mask, SURE: tl.constexpr, M: tl.constexpr, CHANNELS: tl.constexpr, PLAIN: tl.constexpr
):
    """Write what read_product read, in the type of the memory."""
    write(p, to_memory(value.to(p.dtype.element_ty), M, CHANNELS, PLAIN), mask, SURE)


@triton.jit
def split_channels(x, M: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Cut a tile (M, CHANNELS) into PARTS (1 or 2) of fewer channels, a tuple; as with steps, nothing moves."""
    if PARTS == 1:
        return (x,)
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, (M, 2, CHANNELS // 2)), (0, 2, 1)))
        return (a, b)


@triton.jit
def split_columns(o, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """What split_channels makes of a row of numbers."""
    if PARTS == 1:
        return (o,)
    else:
        a, b = tl.split(tl.permute(tl.reshape(o, (2, CHANNELS // 2)), (1, 0)))
        return (a, b)


@triton.jit
def join_channels(t, M: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Undo split_channels."""
    if PARTS == 1:
        return t[0]
    else:
        return tl.reshape(tl.permute(tl.join(t[0], t[1]), (0, 2, 1)), (M, CHANNELS))


@triton.jit
def _stack(a, b, M: tl.constexpr, CHANNELS: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * M, CHANNELS))


@triton.jit
def join_steps(t, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Undo split_steps."""
    if STEPS == 1:
        return t[0]
    elif STEPS == 2:
        return _stack(t[0], t[1], ROWS, CHANNELS)
    else:
        low = _stack(t[0], t[1], ROWS, CHANNELS)
        high = _stack(t[2], t[3], ROWS, CHANNELS)
        return _stack(low, high, 2 * ROWS, CHANNELS)
