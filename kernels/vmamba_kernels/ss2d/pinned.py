"""Every configuration the fused scan is compiled for ahead of time: the table's rows, and the default plans' shapes.

What a launch would pass is written here a second time, so that a kernel can be compiled, and its registers counted,
without a GPU; a test holds the two equal.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from vmamba_kernels.ss2d import tiles
from vmamba_kernels.ss2d.fused import (
    _BLOCKS_AT_ONCE,
    _SUM_TILE,
    _WEIGHT_GROUP,
    PARAMETER_TILE,
    PRODUCT_TILE,
    WEIGHT_TILE,
    _power_of_two,
    carry_options,
    options,
    sum_is_wide,
)
from vmamba_kernels.ss2d.tiles import ROWS, Plan
from vmamba_kernels.ss2d.triton_bwd import (
    ss2d_adjoint_ends,
    ss2d_gradients,
    ss2d_parameter_sum,
    ss2d_projected_product,
    ss2d_projected_sum,
    ss2d_weight_product,
)
from vmamba_kernels.ss2d.triton_fwd import ss2d_carry, ss2d_ends, ss2d_output
from vmamba_kernels.ss2d.triton_weights import ss2d_weights

Configuration = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]
# Channels, dt rank and length of VMamba-T's stages at 224 pixels.
STAGES = ((96, 6, 3136), (192, 12, 784), (384, 24, 196), (768, 48, 49))
FLOAT32 = (
    "p_a",
    "p_new_a",
    "p_bias",
    "p_A",
    "p_D",
    "p_ends",
    "p_decays",
    "p_weights",
    "p_others",
    "p_dbias",
    "p_dA",
    "p_dD",
)
PARTIAL = (
    "p_dp",
    "p_dBC",
)  # float32 where partial_is_wide says so; of no shape here is a sequence that short
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pinned() -> list[Configuration]:
    """Return name, kernel, types by argument, constants and compiler's options of each configuration, none twice.

    An integer argument that is 1 at run time is a constant, as Triton makes it one. A table's row is named by its
    device generation.
    """
    found: dict[tuple[str, str], Configuration] = {}
    for configuration in _all():
        name, kernel, types, constants, chosen = configuration
        generation = next((word for word in name.split() if word.startswith("sm_")), "")
        same = f"{kernel.__name__} {types} {constants} {chosen}"
        if ("", same) not in found:  # one of no generation is compiled for all
            found.setdefault((generation, same), configuration)
    return list(found.values())


def _all() -> Iterator[Configuration]:
    for channels, rank, length in STAGES:
        yield from configurations(
            "", channels, rank, length, 1, "bf16", tiles.default_plan(channels, length, 1, 2)
        )
    yield from configurations("", 96, 6, 3136, 1, "fp32", tiles.default_plan(96, 3136, 1, 4))
    yield from _carries("C96 N1, 2048 segments", 96, 1, "bf16", 2048)
    yield from configurations("", 192, 6, 3136, 16, "bf16", tiles.default_plan(192, 3136, 16, 2))
    for key, plan in tiles.pinned_plans().items():
        # VMamba's dt rank is a sixteenth of a block's width, which v0 (N > 1) expands to twice as many channels.
        rank = -(-key.channels // (16 if key.state == 1 else 32))
        dtype = "bf16" if key.bytes == 2 else "fp32"
        yield from configurations(
            f"{key.generation} ", key.channels, rank, key.length, key.state, dtype, plan
        )


def configurations(
    prefix: str, channels: int, rank: int, length: int, state: int, dtype: str, plan: Plan
) -> Iterator[Configuration]:
    """Yield each kernel of one shape, in training and in inference, for batches that fill the last tile and do not."""
    count = -(-length // plan.span)
    width = rank + 2 * state
    pitch = tiles.padded(width)

    def fills(segments: int) -> list[bool]:
        """Whether so many segments an image fill all rows, for the batches that there may be."""
        whole = length % plan.span == 0
        return [True] * whole + [False] * (not whole or segments % ROWS > 0)

    exact = dtype == "fp32"
    apart = plan.apart and state == 1
    shape = f"{prefix}{dtype} C{channels} R{rank} N{state} L{length}"
    side = math.isqrt(length)
    straight = side % plan.span == 0
    tails = {True: "full", False: "part"}
    always: dict[str, Any] = {
        "C": channels,
        "R": rank,
        "N": state,
        "RP": _power_of_two(rank),
        "PITCH": pitch,
        "PP": _power_of_two(pitch),
        "SPAN": plan.span,
        "STEPS": plan.steps,
        "MIRROR": True,
        "WIDE": False,
        "STRAIGHT": straight,
        "EXACT": exact,
        "INTERPRET": False,
        "PRECISION": "ieee" if exact else "tf32",
        "CARRIED": count > 1,
        "PAIRED": state == 1 and rank % 2 == 0 and DTYPES[dtype].itemsize == 2,
    } | ({"S": 1} if count == 1 else {})
    for full in fills(count - 1) if count > 1 else []:
        ends = always | {"STEPS": plan.walked, "CHANNELS": plan.ends, "FULL": full}
        for kernel in (ss2d_ends, ss2d_adjoint_ends):
            yield _one(f"{shape} {tails[full]}", kernel, dtype, ends, options(plan, "ends"))
    for full in fills(count):
        common, tail = always | {"FULL": full}, tails[full]
        for first in (True, False):
            axis = {"FIRST": first} | ({} if first else {"axis": 1})
            name = f"{shape} {tail} {'first' if first else 'second'}"
            output = common | axis | {"STEPS": plan.walked, "EVERY": plan.steps, "CHANNELS": plan.output}
            for save in (True, False):
                case = f"{name} {'training' if save else 'inference'}"
                yield _one(case, ss2d_output, dtype, output | {"SAVE": save}, options(plan, "output"))
            gradients = common | axis | {"CHANNELS": plan.gradients, "APART": apart}
            gradients |= {"PP": 8} if apart else {}
            yield _one(name, ss2d_gradients, dtype, gradients, options(plan, "gradients"))
    blocks = -(-channels // plan.gradients)
    if apart:
        product = always | PRODUCT_TILE
        chosen = {"num_warps": product.pop("num_warps"), "STAGES": product.pop("STAGES")}
        wide = {"PP": _power_of_two(pitch), "BLOCKS": blocks, "AT_ONCE": _BLOCKS_AT_ONCE}
        yield _one(shape, ss2d_projected_product, dtype, product | wide, chosen)
        group = {"RP": _power_of_two(rank + 1), "GROUP": _WEIGHT_GROUP}
        yield _one(shape, ss2d_weight_product, dtype, product | group, chosen)
    else:
        summed = {"BLOCKS": blocks, "PITCH": pitch, "R": rank, "N": state, "TILE": _SUM_TILE}
        yield _one(shape, ss2d_projected_sum, dtype, summed, {"num_warps": 4})
    sizes = {"C": channels, "R": rank, "N": state}
    summed = sizes | PARAMETER_TILE
    yield _one(shape, ss2d_parameter_sum, dtype, summed, {"num_warps": summed.pop("num_warps")})
    for case, there, comes in (("forward", width, pitch), ("backward", pitch, width)):
        made = sizes | {"FROM": there, "TO": comes, "BACKWARD": case == "backward"} | WEIGHT_TILE
        yield _one(f"{shape} {case}", ss2d_weights, dtype, made, {"num_warps": made.pop("num_warps")})
    if count > 1:
        yield from _carries(shape, channels, state, dtype, count)


def _carries(shape: str, channels: int, state: int, dtype: str, count: int) -> Iterator[Configuration]:
    for reverse in (False, True):
        constants = {
            "C": channels,
            "N": state,
            "REVERSE": reverse,
            **carry_options(channels, count),
        }
        chosen = {"num_warps": constants.pop("num_warps")}
        yield _one(f"{shape} {'reverse' if reverse else 'forward'}", ss2d_carry, dtype, constants, chosen)


def _one(
    case: str, kernel: Any, dtype: str, constants: dict[str, Any], chosen: dict[str, int]
) -> Configuration:
    names = kernel.arg_names
    chosen = dict(chosen)
    if "STAGES" in chosen:
        constants = constants | {"STAGES": chosen.pop("STAGES")}
    constants = {name: value for name, value in ({"EARLY": 0} | constants).items() if name in names}
    types = {name: _type(name, dtype, constants) for name in names if name not in constants}
    return f"{kernel.__name__} {case}", kernel, types, constants, chosen


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if not name.startswith("p_"):
        return "i32"
    if name == "p_order":
        return "*i32"
    parameters = ("p_new_rows", "p_new_dt") if constants.get("BACKWARD") else ("p_rows", "p_dt")
    if (
        name in FLOAT32
        or name in parameters
        or (name == "p_dBC" and constants.get("APART", True))
        or (name in PARTIAL and constants["N"] > 1)
        or (name == "p_sum" and sum_is_wide(DTYPES[dtype], constants["N"]))
        or (name == "p_starts" and constants.get("CARRIED", True))
    ):
        return "*fp32"
    return f"*{dtype}"
