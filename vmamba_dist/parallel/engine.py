"""The seam between the loop and what spreads it over devices.

Law: the loop knows these verbs and no engine's name. The norm exists only after `update`, and the update
applies only where it is finite, decided on the device: DeepSpeed can meet that contract, so all do.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from vmamba_dist.objectives.base import Inputs, LossTerms


@dataclass(frozen=True)
class Update:
    """The outcome of one step, on the device: reading either syncs, so the meter reads them a step later."""

    grad_norm: Tensor  # () before clipping, the same on every rank
    applied: Tensor  # () bool


class Engine(Protocol):
    """Forward, backward and step of one objective."""

    @property
    def module(self) -> nn.Module:
        """The objective itself, with the model's own parameter names."""
        ...

    def __call__(self, inputs: Inputs) -> LossTerms:
        """Forward under the configured precision."""
        ...

    def microbatch(self, sync: bool) -> AbstractContextManager[None]:
        """Around forward and backward; gradients are reduced only where `sync`."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def update(self, max_norm: float) -> Update:
        """Clip to the global norm (0: only measure), step where the norm is finite, clear the gradients."""
        ...

    def set_lr(self, lr: float) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        """The live float32 masters as this rank holds them, by the objective's own names.

        Whole tensors, DTensors, or whatever shares an engine keeps: what follows the weights, as an average
        does, has the same shapes.
        """
        ...

    def canonical(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors laid out as `weights()`, as a checkpoint stores them. A collective.

        Whole tensors that every rank holds, DTensors, or whole tensors of which a rank has its share: the names
        of all ranks together are the whole.
        """
        ...

    def take(self, held: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
        """Undo `canonical`: copy what a checkpoint filled into the tensors held. A collective."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The weights and moments in canonical form: model.<name>, optim.<name>.{exp_avg,exp_avg_sq,step}."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint filled into the tensors of `state()`. A collective."""
        ...

    def close(self) -> None:
        """Let go of the module and of what the engine has set up in the process; nothing can be asked afterwards."""
        ...


class LiveTensors:
    """The half of an engine that deals with checkpoints, where what one is made of are the live tensors themselves.

    `state()` and `canonical()` hand them out, and a checkpoint that is loaded fills them: nothing remains to be done.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def module(self) -> nn.Module:
        return self._module

    def weights(self) -> dict[str, Tensor]:
        return dict(self._module.state_dict(keep_vars=True))

    def canonical(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(held)

    def take(self, held: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
        """Nothing is left to copy: `canonical` gave out the tensors of `held`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is left to copy: `state` gave out the live tensors."""

    def close(self) -> None:
        """Nothing is left to let go of: weights are the module's, and a mesh's groups end with the process group."""
