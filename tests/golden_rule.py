"""Rebuilds the tensors of tests/golden from their names, by the rule that the official vectors were made with.

Law: a tensor is a function of (name, official shape); no weights are stored.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values in [-1, 1), float64: SplitMix64 over a counter that starts at the name's CRC."""
    z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(math.prod(shape), dtype=np.uint64)
    z += np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape)


def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's values by the last part of its name, float64."""
    u = uniform(name, shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_logs":
        return torch.arange(1, shape[-1] + 1, dtype=torch.float64).log() + 0.1 * u
    if leaf == "Ds" or (leaf == "weight" and len(shape) == 1):
        return 1 + 0.1 * u
    if leaf == "dt_projs_bias":
        return u - 4
    if leaf in ("dt_projs_weight", "x_proj_weight"):
        return u * shape[-1] ** -0.5
    if leaf == "bias":
        return 0.1 * u
    return u * math.sqrt(3 / math.prod(shape[1:]))


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest magnitude wanted."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max())
