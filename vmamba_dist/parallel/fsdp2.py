"""Weights in shards: gathered block by block for a forward and a backward, gradients reduced to their owners.

Law: what autocast would round to bfloat16 is sharded, kept in float32 and gathered in the compute's precision;
what computes in float32, the recurrence's parameters and the norms', is a thousandth of a model and stays whole on
every rank, its gradients averaged in one flat all-reduce. So a model computes with the same bits as unsharded.

The norm is exact over shards and whole tensors, each counted once, and has the same bits on every rank, as it
comes out of that same all-reduce. Clipping and AdamW are element by element: they work on the local shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from vmamba_dist.config.schema import OptimConfig, ParallelConfig
from vmamba_dist.core.dist import World
from vmamba_dist.core.precision import autocast
from vmamba_dist.models.ss2d import SS2D, LayerNorm
from vmamba_dist.models.vmamba import Stage, VMamba
from vmamba_dist.objectives.base import Inputs, LossTerms
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.optim.groups import build_adamw
from vmamba_dist.parallel.engine import LiveTensors, Update
from vmamba_dist.parallel.materialise import local

_RECURRENCE = ("A_logs", "Ds", "dt_projs_bias")


def make_mesh(parallel: ParallelConfig, world: World) -> DeviceMesh:
    """The ranks as (shard), or as (replicate, shard) where there are several copies. A collective."""
    copies, shards = parallel.copies_and_shards(world.size)
    device = world.device.type
    if copies == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))
    ranks = torch.arange(world.size).view(copies, shards)
    # A mesh that makes its groups itself gives them torch's time limit and not the run's.
    timeout = timedelta(seconds=parallel.timeout_s)
    groups = [
        dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0] for rows in (ranks.T, ranks)
    ]
    own = cast(list[dist.ProcessGroup], groups)
    return DeviceMesh.from_group(own, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def shard(backbone: VMamba, mesh: DeviceMesh, *, compute: torch.dtype, cpu_offload: bool) -> None:
    """Shard a backbone on the meta device: each block, each downsample, and the rest with the whole.

    Memory is given to the local parts afterwards, so no rank ever holds the whole.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        # The root's weights too: kept, they would be stale once the averaged ones are swapped in.
        "reshard_after_forward": True,
        "mp_policy": _precision(compute),
        "offload_policy": _offload(mesh, cpu_offload),
        "ignored_params": set(float32_parameters(backbone).values()),
    }
    units: list[nn.Module] = []
    for stage in backbone.layers:
        assert isinstance(stage, Stage)
        units += stage.blocks
        if any(True for _ in stage.downsample.parameters()):
            units.append(stage.downsample)
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(backbone, **options)
    # The next unit's weights are on their way while this one computes, also where the host is late. The
    # backward's order is known to FSDP from the forward, and it looks one ahead by itself.
    for unit, following in itertools.pairwise((backbone, *units)):
        cast(FSDPModule, unit).set_modules_to_forward_prefetch([cast(FSDPModule, following)])


def float32_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What computes in float32 under every precision, by name: the recurrence and the norms."""
    found = {}
    for prefix, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            if isinstance(part, LayerNorm) or (isinstance(part, SS2D) and leaf in _RECURRENCE):
                found[f"{prefix}.{leaf}"] = parameter
    return found


def _precision(compute: torch.dtype) -> MixedPrecisionPolicy:
    if compute == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _offload(mesh: DeviceMesh, cpu_offload: bool) -> OffloadPolicy:
    # Pinned memory is for copies to a GPU; without one, all is in the host's memory already.
    return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()


class FsdpEngine(LiveTensors):
    """The engine seam over FSDP2, on a materialised objective whose backbone `shard` has sharded."""

    def __init__(
        self, module: Classify, optim: OptimConfig, world: World, mesh: DeviceMesh, compute: torch.dtype
    ) -> None:
        super().__init__(module)
        self._root = cast(FSDPModule, module.backbone)
        self._world = world
        self._compute = compute
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # FSDP keeps a shard where it is for ever, so these views of the shards are the weights.
        self._held = {n: local(p) if isinstance(p, DTensor) else p for n, p in self._parameters.items()}
        self._sharded = {n: p for n, p in self._parameters.items() if isinstance(p, DTensor)}
        self._whole = [p for n, p in self._parameters.items() if n not in self._sharded]
        self._copies = world.size // mesh.shape[-1]
        devices = sorted({t.device for t in self._held.values()}, key=str)  # two where shards are offloaded
        self._optimizers = {
            device: build_adamw({n: t for n, t in self._held.items() if t.device == device}, optim)
            for device in devices
        }
        # The moments of a shard in its own layout, of which AdamW has the local part.
        self._moments: dict[str, dict[str, Tensor]] = {n: {} for n in self._parameters}
        for name, held in self._held.items():
            state = self._optimizers[held.device].state[held]
            for key, value in state.items():
                sharded = name in self._sharded and value.ndim > 0
                moment = torch.zeros_like(self._sharded[name]) if sharded else value
                self._moments[name][key], state[key] = moment, local(moment)

    def __call__(self, inputs: Inputs) -> LossTerms:
        with autocast(self._world.device, self._compute):
            terms = self._module(inputs)
        assert isinstance(terms, LossTerms)
        return terms

    @contextmanager
    def microbatch(self, sync: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(sync)
        self._root.set_is_last_backward(sync)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, max_norm: float) -> Update:
        for name, parameter in self._sharded.items():
            self._held[name].grad = None if parameter.grad is None else local(parameter.grad)
        norm = self._reduce()
        finite = torch.isfinite(norm)
        for device, optimizer in self._optimizers.items():
            there = norm.to(device)  # syncs where shards are offloaded: the host has to know before it steps
            if max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(_tensors(optimizer), max_norm, there)
            # The fused step reads this flag where it runs and leaves everything untouched where it is 1.
            optimizer.found_inf = (~torch.isfinite(there)).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._module.zero_grad(set_to_none=True)
        return Update(grad_norm=norm, applied=finite)

    def _reduce(self) -> Tensor:
        """Average the gradients of the whole parameters over ranks; return the norm of all gradients.

        One all-reduce carries them and the squares of this rank's shards, of which the ranks hold `_copies`.
        """
        device = self._world.device
        shards = [g for name in self._sharded if (g := self._held[name].grad) is not None]
        squares = torch.nn.utils.get_total_norm(shards).to(device).square() / self._copies
        own = [p for p in self._whole if p.grad is not None]
        flat = torch.cat([*(cast(Tensor, p.grad).reshape(-1) for p in own), squares.reshape(1)])
        dist.all_reduce(flat)
        mean, squares = flat[:-1] / self._world.size, flat[-1]
        for p, grad in zip(own, torch.split(mean, [p.numel() for p in own]), strict=True):
            p.grad = grad.view_as(p)
        return (squares + mean.square().sum()).sqrt()

    def set_lr(self, lr: float) -> None:
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def state(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": t.detach() for name, t in self.weights().items()}
        for name, moments in self._moments.items():
            tensors |= {f"optim.{name}.{key}": value for key, value in moments.items()}
        return tensors


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for group in optimizer.param_groups for t in group["params"]]
