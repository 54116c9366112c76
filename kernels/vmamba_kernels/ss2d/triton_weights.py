# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""The scan's weights as its kernels read them, of a model's parameters, and back: one launch for what is seven."""

import triton
import triton.language as tl


@triton.jit
def ss2d_weights(
    p_rows, p_dt, p_a, p_A, p_new_rows, p_new_dt, p_new_a,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, TILE: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Copy a projection's rows (4, FROM, C) to (4, TO, C), what is more being zeros, and dt (4, C, R), in new types.

    And make of a (4, C, N), the logarithms of -A, A itself, or where BACKWARD of a, A's gradient, theirs: a A.
    """
    LEAST: tl.constexpr = FROM if FROM < TO else TO
    ROWS: tl.constexpr = 4 * TO * C
    DT: tl.constexpr = 4 * C * R
    ROW_TILES: tl.constexpr = (ROWS + TILE - 1) // TILE
    DT_TILES: tl.constexpr = (DT + TILE - 1) // TILE
    i = tl.program_id(0)
    o_tile = tl.arange(0, TILE)
    if i < ROW_TILES:
        o = i * TILE + o_tile
        k, r = o // C // TO, o // C % TO
        rows = tl.load(p_rows + (k * FROM + r) * C + o % C, mask=(o < ROWS) & (r < LEAST), other=0.0)
        tl.store(p_new_rows + o, rows.to(p_new_rows.dtype.element_ty), mask=o < ROWS)
    elif i < ROW_TILES + DT_TILES:
        o = (i - ROW_TILES) * TILE + o_tile
        dt = tl.load(p_dt + o, mask=o < DT, other=0.0)
        tl.store(p_new_dt + o, dt.to(p_new_dt.dtype.element_ty), mask=o < DT)
    else:
        o = (i - ROW_TILES - DT_TILES) * TILE + o_tile
        m = o < 4 * C * N
        a = tl.load(p_a + o, mask=m, other=0.0).to(tl.float32)
        new = a * tl.load(p_A + o, mask=m, other=0.0) if BACKWARD else -tl.exp(a)
        tl.store(p_new_a + o, new.to(p_new_a.dtype.element_ty), mask=m)
