"""Drop-path masks as a function of (seed, step, position, branch).

Law: compile, recompute, any engine and any world size see the same masks. B batch, M branches (two a block).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vmamba_dist.core.rng import counter_uniform


def keep_masks(seed: int, step: int, positions: Tensor, rates: Sequence[float]) -> Tensor | None:
    """Draw (B, M) masks, 0 or 1 / keep probability, for `positions` (B,) int64 and one rate a block.

    None where every rate is 0: nothing is drawn and nothing multiplied.
    """
    if not any(rates):
        return None
    # From pinned memory: from any other the copy would have the host wait for the device, in every step.
    on_host = torch.tensor(
        [rate for rate in rates for _ in range(2)], device="cpu", pin_memory=positions.is_cuda
    )
    branch_rates = on_host.to(positions.device, non_blocking=True)
    branches = torch.arange(len(branch_rates), device=positions.device)
    uniform = counter_uniform(seed, "drop_path", step, positions[:, None], branches[None, :])
    return (uniform >= branch_rates) / (1 - branch_rates)
