"""From the meta device to memory and values, each rank its own part.

Law: a parameter's values are a function of its name and the seed, whatever holds it, and nothing starts without
them: memory is filled with NaN first, so what no rule has filled is found by looking.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from vmamba_dist.models.init import init_parameters
from vmamba_dist.objectives.classify import Classify


def materialise(module: nn.Module, device: torch.device, *, shards: torch.device | None = None) -> None:
    """Give every parameter memory, of a sharded one its local part alone; on `shards` if they live elsewhere."""

    def memory(t: Tensor) -> Tensor:
        elsewhere = shards is not None and isinstance(t, DTensor)
        empty = torch.empty_like(t, device=shards if elsewhere else device)
        local(empty).fill_(math.nan)
        return empty

    with torch.no_grad():
        module._apply(memory)  # type: ignore[no-untyped-call]  # what to_empty does, for two devices


def initialise(objective: Classify, seed: int) -> None:
    """Fill every parameter from (its name, seed). Raises RuntimeError naming one that has no memory or no value."""
    init_parameters(objective.backbone, seed, part=local_part)
    check_initialised(objective)


def check_initialised(module: nn.Module) -> None:
    """Refuse a model of which a part has no memory, or no value. Raises RuntimeError naming it. Syncs."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise RuntimeError(f"{name} is on the meta device: it was never given memory")
        if bool(local(tensor).isnan().any()):
            raise RuntimeError(f"{name} was given memory and no values: no rule of models/init.py fills it")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    whole = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def local_part(parameter: Tensor) -> tuple[Tensor, int, int]:
    """Return what this rank holds of a parameter, and which rows of the whole those are: [first, end)."""
    rows = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0, rows
    mesh = parameter.device_mesh
    axis = next(i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
    return local(parameter), *share_of_rows(rows, mesh.get_local_rank(axis), mesh.size(axis))


def share_of_rows(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the rows [first, end) that a rank holds: as many as any before it, the last ones fewer, or none."""
    each = math.ceil(rows / ranks)
    return min(rank * each, rows), min((rank + 1) * each, rows)
