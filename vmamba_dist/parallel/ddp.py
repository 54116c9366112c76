"""One process alone, or many with a whole copy each and their gradients averaged.

Law: the order in which gradients are summed is a function of the model alone. DDP's rebuild of its buckets
after the first backward would change it after a resume at three or more ranks (seen on gloo), and
`find_unused_parameters=True` suppresses the rebuild; it costs one walk over the graph a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vmamba_dist.core.dist import World
from vmamba_dist.core.precision import autocast
from vmamba_dist.objectives.base import Inputs, LossTerms
from vmamba_dist.parallel.engine import LiveTensors, Update


class DdpEngine(LiveTensors):
    """The engine seam over DistributedDataParallel; with one process, over the bare module."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, world: World, compute: torch.dtype
    ) -> None:
        super().__init__(module)
        self._optimizer = optimizer
        self._compute = compute
        self._device = world.device
        self._ddp: DistributedDataParallel | None = None
        if world.size > 1:
            # Said once a rank, and meant: the price of the fixed order, and of channel-last depthwise weights.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self._ddp = DistributedDataParallel(
                module,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                find_unused_parameters=True,
            )
        self._names = {p: n for n, p in module.named_parameters() if p.requires_grad}

    def __call__(self, inputs: Inputs) -> LossTerms:
        run = self._ddp if self._ddp is not None else self._module
        with autocast(self._device, self._compute):
            terms = run(inputs)
        assert isinstance(terms, LossTerms)
        return terms

    @contextmanager
    def microbatch(self, sync: bool) -> Iterator[None]:
        with nullcontext() if self._ddp is None or sync else self._ddp.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, max_norm: float) -> Update:
        grads = [p.grad for p in self._names if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        finite = torch.isfinite(norm)
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self._names), max_norm, norm)
        # The fused step reads this flag on the device and leaves everything untouched where it is 1: no sync.
        self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update(grad_norm=norm.detach(), applied=finite)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": t for name, t in self._module.state_dict().items()}
        for p, name in self._names.items():
            tensors |= {f"optim.{name}.{key}": value for key, value in self._optimizer.state[p].items()}
        return tensors
