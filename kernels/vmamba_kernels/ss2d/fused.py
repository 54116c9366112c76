# mypy: allow-untyped-calls
"""The host's side of the fused scan: memory, launches and the last sums of the Triton kernels.

No tensor of size (B, 4 C, L) exists: beside inputs and outputs there are the states between segments and tiles, and
partial sums of the parameters' gradients.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from vmamba_kernels.backend import interpreted, overlaps_launches
from vmamba_kernels.launch import launch
from vmamba_kernels.ss2d.tiles import ROWS, Plan, mirrored, padded, plan_for, walk_table
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

# What is launched here, by its name.
KERNELS = (
    "ss2d_ends",
    "ss2d_carry",
    "ss2d_output",
    "ss2d_adjoint_ends",
    "ss2d_gradients",
    "ss2d_projected_sum",
    "ss2d_projected_product",
    "ss2d_weight_product",
    "ss2d_parameter_sum",
    "ss2d_weights",
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_CARRY_CHANNELS = 64
_SUM_TILE = 1024
PARAMETER_TILE = {"AT_ONCE": 128, "TILE": 32, "num_warps": 4}
PRODUCT_TILE = {"TILE": 64, "CHANNELS": 64, "STAGES": 4, "num_warps": 4}  # tokens, channels
_BLOCKS_AT_ONCE = 16
WEIGHT_TILE = {"TILE": 1024, "num_warps": 4}
_WEIGHT_GROUP = 1024  # tokens of one partial sum of the time steps' weights' gradient
_FEW_TOKENS = 16  # fewer are summed in float32


def _power_of_two(n: int) -> int:
    return max(16, int(triton.next_power_of_2(n)))


def options(plan: Plan, kernel: str) -> dict[str, int]:
    """Return what of a plan goes to the compiler of `kernel`: ends, output or gradients."""
    stages = getattr(plan, f"{kernel}_stages")
    found = {"STAGES": stages, "num_warps": getattr(plan, f"{kernel}_warps"), "num_stages": stages}
    registers = getattr(plan, f"{kernel}_registers", 0)
    return found | ({"maxnreg": registers} if registers else {})


def partial_is_wide(state: int, length: int) -> bool:
    """Whether the partial sums of the projection's gradient are float32 where x has 16 bits.

    One addition a state would round 16-bit numbers again and again. Of a few tokens they cost nothing in float32, and
    no mean over many hides what rounding does to one.
    """
    return state > 1 or length < _FEW_TOKENS


def sum_is_wide(dtype: torch.dtype, state: int) -> bool:
    """Whether y and dx, which four walks add up, have a float32 sum beside them while they do.

    bfloat16 has float32's range. It is rounded three times more then, each time what the scan adds to the skip, and
    L2, which limits these kernels, carries a quarter less. Half of y may pass float16's range where y does not.
    """
    return dtype != torch.float32 and (dtype == torch.float16 or state > 1)


def carry_options(channels: int, segments: int) -> dict[str, int]:
    """Return how a sequence's segments are linked: 64 at once where there are many, else 16 or what there is."""
    at_once, warps = (64, 4) if segments > 128 else (min(16, int(triton.next_power_of_2(segments))), 1)
    return {
        "CHANNELS": min(_CARRY_CHANNELS, _power_of_two(channels)),
        "SEGMENTS": at_once,
        "STAGES": 3,
        "num_warps": warps,
    }


