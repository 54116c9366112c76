"""What a way of learning takes and gives.

Law: an objective is an nn.Module with `forward(inputs) -> LossTerms`; it knows nothing of ranks or engines.
B batch, S image side, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device. `step` is the global data step that derived randomness counts by."""

    images: Tensor  # (B, 3, S, S) float32, normalised
    targets: Tensor  # (B, K) float32, rows sum to 1
    positions: Tensor  # (B,) int64, in the epoch
    step: int
    keys: list[str]


class LossTerms(NamedTuple):
    """What backward starts from, and what a report wants to see.

    A tuple, because engines look for an output's tensors in tuples, lists and dicts alone.
    """

    total: Tensor  # () mean over the micro-batch, with gradient
    per_sample: Tensor  # (B,) detached


class Objective(Protocol):
    """`module(inputs) -> LossTerms`, with the backbone by name."""

    backbone: Any

    def __call__(self, inputs: Inputs) -> LossTerms: ...
