# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""The scan's weights as its kernels read them, of a model's parameters, and back: one launch each for what is seven.

K = 4 directions of C channels, dt rank R, N states; a direction's projection has WIDTH = R + 2 N rows, and PITCH with
its filling.
"""

import triton
import triton.language as tl


@triton.jit
def ss2d_weights(
    p_projection, p_dt, p_logs, p_padded, p_cast, p_A,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the projection (4, WIDTH, C) with its filling (4, PITCH, C), dt (4, C, R), and A = -exp(logs)."""
    WIDTH: tl.constexpr = R + 2 * N
    PADDED: tl.constexpr = (4 * PITCH * C + TILE - 1) // TILE
    CAST: tl.constexpr = (4 * C * R + TILE - 1) // TILE
    i = tl.program_id(0)
    if i < PADDED:
        o = i * TILE + tl.arange(0, TILE)
        row = o // C
        k, r = row // PITCH, row % PITCH
        m = (o < 4 * PITCH * C) & (r < WIDTH)
        rows = tl.load(p_projection + (k * WIDTH + r) * C + o % C, mask=m, other=0.0)
        tl.store(p_padded + o, rows.to(p_padded.dtype.element_ty), mask=o < 4 * PITCH * C)
    elif i < PADDED + CAST:
        o = (i - PADDED) * TILE + tl.arange(0, TILE)
        copy(p_dt, p_cast, o, o < 4 * C * R)
    else:
        o = (i - PADDED - CAST) * TILE + tl.arange(0, TILE)
        logs = tl.load(p_logs + o, mask=o < 4 * C * N, other=0.0).to(tl.float32)
        tl.store(p_A + o, -tl.exp(logs), mask=o < 4 * C * N)


@triton.jit
def copy(p_from, p_to, o, m):
    """Copy what the mask allows, in the type of where it goes."""
    tl.store(p_to + o, tl.load(p_from + o, mask=m, other=0.0).to(p_to.dtype.element_ty), mask=m)


@triton.jit
def ss2d_weight_gradients(
    p_padded, p_cast, p_dA, p_A, p_projection, p_dt, p_logs,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PITCH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Undo ss2d_weights for their gradients: the rows that are not filling, dt's, and dA A."""
    WIDTH: tl.constexpr = R + 2 * N
    OWN: tl.constexpr = (4 * WIDTH * C + TILE - 1) // TILE
    CAST: tl.constexpr = (4 * C * R + TILE - 1) // TILE
    i = tl.program_id(0)
    if i < OWN:
        o = i * TILE + tl.arange(0, TILE)
        row = o // C
        k, r = row // WIDTH, row % WIDTH
        rows = tl.load(p_padded + (k * PITCH + r) * C + o % C, mask=o < 4 * WIDTH * C, other=0.0)
        tl.store(p_projection + o, rows.to(p_projection.dtype.element_ty), mask=o < 4 * WIDTH * C)
    elif i < OWN + CAST:
        o = (i - OWN) * TILE + tl.arange(0, TILE)
        copy(p_cast, p_dt, o, o < 4 * C * R)
    else:
        o = (i - OWN - CAST) * TILE + tl.arange(0, TILE)
        m = o < 4 * C * N
        logs = tl.load(p_dA + o, mask=m, other=0.0) * tl.load(p_A + o, mask=m, other=0.0)
        tl.store(p_logs + o, logs.to(p_logs.dtype.element_ty), mask=m)
