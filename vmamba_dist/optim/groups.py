"""Which parameters decay, and the optimizer over them.

Law: the split is by name and official shape alone, so it is the same under every engine and sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from vmamba_dist.config.schema import OptimConfig

# Folded from two dimensions to one inside, so the rule by ndim must be told (VMAMBA-DETAILS §9).
_OFFICIAL_2D = ("dt_projs_bias",)
_SSM = ("A_logs", "Ds", "dt_projs_bias")


def decays(name: str, parameter: Tensor, rule: Literal["ssm_exempt", "official"]) -> bool:
    """Whether weight decay applies to the parameter `name`.

    official: all but 1-D parameters and names ending in .bias, as the official optimizer does, so A_logs and
    dt_projs_bias decay. ssm_exempt: those and Ds do not either, as Mamba's authors advise.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _SSM and rule == "ssm_exempt":
        return False
    if leaf in _OFFICIAL_2D:
        return True
    return parameter.ndim > 1 and leaf != "bias"


def build_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over a module's parameters, with its state already in place."""
    return build_adamw({n: p for n, p in module.named_parameters() if p.requires_grad}, cfg)


def build_adamw(named: Mapping[str, Tensor], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over tensors of one device, fused, so that a step can be refused there, with its state in place.

    The state exists before the first step: a resume then loads into it instead of creating it. The tensors may be
    parts of parameters: AdamW works element by element.
    """
    groups = [
        {
            "params": [t for n, t in named.items() if decays(n, t, cfg.decay)],
            "weight_decay": cfg.weight_decay,
        },
        {"params": [t for n, t in named.items() if not decays(n, t, cfg.decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True
    )
    for tensor in named.values():
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
    return optimizer
