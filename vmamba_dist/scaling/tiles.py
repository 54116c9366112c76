"""How the fused scan will be cut on a GPU, read from the kernels' own table without importing them or torch.

Law: the table is vmamba_kernels/ss2d/tiles.json; the rule for shapes that it does not name is that of
vmamba_kernels/ss2d/tiles.py, repeated here because reading that module loads torch. A test compares the two.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Cut(NamedTuple):
    """Steps a segment and a tile, channels that a program of the backward takes, and whether it keeps dz."""

    span: int
    steps: int
    channels: int
    apart: bool


def cut(generation: str, channels: int, length: int, state: int, element: int) -> Cut:
    """Return the cut of a scan over `length` tokens, for a device generation (sm_90) and bytes an element."""
    named = _table().get((generation, channels, length, state, element))
    return _default(channels, length, state, element) if named is None else named


def _default(channels: int, length: int, state: int, element: int) -> Cut:
    wanted = 28 if length >= 56 * 28 else 14 if length >= 7 * 14 else 7
    steps = 2 if length >= 392 else 1
    fitting = [n for n in range(wanted // 2, 2 * wanted + 1) if length % n == 0 and n % steps == 0]
    half = state == 1 and element == 2
    span = min(fitting, key=lambda n: abs(n - wanted), default=wanted)
    return Cut(span, steps, 32 if half and steps == 1 else 16, half and channels > 512)


@cache
def _table() -> dict[tuple[str, int, int, int, int], Cut]:
    package = importlib.util.find_spec("vmamba_kernels")
    assert package is not None
    assert package.origin is not None
    rows = json.loads((Path(package.origin).parent / "ss2d" / "tiles.json").read_text(encoding="utf-8"))
    return {
        tuple(row[key] for key in ("generation", "channels", "length", "state", "bytes")): Cut(
            *(row["plan"][name] for name in ("span", "steps", "gradients", "apart"))
        )
        for row in rows
    }
