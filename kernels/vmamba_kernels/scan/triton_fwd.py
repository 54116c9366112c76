# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""The forward of the selective scan as one Triton kernel, and what both kernels are launched with.

A program walks along L for a block of channels of one group, in chunks of M segments of T steps. In a chunk each
thread runs its segments from zero, the ends of the segments are scanned, and each thread runs its segments again from
the state that they are now known to begin with: a step costs two multiply-adds and no shuffle. From chunk to chunk
goes only the state; the states between chunks are saved for the backward.

Law: tiles follow from the device generation and from what the row length and the strides are multiples of, never from a
measurement at run time, and nothing is added atomically: the same tensors give the same bits.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba_kernels.backend import interpreted
from vmamba_kernels.exponents import LOG2E, exp2
from vmamba_kernels.scan.steps import across, lane, load_steps, softplus, store_steps


class Tile(NamedTuple):
    """What a program holds at once: channels × segments × steps; the segments of a channel lie in one warp."""

    channels: int
    segments: int
    steps: int
    warps: int


class Tiles(NamedTuple):
    """The tiles of a device generation; both cover the same number of steps, the chunk."""

    forward: Tile
    backward: Tile

    @property
    def chunk(self) -> int:
        return self.forward.segments * self.forward.steps


# Chosen by registers and instructions a step of the compiled kernels. The backward's partial sums of B and C weigh
# 8 N / channels bytes an element, hence its wider tile.
DEFAULT = Tiles(Tile(8, 8, 8, 2), Tile(16, 8, 8, 4))
TABLE = {"sm_80": DEFAULT, "sm_90": DEFAULT}

INTEGERS = ["L", "C", "NT", "NB", "GROUPS", "s_n"] + [
    f"s{name}_{axis}"
    for name, axes in (("g", "bc"), ("u", "bc"), ("d", "bc"), ("B", "bkn"), ("C", "bkn"))
    for axis in axes
]


