"""Parallelism from outside: recompute, compile, shard, materialise, initialise, in that order.

Law: the model knows nothing of this; each step is one call on its blocks. It arrives on the meta device, and no
rank gives memory to more of it than it keeps.
"""

from __future__ import annotations

import torch

from vmamba_dist.config.schema import OptimConfig, ParallelConfig, PrecisionConfig
from vmamba_dist.core.dist import World
from vmamba_dist.core.precision import compute_dtype
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.optim.groups import build_optimizer
from vmamba_dist.parallel import fsdp2
from vmamba_dist.parallel.ddp import DdpEngine
from vmamba_dist.parallel.engine import Engine
from vmamba_dist.parallel.fsdp2 import FsdpEngine
from vmamba_dist.parallel.materialise import initialise, materialise
from vmamba_dist.parallel.recompute import apply_recompute
from vmamba_dist.parallel.zero_config import load_engine


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
    compute = compute_dtype(precision.compute)
    apply_recompute(objective.backbone, parallel.recompute)
    if parallel.compile == "block":
        for block in objective.backbone.blocks():
            block.compile(dynamic=False)  # inductor fails on the symbolic sizes of a second stage (2.14)
    if parallel.engine == "deepspeed":  # shards, materialises and initialises in one, as its own engine wants
        engine: Engine = load_engine(world.device).DeepSpeedEngine(
            objective, parallel=parallel, optim=optim, compute=compute, world=world, seed=seed
        )
        return engine
    if parallel.engine == "fsdp":
        mesh = fsdp2.make_mesh(parallel, world)
        fsdp2.shard(objective.backbone, mesh, compute=compute, cpu_offload=parallel.cpu_offload)
    materialise(objective, world.device, shards=torch.device("cpu") if parallel.cpu_offload else None)
    initialise(objective, seed)
    if parallel.engine == "fsdp":
        return FsdpEngine(objective, optim, world, mesh, compute)
    return DdpEngine(objective, build_optimizer(objective, optim), world, compute)
