"""The exponential moving average of the weights, updated after every step.

Law: it is part of the checkpoint, name for name as the model, and with warm-up it is useful from the first epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vmamba_dist.config.schema import EmaConfig


class Ema:
    """float32 copies of a module's tensors that follow it."""

    def __init__(self, module: nn.Module, cfg: EmaConfig) -> None:
        self._cfg = cfg
        self._live = dict(module.state_dict(keep_vars=True))
        self._mean = {name: t.detach().clone() for name, t in self._live.items()}

    def decay(self, step: int) -> float:
        """The decay of step `step` (from 1): min(decay, (1 + t) / (10 + t)) with warm-up."""
        if not self._cfg.warmup:
            return self._cfg.decay
        return min(self._cfg.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """mean ← mean + (1 − decay)(weights − mean)."""
        live = [t.detach() for t in self._live.values()]
        torch._foreach_lerp_(list(self._mean.values()), live, 1 - self.decay(step))

    def state(self) -> dict[str, Tensor]:
        """The live tensors by canonical name: ema.<name>."""
        return {f"ema.{name}": t for name, t in self._mean.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averaged weights into the module while inside; no copy is made."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, live in self._live.items():
            live.data, self._mean[name] = self._mean[name], live.data
