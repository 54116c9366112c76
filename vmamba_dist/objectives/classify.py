"""Supervised classification: cross-entropy against soft targets (smoothed and mixed by the feed)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from vmamba_dist.models import VMamba
from vmamba_dist.objectives.base import Inputs, LossTerms
from vmamba_dist.objectives.drop_path import keep_masks


class Classify(nn.Module):
    """A backbone with its own classifier, learning labels."""

    def __init__(self, backbone: VMamba, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.seed = seed

    def forward(self, inputs: Inputs) -> LossTerms:
        keep = None
        if self.training:
            keep = keep_masks(self.seed, inputs.step, inputs.positions, self.backbone.drop_path_rates)
        logits = self.backbone(inputs.images, keep=keep)
        per_sample = F.cross_entropy(logits.float(), inputs.targets, reduction="none")
        return LossTerms(total=per_sample.mean(), per_sample=per_sample.detach())
