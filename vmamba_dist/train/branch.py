"""A run that goes on from a checkpoint under another schedule: allowed where its past would have been the same.

Law: a branch equals the run that it would have been from step 1. That holds where nothing but `schedule.*` differs
and both schedules give the same learning rate for every step up to the checkpoint: the order of the data, the
augmentation and the mixing know nothing of the schedule. So a short run may begin in a long one's constant phase.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vmamba_dist.checkpoint.store import Meta
from vmamba_dist.config import from_dict
from vmamba_dist.optim.schedule import Schedule, build_schedule

_ROUNDING = 1e-9  # relative: a warm-up's share of two budgets is the same number of samples but for rounding


def has_same_past(meta: Meta, changed: Sequence[str], schedule: Schedule) -> bool:
    """True where a run under `schedule`, its config different in the `changed` keys, would have come to `meta`."""
    total = meta.extra.get("total_samples")
    if total is None or not all(key.startswith("schedule.") for key in changed):
        return False
    saved = from_dict(meta.extra["config"])
    batch = saved.data.global_batch
    before = build_schedule(saved.schedule, saved.optim, global_batch=batch, total_samples=total)
    return all(
        math.isclose(before(samples), schedule(samples), rel_tol=_ROUNDING)
        for samples in range(0, meta.samples, batch)
    )
