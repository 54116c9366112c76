"""Which parameters decay, and the optimizer over them.

Law: the split is by name and official shape alone, so it is the same under every engine and sharding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from vmamba_dist.config.schema import OptimConfig

# Folded from two dimensions to one inside, so the rule by ndim must be told (VMAMBA-DETAILS §9).
_OFFICIAL_2D = ("dt_projs_bias",)
_SSM = ("A_logs", "Ds", "dt_projs_bias")


def decays(name: str, parameter: nn.Parameter, rule: Literal["ssm_exempt", "official"]) -> bool:
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
    """AdamW (fused, so that a step can be refused on the device) with its state already in place.

    The state exists before the first step: a resume then loads into it instead of creating it.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p, cfg.decay)], "weight_decay": cfg.weight_decay},
        {"params": [p for n, p in named if not decays(n, p, cfg.decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True
    )
    for _, p in named:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer
