"""Top-1, top-5 and loss over a split, every sample exactly once.

Law: padding and unreadable samples are masked out and counted; sums are exact integers or float64, so the
figures do not depend on how samples fell on ranks, beyond the loss's rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_dist.config.schema import UserError
from vmamba_dist.core.dist import World, sum_over_ranks
from vmamba_dist.core.precision import autocast
from vmamba_dist.core.state import TrainState
from vmamba_dist.data.batch import Batch

log = logging.getLogger(__name__)


class ClassificationEvaluator:
    """Evaluates an objective's backbone on a split of labelled images."""

    name = "classification"

    def __init__(
        self,
        batches: Callable[[], Iterator[Batch]],
        normalize: Callable[[Batch, torch.device], Tensor],
        *,
        num_samples: int,
        world: World,
        compute: torch.dtype,
    ) -> None:
        self._batches = batches
        self._normalize = normalize
        self._num_samples = num_samples
        self._world = world
        self._compute = compute

    @torch.no_grad()
    def __call__(self, module: nn.Module, state: TrainState) -> dict[str, float]:
        """Evaluate the module as it stands at `state`. Return {top1, top5 (in %), loss, num_samples}. A collective."""
        device = self._world.device
        backbone: Any = module.backbone
        was_training = module.training
        module.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # samples, top1, top5, loss
        unreadable = 0
        for batch in self._batches():
            unreadable += len(batch.bad)
            with autocast(device, self._compute):
                logits = backbone(self._normalize(batch, device)).float()
            labels = batch.labels.to(device)
            mask = torch.ones_like(labels, dtype=torch.bool) if batch.mask is None else batch.mask.to(device)
            safe = labels.where(mask, 0)
            hits = logits.topk(min(5, logits.shape[-1])).indices == safe[:, None]
            loss = F.cross_entropy(logits, safe, reduction="none").double()
            sums += torch.stack(
                [mask.sum(), (hits[:, 0] & mask).sum(), (hits.any(1) & mask).sum(), loss.where(mask, 0).sum()]
            )
        module.train(was_training)
        count, top1, top5, loss_sum, bad = sum_over_ranks([*sums.tolist(), float(unreadable)])
        if count + bad != self._num_samples:
            raise RuntimeError(
                f"evaluated {count:.0f} samples and {bad:.0f} unreadable ones of {self._num_samples}"
            )
        if count == 0:
            raise UserError(
                f"none of the {self._num_samples} samples to evaluate on can be read; vmamba shards verify names why"
            )
        if bad and self._world.is_main:
            log.warning(
                "evaluation at step %d left out %d unreadable samples of %d",
                state.step,
                bad,
                self._num_samples,
            )
        return {
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "loss": loss_sum / count,
            "num_samples": count,
        }
