# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Powers and logarithms of two, as the hardware has them, for every Triton kernel here.

FAST is the bare instruction of the special-function unit; without it, as in the interpreter, Triton's own function.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2**x to 2 ulp; a denormal result is 0."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """The logarithm to base 2; its absolute error near 1 is 2**-22."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x to 1 ulp; a denormal result is 0."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def widen(x, FAST: tl.constexpr):
    """x in float32; a bfloat16 by one instruction, whichever half of a register it is, where Triton takes three."""
    if FAST and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }",
            "=r,h",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr, FAST: tl.constexpr):
    """x, float32, rounded to a type of 16 bits.

    Not is_pure, so that Triton looks no further: where a product's operand was put together by tl.join before this,
    it would take the operand for one unpacked from half the bits, and ask for a layout that costs shuffles.
    """
    if FAST and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    elif FAST and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=False, pack=2
        )
    else:
        return x.to(dtype)
