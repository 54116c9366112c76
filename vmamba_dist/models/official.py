"""Weights in the official VMamba format, in and out.

Law: names and shapes are exactly the official ones; import is strict, all or nothing, and one error names
everything that does not fit; export of what was imported is the identity. Our own names are the official
ones too: only the folded parameters change shape, and older spellings are put right on the way in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmamba_dist.models.ss2d import SS2D, K
from vmamba_dist.models.vmamba import VMamba

_FOLDED = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias")  # (4·n, …) here, (4, n, …) officially

# Spellings of earlier releases and of the one-file model, as (pattern, ours).
_RENAMES = [
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^norm\."), "classifier.norm."),
    (re.compile(r"^head\."), "classifier.head."),
    (re.compile(r"\.op\.x_proj\.weight$"), ".op.x_proj_weight"),
    (re.compile(r"\.op\.dt_projs\.weight$"), ".op.dt_projs_weight"),
]
# The one-file model keeps its patch merging in a Sequential; with v3 the same names are a convolution's.
_MERGING_RENAMES = [
    (re.compile(r"^(layers\.\d+\.downsample)\.1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.downsample)\.2\."), r"\1.reduction."),
]


def official_shapes(model: VMamba) -> dict[str, tuple[int, ...]]:
    """Return each parameter's official shape by name."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        if isinstance(module, SS2D):
            for leaf in _FOLDED:
                folded, *rest = shapes[f"{prefix}.{leaf}"]
                shapes[f"{prefix}.{leaf}"] = (K, folded // K, *rest)
    return shapes


def export_official(model: VMamba) -> dict[str, Tensor]:
    """Return the weights under official names in official shapes; they share the model's memory."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().view(shape) for name, shape in official_shapes(model).items()}


@torch.no_grad()
def load_official(model: VMamba, state_dict: Mapping[str, Any], *, key: str = "model") -> None:
    """Copy official weights into the model, or change nothing and raise ValueError naming all that is wrong.

    Takes the weights themselves or a checkpoint that holds them under `key` ("model", or "model_ema" for the
    averaged ones); linears may be stored as 1x1 convolutions; spellings of earlier releases are known.
    """
    given = _by_our_names(_weights(state_dict, key), merging=model.variant.downsample == "v1")
    parameters = dict(model.named_parameters())
    linears = {
        f"{prefix}.weight" for prefix, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    shapes = official_shapes(model)
    problems = [f"missing {name} {shapes[name]}" for name in shapes if name not in given]
    problems += [f"unexpected {source}" for name, (source, _) in given.items() if name not in shapes]
    for name, (source, value) in given.items():
        if name in shapes and not _fits(value, shapes[name], tuple(parameters[name].shape), name in linears):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{source} is {found}, must be {shapes[name]}")
    if any(p.is_meta for p in parameters.values()):
        problems.append("the model is on the meta device: call to_empty(device=…) first")
    if problems:
        raise ValueError("official weights do not fit the model:\n  " + "\n  ".join(problems))
    for name, parameter in parameters.items():
        parameter.copy_(given[name][1].reshape(parameter.shape))


def _weights(state_dict: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    nested = [name for name, value in state_dict.items() if isinstance(value, Mapping)]
    if key in nested:
        weights: Mapping[str, Any] = state_dict[key]
        return weights
    if nested or key != "model":
        held = ", ".join(nested) or "none"
        raise ValueError(f"key={key!r}: no weights are under it; under a key the checkpoint holds {held}")
    return state_dict


def _by_our_names(weights: Mapping[str, Any], merging: bool) -> dict[str, tuple[str, Any]]:
    """Map our name → (name found, value); raises ValueError where two names mean one parameter."""
    ours: dict[str, tuple[str, Any]] = {}
    clashes = []
    for source, value in weights.items():
        name = source
        for pattern, replacement in (*_RENAMES, *(_MERGING_RENAMES if merging else ())):
            name = pattern.sub(replacement, name)
        if name in ours:
            clashes.append(f"{ours[name][0]} and {source} are both {name}")
        ours[name] = (source, value)
    if clashes:
        raise ValueError("official weights name a parameter twice:\n  " + "\n  ".join(clashes))
    return ours


def _fits(value: Any, official: tuple[int, ...], folded: tuple[int, ...], linear: bool) -> bool:
    """Whether a value has the official shape, the one-file model's folded one, or a 1x1 convolution's."""
    if not isinstance(value, Tensor):
        return False
    return value.shape in (official, folded) or (linear and value.shape == (*official, 1, 1))
