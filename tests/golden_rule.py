"""The parameters behind tests/golden, rebuilt from their names: the leaf name decides how uniforms are scaled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vmamba_kernels.testing import golden_tensor


def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's values in its official shape, float64."""
    u = golden_tensor(name, shape)
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
