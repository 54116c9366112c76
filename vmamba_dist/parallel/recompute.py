"""What blocks and the stem keep for their backward, and what the backward computes again.

Law: recomputing changes no bit of a loss or a gradient; but where blocks run as one node (on a GPU), selective composes
them of their modules, which rounds otherwise. It is applied from outside, before compile and sharding, and
runs inside the block's or the stem's forward: the compiled block holds it, and a sharded one gathers its weights once
for it and its backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from vmamba_dist.models.vmamba import Branches, Recompute, VMamba, recompute_block

# A fifth of an eager forward's time on a GPU, and its outputs, the states for its backward among them, about a fifth of
# what a block would keep. What else is slow keeps more for its time.
KEPT = frozenset({torch.ops.vmamba.ss2d_scan.default, torch.ops.vmamba.selective_scan.default})


def apply_recompute(backbone: VMamba, policy: Literal["off", "block", "selective"]) -> None:
    """Set what every block of the backbone recomputes: nothing, all of it (and the stem too), or all but its scans."""
    how: dict[str, Recompute | None] = {
        "off": None,
        "block": recompute_block,
        "selective": recompute_but_scans,
    }
    # Selective is about the scans, and the stem has none: it keeps all.
    backbone.patch_embed.recompute = recompute_block if policy == "block" else None
    for block in backbone.blocks():
        if policy == "selective":  # which looks for single operations
            block.fuse = "never"
        elif block.recompute is recompute_but_scans:
            block.fuse = "auto"
        block.recompute = how[policy]


def recompute_but_scans(branches: Branches, x: Tensor, keep: Tensor | None) -> Tensor:
    """Run a block and keep its input and its scans' outputs; the backward runs the rest again."""
    out: Tensor = checkpoint(
        branches, x, keep, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_scans
    )
    return out


def _policy(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_scans = partial(create_selective_checkpoint_contexts, _policy)
