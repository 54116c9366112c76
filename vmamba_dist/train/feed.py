"""From the stream's uint8 micro-batches to inputs on the device, with the time that the step waited.

Law: everything that is drawn here is a function of (seed, epoch or step, position).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from vmamba_dist.data.augment import DeviceTransform
from vmamba_dist.data.batch import BadSample, Batch
from vmamba_dist.objectives.base import Inputs
from vmamba_dist.train.progress import Progress


class Feed:
    """An iterator of `Inputs`; remembers the micro-batches of the last two steps for an autopsy."""

    def __init__(
        self,
        batches: Iterator[Batch],
        transform: DeviceTransform,
        device: torch.device,
        progress: Progress,
        *,
        accumulate: int,
        on_bad: Callable[[list[BadSample]], None],
    ) -> None:
        self._batches = batches
        self._transform = transform
        self._device = device
        self._progress = progress
        self._memory = 2 * accumulate
        self._on_bad = on_bad
        self.recent: list[Batch] = []
        self._waited = 0.0
        self._bad = 0

    def __iter__(self) -> Iterator[Inputs]:
        return self

    def __next__(self) -> Inputs:
        self._progress.at("data")
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        if batch.bad:
            self._bad += len(batch.bad)
            self._on_bad(batch.bad)
        self.recent = [*self.recent[-self._memory + 1 :], batch.kept()]
        return self.prepare(batch)

    def prepare(self, batch: Batch) -> Inputs:
        """Normalise, erase and mix one micro-batch on the device."""
        images, targets = self._transform(batch, self._device)
        positions = batch.positions.to(self._device, non_blocking=True)
        return Inputs(images, targets, positions, batch.step, batch.keys)

    def tally(self) -> tuple[float, int]:
        """(seconds waited, samples replaced) since the last call."""
        result = self._waited, self._bad
        self._waited, self._bad = 0.0, 0
        return result
