"""Parallelism from outside: recompute, then compile, then spread, in that order.

Law: the model knows nothing of this; each step is one call on its blocks.
"""

from __future__ import annotations

from vmamba_dist.config.schema import OptimConfig, ParallelConfig, PrecisionConfig
from vmamba_dist.core.dist import World
from vmamba_dist.core.precision import compute_dtype
from vmamba_dist.models.vmamba import Stage
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.optim.groups import build_optimizer
from vmamba_dist.parallel.ddp import DdpEngine
from vmamba_dist.parallel.engine import Engine


def parallelize(
    objective: Classify,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    optim: OptimConfig,
    world: World,
    seed: int,
) -> Engine:
    """Turn an objective on the meta device into an engine for this world, its weights initialised from the seed."""
    if parallel.recompute == "block":
        objective.backbone.set_grad_checkpointing(True)
    if parallel.compile == "block":
        for stage in objective.backbone.layers:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                block.compile(dynamic=False)  # inductor fails on the symbolic sizes of a second stage (2.14)
    objective.to_empty(device=world.device)
    objective.backbone.init_weights(seed)
    return DdpEngine(objective, build_optimizer(objective, optim), world, compute_dtype(precision.compute))
