"""ZeRO, by DeepSpeed's own engine, behind the seam.

Law: DeepSpeed runs autocast, backward, reduction and the step; this file gives it a module and an optimizer, and reads
and writes its partitions in canonical form, one parameter at a time, bit for bit. Under ZeRO-1 and 2 without offload it
also measures, clips and refuses, on the device, where DeepSpeed would wait for it. Masters are float32 under every
precision: bfloat16 is autocast's (`torch_autocast`), never DeepSpeed's own cast of the weights, so the recurrence
computes in float32 as it does under any engine.

ZeRO-1 and 2 keep the weights whole on every rank and cut one flat buffer a parameter group into equal parts, of which a
rank has the masters and moments. ZeRO-3 cuts each parameter into equal parts (`ds_tensor`) and gathers it for its use.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from vmamba_dist.config.schema import ConfigError, OptimConfig, ParallelConfig, UserError
from vmamba_dist.core.dist import World, gather
from vmamba_dist.models.init import init_rules, init_tensor
from vmamba_dist.objectives.base import Inputs, LossTerms
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.optim.groups import decays
from vmamba_dist.parallel import shares
from vmamba_dist.parallel.engine import Update
from vmamba_dist.parallel.materialise import initialise, materialise
from vmamba_dist.parallel.shares import Layout
from vmamba_dist.parallel.zero_config import build_config, clips_on_device

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """The engine seam over deepspeed.initialize, ZeRO stage 1, 2 or 3."""

    def __init__(
        self,
        objective: Classify,
        *,
        parallel: ParallelConfig,
        optim: OptimConfig,
        compute: torch.dtype,
        world: World,
        seed: int,
    ) -> None:
        """`objective` is on the meta device; its weights are made here, under ZeRO-3 never all of them at once."""
        sizes = {name: p.numel() for name, p in objective.named_parameters()}
        config = build_config(
            parallel,
            clip=optim.clip,
            compute=compute,
            device=world.device,
            ranks=world.size,
            largest=max(sizes.values()),
            total=sum(sizes.values()),
        )
        _check(config, parallel.deepspeed_config)
        # By name, while the parameters have their shapes: ZeRO-3 leaves them empty.
        decayed = {name: decays(name, p, optim.decay) for name, p in objective.named_parameters()}
        self._objective = objective
        self._world = world
        self._stage: int = config["zero_optimization"]["stage"]
        self._clips = clips_on_device(config)
        _join(world, parallel.timeout_s)
        if self._stage == 3:
            _materialise_in_parts(objective, config, world.device, seed)
        else:
            materialise(objective, world.device)
            initialise(objective, seed)
        self._engine = _initialize(objective, config, optim, decayed)
        self._zero = self._engine.optimizer
        self._parameters: dict[str, Any] = dict(objective.named_parameters())  # ZeRO-3 hangs much on them
        # One process alone has its mean gradient where the backward left it. DeepSpeed would go through its
        # reduction, a dozen small calls a parameter on the host; where a file of the user's asks for hooks, it may.
        self._reduces = (
            world.size > 1 or self._stage > 1 or not self._clips or bool(self._zero._grad_acc_hooks)
        )
        self._engine.enable_backward_allreduce = self._reduces
        self._masters = _masters(self._zero, self._stage)
        owners = shares.choose_owners(sizes, world.size)
        self._places = _places(self._zero, self._stage, self._parameters, world, owners)
        self._prepare_state()
        self._evaluation_hook = objective.backbone.register_forward_pre_hook(
            self._before_backbone, prepend=True
        )

    @property
    def module(self) -> nn.Module:
        return self._objective

    def __call__(self, inputs: Inputs) -> LossTerms:
        terms = self._engine(inputs)
        assert isinstance(terms, LossTerms)
        return terms

    @contextmanager
    def microbatch(self, sync: bool) -> Iterator[None]:
        # ZeRO-1 sums over the micro-batches and reduces once; 2 and 3 have no room for a whole gradient, so they
        # reduce each micro-batch's and sum the parts.
        self._engine.set_gradient_accumulation_boundary(sync)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # the loop has divided

    def update(self, max_norm: float) -> Update:
        if self._clips:
            return self._update_on_device(max_norm)
        self._zero.clip_grad = max_norm  # told at the start; read by the step
        self._engine.step()  # syncs host and device: DeepSpeed looks whether the norm is finite
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        applied = torch.tensor(self._engine.was_step_applied())
        return Update(grad_norm=norm.detach(), applied=applied)

    @torch.no_grad()
    def _update_on_device(self, max_norm: float) -> Update:
        if not self._reduces:
            for group, members in enumerate(self._zero.params_in_partition):
                self._zero.all_grad_tensors[group] = self._zero.get_all_grad_tensors(members, torch.float32)
            self._zero.finalize_gradient_accumulation_boundary()
        # This rank's parts of the mean gradient, a list a group; a part may be nothing but padding, which is zero.
        parts = [part for group in self._zero.averaged_gradients.values() for part in group]
        norm = nn.utils.get_total_norm(parts)
        if self._world.size > 1:
            square = norm.square()
            dist.all_reduce(square, group=self._zero.dp_process_group)
            norm = square.sqrt()
        finite = torch.isfinite(norm)
        if max_norm > 0:
            torch._foreach_mul_(
                parts, (max_norm / (norm + 1e-6)).clamp(max=1.0)
            )  # as torch clips, to the bit
        # The fused step reads this flag on the device and leaves weights and moments untouched where it is 1: no sync.
        self._zero.optimizer.found_inf = (~finite).float()
        self._engine.step()
        return Update(grad_norm=norm, applied=finite)

    def set_lr(self, lr: float) -> None:
        self._zero.set_lr(lr)

    def weights(self) -> dict[str, Tensor]:
        if self._stage == 3:
            return {name: p.ds_tensor for name, p in self._parameters.items()}
        return dict(self._objective.state_dict(keep_vars=True))

    def canonical(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._stage < 3:
            return dict(held)
        return self._gathered({name: held[name] for name in self._places})

    def take(self, held: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
        if self._stage == 3:
            self._dealt({name: held[name] for name in self._places}, canonical)

    def state(self) -> dict[str, Tensor]:
        """Whole tensors on their owners' CPU, but for the weights that ZeRO-1 and 2 keep whole. A collective."""
        weights = self.canonical(self.weights())
        tensors = {f"model.{name}": t.detach() for name, t in weights.items()}
        for key in _MOMENTS:
            pieces = {name: self._piece(self._moment(name, key), name) for name in self._places}
            tensors |= {f"optim.{name}.{key}": t for name, t in self._gathered(pieces).items()}
        for name, place in self._places.items():
            if place.layout.owner == self._world.rank:
                tensors[f"optim.{name}.step"] = self._moment(name, "step").detach().cpu().clone()
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self._stage == 3:
            weights = self.weights()
            self.take(weights, _below("model.", tensors))
            for name, part in weights.items():
                self._piece(self._masters[self._places[name].group], name).copy_(part[: self._length(name)])
        else:
            self._zero.refresh_fp32_params()  # the masters, from the weights that the checkpoint filled
        for key in _MOMENTS:
            pieces = {name: self._piece(self._moment(name, key), name) for name in self._places}
            self._dealt(pieces, _below("optim.", tensors, f".{key}"))
        self._load_steps({name: int(t) for name, t in _below("optim.", tensors, ".step").items()})

    def close(self) -> None:
        """Take DeepSpeed off the module and out of the process, which may build another engine. No collective."""
        self._evaluation_hook.remove()
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        self._engine.destroy()
        FWD_MODULE_STACK.clear()
        for parameter in self._parameters.values():
            # What ZeRO-3 hangs on a parameter refers to the process group in a circle. Left to the interpreter's
            # end, the group's threads would abort the process there.
            parameter.__dict__.clear()
        del self._engine, self._zero, self._masters, self._parameters
        gc.collect()
        deepspeed.comm.destroy_process_group(deepspeed_groups._WORLD_GROUP)

    def _before_backbone(self, backbone: nn.Module, _inputs: object) -> None:
        """Keep evaluation, which calls the backbone and not the engine, out of ZeRO-3's record of a training step.

        Taken for a part of it, weights would be gathered ahead of the next evaluation, and be the old ones where
        the average has been swapped in meanwhile.
        """
        if self._stage == 3 and not backbone.training:
            coordinator = self._zero.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    @torch.no_grad()
    def _prepare_state(self) -> None:
        """Make the moments before the first step: a resume then loads into them. One `step` for each group's."""
        for master in self._masters:
            self._zero.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        if self._stage == 3:  # the last rank's parts end in memory that nobody has written
            for name, place in self._places.items():
                part, length = self._parameters[name].ds_tensor, self._length(name)
                part[length:].zero_()
                master = self._masters[place.group].detach()
                master[place.offset + length : place.offset + part.numel()].zero_()

    def _length(self, name: str) -> int:
        return self._places[name].layout.cuts[self._world.rank][1]

    def _piece(self, flat: Tensor, name: str) -> Tensor:
        """What this rank holds of a parameter, in a buffer laid out as its group's masters."""
        return flat.detach().narrow(0, self._places[name].offset, self._length(name))

    def _moment(self, name: str, key: str) -> Tensor:
        found: Tensor = self._zero.optimizer.state[self._masters[self._places[name].group]][key]
        return found

    def _gathered(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, this rank's share of them. A collective."""
        rank = self._world.rank
        found = {name: shares.gather(t, self._places[name].layout, rank) for name, t in pieces.items()}
        return {name: t for name, t in found.items() if t is not None}

    def _dealt(self, pieces: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """Fill the pieces from whole tensors, each at its owner. A collective."""
        for name, piece in pieces.items():
            shares.scatter(whole.get(name), piece, self._places[name].layout, self._world.rank)

    def _load_steps(self, own: Mapping[str, int]) -> None:
        """Take over how many updates the moments have seen: DeepSpeed counts by group. A collective."""
        steps = {name: step for found in gather(own) for name, step in found.items()}
        for group, master in enumerate(self._masters):
            counts = {step: n for n, step in steps.items() if self._places[n].group == group}
            if len(counts) > 1:
                told = ", ".join(f"{step} of {name}" for step, name in counts.items())
                raise UserError(
                    f"the checkpoint's parameters have seen different numbers of updates ({told}), and DeepSpeed "
                    "keeps one for all: go on with parallel.engine=ddp or fsdp"
                )
            self._zero.optimizer.state[master]["step"].fill_(next(iter(counts)))


@dataclass(frozen=True)
class _Place:
    """Where a parameter's masters and moments are: a rank has the elements that the layout says, at an offset."""

    group: int  # of DeepSpeed's flat buffers
    offset: int  # in this rank's
    layout: Layout


def _masters(zero: Any, stage: int) -> list[Tensor]:
    """This rank's flat float32 buffers, one a group, which the optimizer steps."""
    found: list[Tensor] = (
        zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    )
    assert all(t.dtype == torch.float32 and t.ndim == 1 for t in found)
    return found


def _places(
    zero: Any, stage: int, parameters: Mapping[str, Any], world: World, owners: Mapping[str, int]
) -> dict[str, _Place]:
    named = {p: name for name, p in parameters.items()}
    found = {}
    for group, members in enumerate(zero.fp16_groups if stage == 3 else zero.bit16_groups):
        for p in members:
            name = named[p]
            if stage == 3:
                _, offset, part = zero.grad_position[zero.get_param_id(p)]
                shape, cuts = p.ds_shape, shares.contiguous_cuts(0, p.ds_numel, part, world.size)
            else:
                flat, part = zero.bit16_groups_flat[group], zero.partition_size[group]
                start = (p.data_ptr() - flat.data_ptr()) // flat.element_size()
                shape, cuts = p.shape, shares.contiguous_cuts(start, p.numel(), part, world.size)
                offset = min(max(start - world.rank * part, 0), part)
            found[name] = _Place(group, offset, Layout(tuple(shape), cuts, owners[name]))
    return {name: found[name] for name in parameters}  # in the model's order, the same on every rank


def _join(world: World, timeout_s: float) -> None:
    """Let DeepSpeed into the process group; a single process needs one too. A collective."""
    if get_accelerator().device_name() != world.device.type:
        raise ConfigError(
            f"precision.device={world.device.type}: this process has loaded DeepSpeed for "
            f"{get_accelerator().device_name()}; start another one"
        )
    # Said on every rank at every call site, by DeepSpeed's use of names that torch 2.14 replaces.
    warnings.filterwarnings(
        "ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning
    )
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists
    if world.device.type == "cpu":
        # A collective for inference, which DeepSpeed would compile for a minute before it starts.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_init_required=False)
    # DeepSpeed works in a copy of the world that it makes once a process, with a time limit of its own: this one is
    # of this world, and has ours.
    deepspeed_groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=timeout_s))
    # ZeRO-3 numbers parameters and modules through the life of a process, and compares the numbers between ranks,
    # of which one may have had an engine before.
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def _check(config: dict[str, Any], file: str) -> None:
    """Have DeepSpeed read the config before it does anything. Raises ConfigError where a user's file is at fault."""
    try:
        deepspeed.DeepSpeedConfig(dict(config))
    except (ValueError, TypeError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
        if not file:
            raise
        told = " ".join(str(error).split())
        raise ConfigError(
            f"parallel.deepspeed_config={file!r}: DeepSpeed refuses it: {told}; mend the file"
        ) from error


def _materialise_in_parts(
    objective: Classify, config: dict[str, Any], device: torch.device, seed: int
) -> None:
    """Make each parameter's values, keep this rank's part, and go on to the next: no rank holds two whole ones."""
    backbone = objective.backbone
    first: Any = None
    for name, empty, rule in list(init_rules(backbone)):
        owner, _, leaf = name.rpartition(".")
        values = init_tensor(name, tuple(empty.shape), seed, rule).to(device)
        parameter = nn.Parameter(values, requires_grad=empty.requires_grad)
        setattr(backbone.get_submodule(owner), leaf, parameter)
        if first is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config)
            first = parameter
        else:
            first.convert_to_zero_parameters([parameter])
    left = [name for name, t in objective.state_dict(keep_vars=True).items() if t.is_meta]
    if left:
        raise RuntimeError(f"no rule gives {', '.join(left)} a value")


def _initialize(
    objective: Classify, config: dict[str, Any], optim: OptimConfig, decayed: Mapping[str, bool]
) -> Any:
    named = dict(objective.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decayed[n]], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in named.items() if not decayed[n]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _below(prefix: str, tensors: Mapping[str, Tensor], suffix: str = "") -> dict[str, Tensor]:
    """The tensors named prefix + name + suffix, by name."""
    return {
        key.removeprefix(prefix).removesuffix(suffix): t
        for key, t in tensors.items()
        if key.startswith(prefix) and key.endswith(suffix)
    }
