"""Where training stands: what, beside the tensors, a resume needs.

Law: counts are of samples consumed, never of samples prefetched; no random state is in here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Counters of a run. `epoch` and `offset` (samples into the epoch) name the next sample to read."""

    step: int = 0  # steps taken; each has one line in metrics.jsonl
    samples: int = 0  # samples learned from
    epoch: int = 0
    offset: int = 0
    skipped: list[list[int]] = field(default_factory=list)  # [first, end) of data steps to leave out
    lanes: int = 0  # of the data order: chosen once a run
    nonfinite: int = 0  # steps whose update was not applied
    nonfinite_in_a_row: int = 0
    losses: list[float] = field(
        default_factory=list
    )  # of the last applied steps: what a spike is measured by
    spikes: int = 0  # steps whose loss was a spike, and which stand
    rollbacks: int = 0  # times that the run went back to a checkpoint
    bad_in_epoch: int = 0  # samples replaced in the epoch `bad_epoch`
    bad_epoch: int = 0
    best: float | None = None  # the best evaluation so far
    evals_since_best: int = 0

    def advance(self, *, samples: int, data_step: int, steps_per_epoch: int) -> None:
        """Count one step of `samples` samples that consumed global data step `data_step`."""
        self.step += 1
        self.samples += samples
        epoch, step_in_epoch = divmod(data_step + 1, steps_per_epoch)
        self.epoch, self.offset = epoch, step_in_epoch * samples

    def align(self, global_batch: int, steps_per_epoch: int) -> None:
        """Move to the next whole step of the data order; a change of data.global_batch may have cut one."""
        step_in_epoch = -(-self.offset // global_batch)
        self.offset = step_in_epoch * global_batch
        if step_in_epoch >= steps_per_epoch:
            self.epoch, self.offset = self.epoch + 1, 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over saved counters; raises KeyError on one that this version does not know."""
        for name, value in values.items():
            if not hasattr(self, name):
                raise KeyError(f"the checkpoint's state has {name!r}, which this version does not know")
            setattr(self, name, value)
