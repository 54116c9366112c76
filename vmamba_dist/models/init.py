"""Initial values of the parameters.

Law: a parameter's values are a function of (its full name, its whole shape, the seed) and nothing else, so
they do not depend on device, order of construction, sharding or engine. The rules are official VMamba's
("v0"). A rank that holds some rows of a tensor draws it from the top in pieces and keeps its own: normals
come of a rejection method, so no row can be drawn without those above it, but none is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vmamba_dist.core.rng import generator
from vmamba_dist.models.ss2d import SS2D

_LINEAR_STD = 0.02
_PIECE = 1 << 20  # numbers drawn at once
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
            name = f"{prefix}.{leaf}" if prefix else leaf
            if leaf not in rules:
                raise TypeError(
                    f"{name}: {type(module).__name__} has no rule for the initial values of {leaf!r}"
                )
            yield name, parameter, rules[leaf]


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
    return init_rows(name, shape, seed, rule, 0, shape[0])


def init_rows(name: str, shape: tuple[int, ...], seed: int, rule: Init, first: int, end: int) -> Tensor:
    """Return rows [first, end) of a parameter's initial values, bit-equal to those of `init_tensor`.

    Time: all rows up to `end` are drawn. Memory: the rows returned and one piece.
    """
    draw = generator(seed, "init", name)
    values = np.empty((end - first, *shape[1:]), np.float32)
    if rule.kind == "constant":
        values.fill(rule.scale)
    elif rule.kind == "states":  # A = -1 … -N in every channel
        values[:] = np.log(np.arange(1, shape[-1] + 1, dtype=np.float32))
    else:
        step = max(1, _PIECE // math.prod(shape[1:]))
        for top in range(0, end if end > first else 0, step):
            bottom = min(top + step, end)
            piece = _drawn(draw, (bottom - top, *shape[1:]), rule)
            if bottom > first:
                values[max(top, first) - first : bottom - first] = piece[max(first - top, 0) :]
    return torch.from_numpy(values)


def _drawn(draw: np.random.Generator, shape: tuple[int, ...], rule: Init) -> NDArray[np.float32]:
    """The next rows of a tensor."""
    match rule.kind:
        case "normal":  # truncated at ±2 officially: 100 standard deviations away
            return draw.standard_normal(shape, np.float32) * np.float32(rule.scale)
        case "uniform":
            return (draw.random(shape, np.float32) * 2 - 1) * np.float32(rule.scale)
        case "time_step":  # softplus(bias) is log-uniform
            span = math.log(_DT_MAX) - math.log(_DT_MIN)
            step = np.exp(draw.random(shape) * span + math.log(_DT_MIN)).clip(min=_DT_FLOOR)
            bias: NDArray[np.float64] = step + np.log(-np.expm1(-step))
            return bias.astype(np.float32)
    raise AssertionError(rule.kind)


Part = Callable[
    [Tensor], tuple[Tensor, int, int]
]  # of a parameter: the tensor to fill, its rows [first, end)


def _whole(parameter: Tensor) -> tuple[Tensor, int, int]:
    return parameter, 0, parameter.shape[0]


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int, prefix: str = "", part: Part = _whole) -> None:
    """Fill a materialised module's parameters, one at a time; `prefix` is its place in the whole model.

    `part` says what of a parameter is held here; it is whole by default.
    """
    for name, parameter, rule in init_rules(model):
        if parameter.is_meta:
            raise ValueError(
                f"{prefix}{name} is on the meta device: call to_empty(device=…) before init_weights"
            )
        held, first, end = part(parameter)
        held.copy_(init_rows(prefix + name, tuple(parameter.shape), seed, rule, first, end))
