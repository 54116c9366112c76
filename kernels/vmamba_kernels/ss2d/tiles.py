"""How the fused scan is cut: one pinned plan for each shape and device generation, never a race at run time.

The order of every float addition follows from the plan, hence the table: benchmarks/tune_ss2d.py measures on a GPU
and writes tiles.json. The batch has no say, so it never changes an image's bits.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_kernels.backend import generation
from vmamba_kernels.ss2d.order import scan_order

ROWS = 16
TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Plan:
    """Steps a segment (`span`) and a tile (1, 2 or 4, a divisor); of each kernel channels, warps and stages.

    `steps` are those of a tile of the gradients, before which the forward saves a state; `walked`, a multiple, those of
    the other kernels' tiles (0: the same).

    `ends` is the first walk of the forward and of the backward, `output` and `gradients` the second. Stages are the
    depth of the loads' pipeline: where segments turn, addresses are loaded too, so that 5 is the least that loads a
    tile ahead; where they are straight, 3 loads two ahead. Registers cap what a thread may hold, for more warps at
    once; 0: no cap.

    `apart`: the gradients keep dz, 4 elements for each of x, and what follows from it by products, the gradients of the
    projected time steps and of their weights, is made afterwards; for one state. Else they make partial sums of these.
    """

    span: int = 28
    steps: int = 2
    ends: int = 32
    output: int = 32
    gradients: int = 16
    ends_warps: int = 1
    output_warps: int = 1
    gradients_warps: int = 1
    ends_stages: int = 5
    output_stages: int = 5
    gradients_stages: int = 5
    output_registers: int = 0
    gradients_registers: int = 0
    walked: int = 0
    apart: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "walked", self.walked or self.steps)
        for name in ("steps", "walked"):
            steps = getattr(self, name)
            if steps not in (1, 2, 4) or self.span % steps:
                raise ValueError(f"{name}={steps}: use 1, 2 or 4, a divisor of span={self.span}")
        if self.walked % self.steps:
            raise ValueError(f"walked={self.walked}: use a multiple of steps={self.steps}")


class Key(NamedTuple):
    """What a plan depends on: device generation, channels C, length H * W, state N, bytes an element of x."""

    generation: str
    channels: int
    length: int
    state: int
    bytes: int


@lru_cache(maxsize=1)
def pinned_plans() -> dict[Key, Plan]:
    """Return the table of tiles.json."""
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return {Key(**{name: row[name] for name in Key._fields}): Plan(**row["plan"]) for row in rows}


def write_plans(plans: dict[Key, Plan]) -> None:
    """Write the table, sorted; what the tuner calls."""
    entries = [json.dumps(key._asdict() | {"plan": asdict(plan)}) for key, plan in sorted(plans.items())]
    TABLE.write_text("[\n  " + ",\n  ".join(entries) + "\n]\n")
    pinned_plans.cache_clear()


def default_plan(channels: int, length: int, state: int, itemsize: int) -> Plan:
    """Return the plan of a shape that the table does not name, after what was measured for those that it does.

    Short sequences are cut shorter, or there are fewer programs than the device can hold; a span that divides the
    length needs no masks. The gradients of 32 channels at once have registers for tiles of one step. Within the walk
    their products need more with the dt rank, a sixteenth of the channels: beyond 512 these come apart.
    """
    wanted = 28 if length >= 56 * 28 else 14 if length >= 7 * 14 else 7
    steps = 2 if length >= 392 else 1
    fitting = [n for n in range(wanted // 2, 2 * wanted + 1) if length % n == 0 and n % steps == 0]
    span = min(fitting, key=lambda n: abs(n - wanted), default=wanted)
    straight = math.isqrt(length) ** 2 == length and math.isqrt(length) % span == 0
    stages = 3 if straight else 5
    if itemsize > 2:
        return Plan(span, steps, ends=16, output=16, gradients=16, ends_stages=stages)
    found = Plan(span, steps, ends_stages=stages, output_stages=stages if steps == 1 else 5)
    if state > 1:
        return found
    capped = 168 if channels <= 768 else 0  # beyond, what is capped spills
    if steps == 1:
        walked = 2 if span % 2 == 0 else 1
        found = replace(found, walked=walked, output_registers=capped, gradients=32, gradients_stages=6)
    if channels > 512:
        registers = capped if steps == 1 else 0
        found = replace(found, apart=True, gradients_stages=stages, gradients_registers=registers)
    return found


def padded(width: int) -> int:
    """Return the columns of a direction's projection with its filling: so that each direction's begin at 16 bytes."""
    return -(-width // 8) * 8


def plan_for(x: Tensor, state: int) -> Plan:
    """Return the plan for x (B, H, W, C) and N states."""
    # int: a size that torch.compile traces as a symbol is fixed here.
    height, width, channels = (int(n) for n in x.shape[1:])
    key = Key(generation(x.device), channels, height * width, state, x.element_size())
    return pinned_plans().get(key) or default_plan(*key[1:])


class Walk(NamedTuple):
    """The token that each direction visits at each step, int32 (4, S * span), and S, the segments of an image."""

    order: Tensor
    segments: int
    straight: bool  # no segment turns: each direction has one stride for all of its steps


@lru_cache(maxsize=256)
def walk_table(pattern: str, height: int, width: int, span: int, device: torch.device) -> Walk:
    """Return the walk of an image cut into segments of `span` steps.

    Where a sequence does not fill its last segment the token is -1: at the end, and for a direction that walks
    another backwards at the beginning, so that both have the same tokens in the same segment.
    """
    order = scan_order(pattern, height, width)
    count = -(-order.shape[1] // span)
    padded = order.new_full((4, count * span), -1)
    padded[:, : order.shape[1]] = order
    if mirrored(pattern):
        padded[2:] = padded[:2].flip(1)
    strides = padded.view(4, count, span).diff(dim=2)
    straight = bool(span > 1 and (padded >= 0).all() and (strides == strides[:, :1, :1]).all())
    return Walk(padded.to(torch.int32).to(device), count, straight)


def mirrored(pattern: str) -> bool:
    """Return whether directions 2 and 3 are directions 0 and 1 walked backwards."""
    return pattern != "unidi"
