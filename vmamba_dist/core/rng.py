"""Randomness that is derived, never stored: a number is a function of who asks, not of how often.

Law: the same (seed, counters…) give the same values on every device, world size, worker and attempt.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def tag(name: str) -> int:
    """A stable number for a name, to keep the streams of different users apart."""
    return zlib.crc32(name.encode())


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A NumPy generator for (seed, key…), for draws on the host."""
    return np.random.default_rng([seed, *(tag(k) if isinstance(k, str) else k for k in key)])


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> on int64 drags the sign along


def _splitmix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def counter_uniform(seed: int, *counters: Tensor | int | str) -> Tensor:
    """Uniforms in [0, 1), one for each element of the broadcast int64 counters; float32 with 24 random bits.

    SplitMix64's finaliser over each counter in turn (Steele et al., 2014), in wrapping int64 arithmetic,
    so CPU and GPU give the same bits.
    """
    device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    # Filled there: a copy from the host would wait for the device.
    state = torch.full((), seed, dtype=torch.int64, device=device)
    for counter in counters:
        value = tag(counter) if isinstance(counter, str) else counter
        state = _splitmix(
            (state + _GOLDEN) ^ (value * _GOLDEN if isinstance(value, Tensor) else _wrap(value * _GOLDEN))
        )
    return _shift_right(state, 40).to(torch.float32) / (1 << 24)


def _wrap(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63