@triton.jit(do_not_specialize=INTEGERS)
def scan_forward(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_bias, p_y, p_states,
    L, C, NT, GROUPS, su_b, su_c, sd_b, sd_c, sB_b, sB_k, sB_n, sC_b, sC_k, sC_n, s_n,
    N: tl.constexpr, BC: tl.constexpr, M: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """L and all strides but s_n = N are in units of V steps. The states of M at a time share a tensor, one a lane."""
    NC = tl.cdiv(C, BC)
    i_c = tl.program_id(0) % NC
    i_k = tl.program_id(0) // NC % GROUPS
    i_b = (tl.program_id(0) // NC // GROUPS).to(tl.int64)
    o_in = i_c * BC + tl.arange(0, BC)[:, None]
    m_c = o_in < C
    o_c = (i_k * C + o_in).to(tl.int64)
    o_m = tl.arange(0, M)[None, :]
    o_d = i_b * (C * GROUPS) + o_c
    p_u += (i_b * su_b + o_c * su_c) * V
    p_delta += (i_b * sd_b + o_c * sd_c) * V
    p_B += (i_b * sB_b + i_k * sB_k + o_c * 0) * V
    p_C += (i_b * sC_b + i_k * sC_k + o_c * 0) * V
    p_y += o_d * L * V
    L = L * V
    b_D = tl.zeros((BC, 1), tl.float32)
    b_bias = tl.zeros((BC, 1), tl.float32)
    if HAS_D:
        b_D = tl.load(p_D + o_c, mask=m_c, other=0.0)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0)
    PACKS: tl.constexpr = (N + M - 1) // M
    carries = ()
    for _q in tl.static_range(PACKS):
        carries += (tl.zeros((BC, M), tl.float32),)
    for j in range(NT):
        u = load_steps(p_u, j, m_c, L, 0.0, BC, M, T, V)
        # Past the end delta must be 0, so that the state stays: softplus(-inf).
        z = load_steps(p_delta, j, m_c, L, float("-inf") if SOFTPLUS else 0.0, BC, M, T, V)
        d = ()
        du = ()
        y = ()
        b_sum = tl.zeros((BC, M), tl.float32)
        for i in tl.static_range(T):
            delta = z[i] + b_bias
            if SOFTPLUS:
                delta = softplus(delta, EXACT, FAST)
            elif HAS_BIAS:
                delta = tl.where(m_c & (j * (M * T) + o_m * T + i < L), delta, 0.0)
            b_sum += delta
            d += (delta,)
            du += (delta * u[i],)
            y += (b_D * u[i],)
        passed = ()
        for p in tl.static_range(PACKS):
            b_carry = carries[p]
            for n_p in range(min(M, N - p * M)):
                n = p * M + n_p
                b_A = tl.load(p_A + o_c * N + n, mask=m_c, other=0.0) * LOG2E
                b_B = load_steps(p_B + n * sB_n.to(tl.int64) * V, j, m_c, L, 0.0, BC, M, T, V)
                b_C = load_steps(p_C + n * sC_n.to(tl.int64) * V, j, m_c, L, 0.0, BC, M, T, V)
                a = ()
                h = tl.zeros((BC, M), tl.float32)
                for i in tl.static_range(T):
                    a += (exp2(d[i] * b_A, FAST),)
                    h = a[i] * h + du[i] * b_B[i]
                h, b_last = across(exp2(b_sum * b_A, FAST), h, lane(b_carry, n_p, BC, M), o_m, BC, M)
                b_carry = tl.where(o_m == n_p, b_last, b_carry)
                added = ()
                for i in tl.static_range(T):
                    h = a[i] * h + du[i] * b_B[i]
                    added += (y[i] + b_C[i] * h,)
                y = added
            passed += (b_carry,)
            o_n = p * M + o_m
            p_state = p_states + ((i_b * (NT - 1) + j) * (C * GROUPS) + o_c) * s_n + o_n
            tl.store(p_state, b_carry, mask=m_c & (o_n < N) & (j < NT - 1))
        carries = passed
        store_steps(p_y, y, j, m_c, L, BC, M, T, V)


def tiles(device: torch.device) -> Tiles:
    """Return the pinned tiles for a device; those of no generation in the table where it is unknown or no GPU."""
    if device.type != "cuda":
        return DEFAULT
    major, minor = torch.cuda.get_device_capability(device)
    return TABLE.get(f"sm_{major}{minor}", DEFAULT)


def empty_saved(u: Tensor, A: Tensor) -> Tensor:
    """Return room for the states between chunks of u (B, K*C, L): (B, chunks - 1, K*C, N) in float32."""
    batch, width, length = u.shape
    chunks = -(-length // tiles(u.device).chunk)
    return u.new_empty((batch, chunks - 1, width, A.shape[1]), dtype=torch.float32)


class Launch:
    """One call's tensors as the kernels read them, its sizes, and what the kernels are compiled for."""

    def __init__(
        self,
        rows: tuple[Tensor, ...],
        A: Tensor,
        groups: int,
        D: Tensor | None,
        delta_bias: Tensor | None,
        softplus: bool,
    ) -> None:
        self.rows = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in rows)
        self.batch, self.width, self.length = rows[0].shape
        self.groups, self.channels, self.state = groups, self.width // groups, A.shape[1]
        self.A = A.float().contiguous()
        # Never read where absent; a pointer of the same type keeps one signature.
        self.D = self.A if D is None else D.float().contiguous()
        self.bias = self.A if delta_bias is None else delta_bias.float().contiguous()
        self.tiles = tiles(self.A.device)
        self.unit = self._unit()
        exact = any(t.dtype == torch.float32 for t in rows)
        self.constants: dict[str, Any] = {
            "N": self.state,
            "V": self.unit,
            "HAS_D": D is not None,
            "HAS_BIAS": delta_bias is not None,
            "SOFTPLUS": softplus,
            "EXACT": exact,
            "FAST": not interpreted(),
        }

    def _strides(self) -> Iterator[int]:
        for t in self.rows:
            yield from (
                0 if size == 1 else stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)
            )

    def _unit(self) -> int:
        """Return the steps that one vector may hold: what divides the length and every stride, 1 if less than 4."""
        most = 16 // min(t.element_size() for t in self.rows)
        common = math.gcd(most, self.length, *self._strides())
        return common if common >= 4 else 1

    def sizes(self) -> dict[str, int]:
        """Return the kernels' integer arguments but the strides of rows."""
        return {
            "L": self.length // self.unit,
            "C": self.channels,
            "NT": -(-self.length // self.tiles.chunk),
            "GROUPS": self.groups,
            "s_n": self.state,
        }

    def strides(self, names: str) -> dict[str, int]:
        """Return the strides of rows, named in order by a letter each, in units."""
        of = [f"s{name}_{axis}" for name in names for axis in ("bkn" if name in "BC" else "bc")]
        return {name: stride // self.unit for name, stride in zip(of, self._strides(), strict=True)}

    def programs(self, tile: Tile) -> int:
        return self.batch * self.groups * -(-self.channels // tile.channels)

    def compiled_for(self, tile: Tile) -> dict[str, Any]:
        """Return constants and options of a launch with a tile."""
        shape = {"BC": tile.channels, "M": tile.segments, "T": tile.steps, "num_warps": tile.warps}
        return self.constants | shape


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, K*C, L) in u's dtype and the states between chunks, which the backward needs beside the inputs."""
    y, saved = u.new_empty(u.shape), empty_saved(u, A)
    if y.numel() == 0:
        return y, saved
    call = Launch((u, delta, B, C), A, B.shape[1], D, delta_bias, delta_softplus)
    tile = call.tiles.forward
    with torch.cuda.device_of(u):
        scan_forward[(call.programs(tile),)](
            *call.rows[:2],
            call.A,
            *call.rows[2:],
            call.D,
            call.bias,
            y,
            saved,
            **call.sizes(),
            **call.strides("udBC"),
            **call.compiled_for(tile),
        )
    return y, saved


# Half precision stands for both its formats; states beyond the lanes of a segment take one more tensor.
PINNED_STATES = (1, 16)
PINNED_UNITS = (("bf16", 8), ("bf16", 4), ("bf16", 1), ("fp32", 4), ("fp32", 1))
FLOAT32 = {"A", "D", "bias", "states", "dA", "dB", "dC", "dD", "dbias"}

Pinned = list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]


def pinned() -> Pinned:
    """Return name, kernel, types by argument, constants and options of each configuration that the table can choose."""
    names = ("u", "delta", "A", "B", "C", "D", "bias", "y", "states")
    return configurations(scan_forward, names, {choice.forward: None for choice in TABLE.values()})


def configurations(kernel: Any, pointers: tuple[str, ...], distinct: Iterable[Tile]) -> Pinned:
    """Return the entries of pinned(); pointers are meant as multiples of 16 bytes, as torch allocates."""
    entries: Pinned = []
    for tile, (dtype, unit), state in itertools.product(distinct, PINNED_UNITS, PINNED_STATES):
        shape = {"N": state, "BC": tile.channels, "M": tile.segments, "T": tile.steps, "V": unit}
        flags = {"HAS_D": True, "HAS_BIAS": True, "SOFTPLUS": True, "EXACT": dtype == "fp32", "FAST": True}
        types = {f"p_{name}": "*fp32" if name in FLOAT32 else f"*{dtype}" for name in pointers}
        types |= {name: "i32" for name in kernel.arg_names if name in INTEGERS}
        types |= dict.fromkeys(shape | flags, "constexpr")
        entries.append(
            (
                f"{kernel.__name__}-{dtype}-N{state}-V{unit}",
                kernel,
                types,
                shape | flags,
                {"num_warps": tile.warps},
            )
        )
    return entries
