"""How long a rank's device takes for the same work as every other's.

Law: a fixed matrix product, of the run's device and precision, with no collective in it and no random number. Under
an engine whose forward pass gathers weights all ranks take the same time for a step, and for each part of one that
is long enough to time; this they do not. Timed once a window of steps: a GPU needs about a millisecond for it, a core
about ten. It sees what slows computing down, a hot GPU or another process on it; not a slow host beside a good GPU.
"""

from __future__ import annotations

import torch

from vmamba_dist.train.progress import Stamp, seconds, stamp

_WORK = {"cuda": (2048, 32), "cpu": (256, 32)}  # side, and how many times


class Probe:
    """Times the product at each `every`-th step. A GPU's figure is read a step later, so nothing waits for it."""

    def __init__(self, device: torch.device, compute: torch.dtype, every: int) -> None:
        self._device = device
        self._every = every
        side, self._times = _WORK[device.type]
        # Values that differ, as a GPU's clock depends on how many bits change.
        self._factor = torch.linspace(-1, 1, side * side, device=device).view(side, side).to(compute)
        self._product = torch.empty_like(self._factor)
        self._timed: tuple[Stamp, Stamp] | None = None
        torch.mm(self._factor, self._factor, out=self._product)  # the first one loads libraries

    def run(self, step: int) -> None:
        """Start the product, where it is due."""
        if step % self._every:
            return
        begun = stamp(self._device)
        for _ in range(self._times):
            torch.mm(self._factor, self._factor, out=self._product)
        self._timed = begun, stamp(self._device)

    def read(self) -> float:
        """Seconds that it took, once; 0 where none was run. What the device did next must have been read."""
        timed, self._timed = self._timed, None
        return 0.0 if timed is None else seconds(*timed)
