# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""Triton functions that both kernels of the selective scan share: softplus, steps in registers, segments in lanes.

A tile of a chunk is BC channels × M segments of T steps. It is T tensors [BC, M], one a step: a thread holds the T
steps of its segments in registers, and the M segments of a channel lie side by side in the lanes of one warp. Steps
are loaded by vectors along L and taken apart by renaming registers; nothing goes through shared memory.
"""

import triton
import triton.language as tl

from vmamba_kernels.exponents import LN2, LOG2E, exp2, log2

# 2 atanh(s) / s = 2 + P1 s^2 + P2 s^4 + P3 s^6 + P4 s^8 to 2e-8 for s <= 1/3.
P1 = tl.constexpr(0.6666663885116577)
P2 = tl.constexpr(0.40007561445236206)
P3 = tl.constexpr(0.28236618638038635)
P4 = tl.constexpr(0.2685149908065796)


@triton.jit
def softplus(z, EXACT: tl.constexpr, FAST: tl.constexpr):
    """log(1 + exp(z)).

    EXACT takes log(1 + e) as 2 atanh(e / (2 + e)), a polynomial: the logarithm of the rounded 1 + e is off by
    up to 6e-5 where e is small, which only half-precision inputs hide.
    """
    e = exp2(-tl.abs(z) * LOG2E, FAST)
    if EXACT:
        s = e / (2.0 + e)
        t = s * s
        p = t * P4 + P3
        p = p * t + P2
        p = p * t + P1
        return s * (p * t + 2.0) + tl.maximum(z, 0.0)
    else:
        return log2(1.0 + e, FAST) * LN2 + tl.maximum(z, 0.0)


@triton.jit
def slope(z, delta, EXACT: tl.constexpr, FAST: tl.constexpr):
    """The derivative of delta = softplus(z)."""
    if EXACT:
        e = exp2(-tl.abs(z) * LOG2E, FAST)
        return tl.where(z >= 0, 1.0, e) / (1.0 + e)
    else:
        return 1.0 - exp2(-delta * LOG2E, FAST)


@triton.jit
def unstack(x, BC: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """Step i of every segment, [BC, M], for the W steps of x [BC, M*W]: registers of the thread that loaded them."""
    if W == 1:
        return (x,)
    elif W == 2:
        return tl.split(tl.reshape(x, (BC, M, 2)))
    elif W == 4:
        even, odd = tl.split(tl.reshape(x, (BC, M, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return (x0, x1, x2, x3)
    else:
        tl.static_assert(W == 8)
        even, odd = tl.split(tl.reshape(x, (BC, M, 2, 2, 2)))
        even0, even1 = tl.split(even)
        odd0, odd1 = tl.split(odd)
        x0, x4 = tl.split(even0)
        x2, x6 = tl.split(even1)
        x1, x5 = tl.split(odd0)
        x3, x7 = tl.split(odd1)
        return (x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def stack(x, FIRST: tl.constexpr, BC: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """x[FIRST : FIRST + W], each [BC, M], as [BC, M*W]: unstack undone."""
    if W == 1:
        return x[FIRST]
    elif W == 2:
        return tl.reshape(tl.join(x[FIRST], x[FIRST + 1]), (BC, M * 2))
    elif W == 4:
        even = tl.join(x[FIRST], x[FIRST + 2])
        odd = tl.join(x[FIRST + 1], x[FIRST + 3])
        return tl.reshape(tl.join(even, odd), (BC, M * 4))
    else:
        tl.static_assert(W == 8)
        even = tl.join(tl.join(x[FIRST], x[FIRST + 4]), tl.join(x[FIRST + 2], x[FIRST + 6]))
        odd = tl.join(tl.join(x[FIRST + 1], x[FIRST + 5]), tl.join(x[FIRST + 3], x[FIRST + 7]))
        return tl.reshape(tl.join(even, odd), (BC, M * 8))


@triton.jit
def load_steps(p_row, j, m_c, L, other, BC: tl.constexpr, M: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """The T steps of every segment of chunk j, [BC, M] each and float32, of the rows at p_row [BC, 1].

    A thread loads W steps at once: 16 bytes where V, what L and all strides are a multiple of, allows.
    """
    W: tl.constexpr = T if V == 1 else min(V, T, 128 // p_row.dtype.element_ty.primitive_bitwidth)
    o_w = tl.arange(0, M * W)[None, :]
    steps = ()
    for i in tl.static_range(T // W):
        o_t = j * (M * T) + (o_w // W * T + (o_w % W + i * W))
        b_x = tl.load(p_row + o_t, mask=m_c & (o_t < L), other=other)
        steps = steps + unstack(b_x.to(tl.float32), BC, M, W)
    return steps


@triton.jit
def store_steps(p_row, steps, j, m_c, L, BC: tl.constexpr, M: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    W: tl.constexpr = T if V == 1 else min(V, T, 128 // p_row.dtype.element_ty.primitive_bitwidth)
    o_w = tl.arange(0, M * W)[None, :]
    for i in tl.static_range(T // W):
        o_t = j * (M * T) + (o_w // W * T + (o_w % W + i * W))
        b_x = stack(steps, i * W, BC, M, W).to(p_row.dtype.element_ty)
        tl.store(p_row + o_t, b_x, mask=m_c & (o_t < L))


@triton.jit
def follow(a1, h1, a2, h2):
    """The map x -> a1 x + h1 and after it x -> a2 x + h2."""
    return a1 * a2, a2 * h1 + h2


@triton.jit
def lane(x, index, BC: tl.constexpr, M: tl.constexpr):
    """Column index of x [BC, M], in every column."""
    return tl.gather(x, tl.zeros((BC, M), tl.int32) + index, 1)


@triton.jit
def across(b_decay, b_end, b_carry, o_m, BC: tl.constexpr, M: tl.constexpr):
    """The state before each segment, and the one after the last in every column, from their decays and own ends."""
    first = o_m == 0
    b_end = tl.where(first, b_decay * b_carry + b_end, b_end)
    _through, b_after = tl.associative_scan((b_decay, b_end), 1, follow)
    before = tl.maximum(o_m - 1, 0) + tl.zeros((BC, M), tl.int32)
    b_before = tl.where(first, b_carry, tl.gather(b_after, before, 1))
    return b_before, lane(b_after, M - 1, BC, M)


@triton.jit
def across_back(b_decay, b_end, b_carry, o_m, BC: tl.constexpr, M: tl.constexpr):
    """across from right to left: what comes in from behind each segment, and what goes out before the first."""
    first = o_m == 0
    zero = tl.zeros((BC, M), tl.int32)
    turned = zero + (M - 1 - o_m)
    b_decay = tl.gather(b_decay, turned, 1)
    b_end = tl.gather(b_end, turned, 1)
    b_end = tl.where(first, b_decay * b_carry + b_end, b_end)
    _through, b_after = tl.associative_scan((b_decay, b_end), 1, follow)
    b_in = tl.gather(b_after, zero + tl.maximum(M - 2 - o_m, 0), 1)
    return tl.where(o_m == M - 1, b_carry, b_in), lane(b_after, M - 1, BC, M)
