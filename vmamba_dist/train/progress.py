"""Where this rank is: the step, the phase of it, and since when.

Law: every rank makes the same marks in the same order, so their count tells who is behind whom. A mark costs no
sync: on a GPU time is taken by events on the device, which are read a step later.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
Stamp = float | torch.cuda.Event


@dataclass(frozen=True)
class Place:
    """One mark."""

    count: int  # marks made so far
    step: int
    phase: str
    since: float  # of time.monotonic


class Progress:
    """The marks of one rank. The loop makes them; the watch reads `place` in a thread of its own."""

    def __init__(self, device: torch.device) -> None:
        self.place = Place(0, 0, "loading", time.monotonic())
        self._device = device
        self._begun: Stamp = 0.0
        self._alone: tuple[Stamp, Stamp] | None = None  # begin and end of this rank's own part of a step
        self._before: tuple[Stamp, Stamp] | None = None

    def begin(self, step: int) -> None:
        """A step begins; up to its last backward pass a rank works on its own."""
        self.at("data", step)
        self._begun = stamp(self._device)

    def at(self, phase: str, step: int | None = None) -> None:
        """A phase begins, of the step that has begun or of `step`."""
        last = self.place
        # One assignment: a thread that reads sees all of this mark or all of the one before.
        self.place = Place(last.count + 1, last.step if step is None else step, phase, time.monotonic())
        if phase == "backward":
            self._alone = self._begun, stamp(self._device)

    def through(self, items: Iterable[T], phase: str) -> Iterator[T]:
        """Pass items on, with a mark for each."""
        for item in items:
            self.at(phase)
            yield item

    def own_time(self) -> float:
        """Seconds that this rank worked on its own in the step before the one that has now ended; 0 if unknown.

        Once a step. The step before has ended on the device too wherever its loss has been read.
        """
        before, self._before, self._alone = self._before, self._alone, None
        return 0.0 if before is None else seconds(*before)


def stamp(device: torch.device) -> Stamp:
    """Now: for a GPU, where the work that it has been given so far will end."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds(start: Stamp, end: Stamp) -> float:
    """From one to the other, both reached on the device."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    return float(start.elapsed_time(end)) / 1000
