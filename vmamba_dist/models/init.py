"""Initial values of the parameters.

Law: a parameter's values are a function of (its full name, its whole shape, the seed) and nothing else, so
they do not depend on device, order of construction, sharding or engine. The rules are official VMamba's
("v0"); a later sharded materialisation takes its slice of `init_tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vmamba_dist.core.rng import generator
from vmamba_dist.models.ss2d import SS2D

_LINEAR_STD = 0.02
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of the initial time steps, after softplus


@dataclass(frozen=True)
class Init:
    """How one parameter starts; `scale` is the constant, the std or the bound."""

    kind: Literal["constant", "normal", "uniform", "states", "time_step"]
    scale: float = 0.0


def init_rules(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Init]]:
    """Yield (full name, parameter, rule) of every parameter, in the model's order."""
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        rules = _rules(module) if own else {}
        for leaf, parameter in own.items():
            yield (f"{prefix}.{leaf}" if prefix else leaf), parameter, rules[leaf]


def _rules(module: nn.Module) -> dict[str, Init]:
    match module:
        case nn.Linear():
            return {"weight": Init("normal", _LINEAR_STD), "bias": Init("constant", 0.0)}
        case nn.LayerNorm():
            return {"weight": Init("constant", 1.0), "bias": Init("constant", 0.0)}
        case nn.Conv2d():  # PyTorch's default
            bound = Init("uniform", math.prod(module.weight.shape[1:]) ** -0.5)
            return {"weight": bound, "bias": bound}
        case SS2D():
            return {
                "x_proj_weight": Init("uniform", module.inner**-0.5),
                "A_logs": Init("states"),
                "Ds": Init("constant", 1.0),
                "dt_projs_weight": Init("uniform", module.dt_rank**-0.5),
                "dt_projs_bias": Init("time_step"),
            }
    raise TypeError(f"{type(module).__name__} has parameters but no rule for their initial values")


def init_tensor(name: str, shape: tuple[int, ...], seed: int, rule: Init) -> Tensor:
    """Return a parameter's initial values, float32 on the CPU."""
    draw = generator(seed, "init", name)
    match rule.kind:
        case "constant":
            values = np.full(shape, rule.scale, np.float32)
        case "normal":  # truncated at ±2 officially: 100 standard deviations away
            values = draw.standard_normal(shape, np.float32) * np.float32(rule.scale)
        case "uniform":
            values = (draw.random(shape, np.float32) * 2 - 1) * np.float32(rule.scale)
        case "states":  # A = -1 … -N in every channel
            values = np.broadcast_to(np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)), shape).copy()
        case "time_step":  # softplus(bias) is log-uniform
            span = math.log(_DT_MAX) - math.log(_DT_MIN)
            step = np.exp(draw.random(shape) * span + math.log(_DT_MIN)).clip(min=_DT_FLOOR)
            values = (step + np.log(-np.expm1(-step))).astype(np.float32)
    return torch.from_numpy(values)


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill a materialised module's parameters, one at a time; `prefix` is its place in the whole model."""
    for name, parameter, rule in init_rules(model):
        if parameter.is_meta:
            raise ValueError(
                f"{prefix}{name} is on the meta device: call to_empty(device=…) before init_weights"
            )
        parameter.copy_(init_tensor(prefix + name, tuple(parameter.shape), seed, rule))
