"""The exponential moving average of the weights, updated after every step.

Law: it is part of the checkpoint, name for name as the model, and with warm-up it is useful from the first epoch.
Each rank averages what it holds, so nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vmamba_dist.config.schema import EmaConfig
from vmamba_dist.parallel.engine import Engine
from vmamba_dist.parallel.materialise import local


class Ema:
    """float32 copies of an engine's weights that follow them."""

    def __init__(self, engine: Engine, cfg: EmaConfig) -> None:
        self._cfg = cfg
        self._engine = engine
        live = engine.weights()
        self._mean = {name: t.detach().clone() for name, t in live.items()}
        # Views of both, made once: engines and checkpoints fill tensors where they are, and a view of each at each step
        # would cost more than the average itself.
        self._own_live = [local(t) for t in live.values()]
        self._own_mean = [local(t) for t in self._mean.values()]

    def decay(self, step: int) -> float:
        """The decay of step `step` (from 1): min(decay, (1 + t) / (10 + t)) with warm-up."""
        if not self._cfg.warmup:
            return self._cfg.decay
        return min(self._cfg.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """mean ← mean + (1 − decay)(weights − mean)."""
        torch._foreach_lerp_(self._own_mean, self._own_live, 1 - self.decay(step))

    def state(self) -> dict[str, Tensor]:
        """The averages by canonical name, ema.<name>, as a checkpoint stores them. A collective."""
        return {f"ema.{name}": t for name, t in self._engine.canonical(self._mean).items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint filled into the tensors of `state()`. A collective."""
        own = {n.removeprefix("ema."): t for n, t in tensors.items() if n.startswith("ema.")}
        self._engine.take(self._mean, own)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averaged weights into the module while inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Values and not storage: an engine keeps views of its weights. One tensor at a time, so one copy is extra.
        for here, there in zip(self._own_live, self._own_mean, strict=True):
            before = here.clone()
            here.copy_(there)
            there.copy_(before)