def empty_saved(x: Tensor, A: Tensor) -> Tensor:
    """Return room for the states before each tile, (4, B * S, tiles a segment, N, C).

    In bfloat16 where x is. A state that float16 cannot hold can still give a y that it can: there they are float32.
    """
    batch, height, width, channels = x.shape
    plan = plan_for(x, A.shape[1])
    count = -(-int(height) * int(width) // plan.span)
    shape = (4, batch * count, plan.span // plan.steps, A.shape[1], channels)
    return x.new_empty(shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)


def weights(
    x_proj: Tensor, dt_proj: Tensor, a_logs: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_proj with rows of zeros (4*P, C) and dt_proj, both in dtype, and A = -exp(a_logs) in float32."""
    width = dt_proj.shape[-1] + 2 * a_logs.shape[1]
    return _weights((x_proj, dt_proj, a_logs), None, (width, padded(width)), dtype)


def weight_gradients(
    d_x_proj: Tensor, d_dt_proj: Tensor, d_A: Tensor, A: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of what weights was given, the first two in dtype, of those of what it returned."""
    width = d_dt_proj.shape[-1] + 2 * A.shape[1]
    return _weights((d_x_proj, d_dt_proj, d_A), A, (d_x_proj.shape[0] // 4, width), dtype)


def _weights(
    given: tuple[Tensor, Tensor, Tensor], A: Tensor | None, rows: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ss2d_weights: backward where it gets an A. `rows` of a direction there are, and come out."""
    x_proj, dt_proj, a = (t.contiguous() for t in given)
    found = (
        torch.empty((4 * rows[1], x_proj.shape[1]), dtype=dtype, device=x_proj.device),
        torch.empty_like(dt_proj, dtype=dtype),
        torch.empty_like(a, dtype=torch.float32),
    )
    constants = {
        "C": x_proj.shape[1],
        "R": dt_proj.shape[-1],
        "N": a.shape[1],
        "FROM": rows[0],
        "TO": rows[1],
        "BACKWARD": A is not None,
        **WEIGHT_TILE,
    }
    programs = sum(-(-t.numel() // WEIGHT_TILE["TILE"]) for t in found)
    with torch.cuda.device_of(x_proj):
        factor = a if A is None else A.contiguous()
        launch(ss2d_weights, (programs,), (x_proj, dt_proj, a, factor, *found), constants)
    return found


class _Problem:
    """One call's sizes, inputs laid out as the kernels read them, and the constants they are compiled for."""

    def __init__(
        self,
        x: Tensor,
        projected: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        pattern: str,
    ) -> None:
        self.batch, self.height, self.width, self.channels = x.shape
        self.length = self.height * self.width
        self.rank, self.state = dt_weight.shape[2], A.shape[1]
        self.pitch = projected.shape[3] // 4
        self.plan: Plan = plan_for(x, self.state)
        self.order, self.count, straight = walk_table(
            pattern, self.height, self.width, self.plan.span, x.device
        )
        self.rows = self.batch * self.count
        self.groups = -(-self.rows // ROWS)
        self.x = x.contiguous()
        self.projected = projected.to(x.dtype).contiguous()
        self.weight = dt_weight.to(x.dtype).contiguous()
        self.bias, self.A = dt_bias.float().contiguous(), A.float().contiguous()
        self.skip = D.float().contiguous()
        self.partial_dtype = torch.float32 if partial_is_wide(self.state, self.length) else x.dtype
        self.mirror = {"MIRROR": mirrored(pattern)}
        exact = x.dtype == torch.float32
        self.constants: dict[str, Any] = {
            "C": self.channels,
            "R": self.rank,
            "N": self.state,
            "PITCH": self.pitch,
            "RP": _power_of_two(self.rank),
            "SPAN": self.plan.span,
            "STEPS": self.plan.steps,
            "FULL": self.length % self.plan.span == 0 and self.rows % ROWS == 0,
            "WIDE": max(x.numel(), projected.numel()) >= 2**31,
            "STRAIGHT": straight,
            "EXACT": exact,
            "INTERPRET": interpreted(),
            "PAIRED": self.state == 1
            and self.rank % 2 == self.pitch % 2 == 0
            and x.element_size() == 2
            # A view may begin between two words.
            and self.projected.data_ptr() % 4 == 0
            and not interpreted(),
            "PRECISION": "ieee" if exact else "tf32",
        }
        self.carry_constants = {
            "C": self.channels,
            "N": self.state,
            **carry_options(self.channels, self.count),
        }
        self.apart = self.plan.apart and self.state == 1
        self.product_constants = {
            **{name: self.constants[name] for name in ("C", "R", "PITCH", "INTERPRET", "PRECISION")},
            **PRODUCT_TILE,
        }
        self.inputs = (self.projected, self.weight, self.bias, self.A)
        self.sizes = (self.length, self.count, self.rows)

    def early(self, *, follows: bool = True) -> dict[str, int]:
        """Return how a launch overlaps with its neighbours.

        One that reads weights before it waits must follow another of ours: what is before that may have made them.
        """
        if not overlaps_launches(self.x.device):
            return {"EARLY": 0}
        return {"EARLY": 2, "launch_pdl": True} if follows else {"EARLY": 1}

    def grid(self, channels: int) -> int:
        return self.groups * -(-self.channels // channels)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def sum_and_result(self) -> tuple[Tensor, Tensor]:
        """Return where four walks add up a result like x, and the result: one tensor, or a float32 sum beside it."""
        result = torch.empty_like(self.x)
        return (self.new(*self.x.shape) if sum_is_wide(self.x.dtype, self.state) else result), result

    def starts(self, kernel: Any, walked: Tensor, reverse: bool) -> Tensor | None:
        """Walk every segment from zero and link them; None where a segment is a whole sequence and starts at zero."""
        if self.count == 1:
            return None
        plan = self.plan
        # An image's last segment hands nothing on: fewer rows, and whether they fill all programs is asked anew.
        wanted = self.rows - self.batch
        full = self.length % plan.span == 0 and wanted % ROWS == 0
        ends, decays, starts = (self.new(4, self.rows, self.state, self.channels) for _ in range(3))
        blocks = -(-self.channels // self.carry_constants["CHANNELS"])
        with torch.cuda.device_of(self.x):
            launch(
                kernel,
                (-(-wanted // ROWS) * -(-self.channels // plan.ends), 4),
                (walked, *self.inputs, self.order, ends, decays, *self.sizes),
                {**self.constants, "FULL": full, "STEPS": plan.walked, "CHANNELS": plan.ends,
                 **options(plan, "ends"), **self.early()},
            )  # fmt: skip
            launch(
                ss2d_carry,
                (self.batch * blocks, 4, self.state),
                (ends, decays, starts, self.count, self.rows),
                {**self.carry_constants, "REVERSE": reverse, **self.early()},
            )
        return starts


def forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, H, W, C) in x's dtype and, where asked to save, the states that the backward begins with."""
    saved = empty_saved(x, A) if save else x.new_empty(0)
    if x.numel() == 0:
        return x.new_empty(x.shape), saved
    p = _Problem(x, projected, dt_weight, dt_bias, A, D, pattern)
    starts = p.starts(ss2d_ends, p.x, reverse=False)
    total, y = p.sum_and_result()
    for axis in range(2):
        with torch.cuda.device_of(x):
            begins = p.x if starts is None else starts
            launch(
                ss2d_output,
                (p.grid(p.plan.output),),
                (p.x, *p.inputs, p.skip, p.order, begins, saved, total, y, *p.sizes, axis),
                {**p.constants, **p.mirror, "STEPS": p.plan.walked, "EVERY": p.plan.steps, "CHANNELS": p.plan.output,
                 "CARRIED": starts is not None, "SAVE": save,
                 "FIRST": axis == 0, **options(p.plan, "output"),
                 **p.early(follows=axis == 1 or starts is not None)},
            )  # fmt: skip
    return y, saved


def backward(
    grad_y: Tensor,
    saved: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
) -> Gradients:
    """Return the gradients of x, projected, dt_weight, dt_bias, A and D, each in its tensor's dtype."""
    inputs = (x, projected, dt_weight, dt_bias, A, D)
    if x.numel() == 0:
        d = [torch.zeros_like(t) for t in inputs]
        return d[0], d[1], d[2], d[3], d[4], d[5]
    p = _Problem(*inputs, pattern)
    g = grad_y.to(x.dtype).contiguous()
    starts = p.starts(ss2d_adjoint_ends, g, reverse=True)
    blocks = -(-p.channels // p.plan.gradients)
    total, dx = p.sum_and_result()
    apart = p.apart
    tokens = p.batch * p.length
    if apart:  # dz, and sums of dB and dC
        dp, d_BC = p.new(4, *x.shape, dtype=x.dtype), p.new(4, blocks, tokens, 2)
    else:
        dp = d_BC = p.new(blocks, *projected.shape, dtype=p.partial_dtype)
    # One row of dt_weight's and dt_bias's, and one of A's and D's, a group.
    weight_groups = -(-tokens // _WEIGHT_GROUP) if apart else p.groups
    widths = dt_weight.numel() + dt_bias.numel(), A.numel() + p.channels
    d_weights, d_others = p.new(weight_groups, widths[0]), p.new(p.groups, widths[1])
    for axis in range(2):
        with torch.cuda.device_of(x):
            begins = g if starts is None else starts
            launch(
                ss2d_gradients,
                (p.grid(p.plan.gradients),),
                (g, p.x, *p.inputs, p.skip, p.order, begins, saved, total, dx, dp, d_BC, d_weights, d_others,
                 *p.sizes, axis),
                {**p.constants, **p.mirror, "PP": 8 if apart else _power_of_two(p.pitch), "CHANNELS": p.plan.gradients,
                 "CARRIED": starts is not None, "FIRST": axis == 0, "APART": apart,
                 **options(p.plan, "gradients"), **p.early(follows=axis == 1 or starts is not None)},
            )  # fmt: skip
    d_projected = torch.empty_like(p.projected)
    d_weight, d_bias, d_A, d_D = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[2:]
    )
    with torch.cuda.device_of(x):
        if apart:
            launch(
                ss2d_projected_product,
                (-(-tokens // PRODUCT_TILE["TILE"]), 4),
                (dp, d_BC, p.weight, d_projected, tokens),
                {**p.product_constants, "PP": _power_of_two(p.pitch), "BLOCKS": blocks,
                 "AT_ONCE": _BLOCKS_AT_ONCE, **p.early()},
            )  # fmt: skip
            launch(
                ss2d_weight_product,
                (-(-p.channels // PRODUCT_TILE["CHANNELS"]), 4, weight_groups),
                (dp, p.projected, d_weights, tokens),
                {**p.product_constants, "RP": _power_of_two(p.rank + 1), "GROUP": _WEIGHT_GROUP, **p.early()},
            )
        else:
            launch(
                ss2d_projected_sum,
                (-(-d_projected.numel() // _SUM_TILE),),
                (dp, d_projected, d_projected.numel()),
                {
                    "BLOCKS": blocks,
                    "PITCH": p.pitch,
                    "R": p.rank,
                    "N": p.state,
                    "TILE": _SUM_TILE,
                    "num_warps": 4,
                    **p.early(),
                },
            )
        launch(
            ss2d_parameter_sum,
            (sum(-(-width // PARAMETER_TILE["TILE"]) for width in widths),),
            (d_weights, d_others, d_weight, d_bias, d_A, d_D, weight_groups, p.groups),
            {"C": p.channels, "R": p.rank, "N": p.state, **PARAMETER_TILE, **p.early()},
        )
    return dx, d_projected.to(projected.dtype), d_weight, d_bias, d_A, d_D
