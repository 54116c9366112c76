"""When training is sick: say so, and name where it began.

Law: the verdict follows from numbers that are the same on all ranks, so every rank reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vmamba_dist.config.schema import UserError
from vmamba_dist.core.state import TrainState
from vmamba_dist.objectives.base import Inputs, LossTerms
from vmamba_dist.train.meter import Report

MAX_NONFINITE = 3


class TrainingStoppedError(UserError, RuntimeError):
    """Training cannot go on: the message says since when, where it began and with which samples."""


def note_step(state: TrainState, report: Report) -> bool:
    """Count the report's step; True where it is the third non-finite one in a row."""
    if report.applied:
        state.nonfinite_in_a_row = 0
        return False
    state.nonfinite += 1
    state.nonfinite_in_a_row += 1
    return state.nonfinite_in_a_row >= MAX_NONFINITE


def note_bad(state: TrainState, report: Report, *, fraction: float, epoch_samples: int) -> int | None:
    """Count the report's replaced samples; return how many were allowed by now where there were more, else None.

    The share is of the epoch; in a large one, of its first 10,000 samples or of what was seen, so that a
    wholly broken set stops early.
    """
    if report.epoch != state.bad_epoch:
        state.bad_epoch, state.bad_in_epoch = report.epoch, 0
    state.bad_in_epoch += report.bad
    # The sliver is for shares like 29 of 100, whose product is a little below the whole number.
    allowed = int(fraction * min(epoch_samples, max(report.seen, 10_000)) + 1e-9)
    return allowed if state.bad_in_epoch > allowed else None


def find_nonfinite(module: nn.Module, forward: Callable[[Inputs], LossTerms], inputs: Inputs) -> str | None:
    """Run one micro-batch again and name the first non-finite thing and its samples; None if all is finite.

    No collective: each rank looks at its own samples. The weights are those that the samples met, but for
    one finite step that may have come in between: a verdict is read a step late.
    """
    found: list[str] = []

    def look(name: str, tensors: object) -> None:
        for tensor in _tensors(tensors):
            if not found and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                found.append(name)

    for name, parameter in module.named_parameters():
        look(f"parameter {name}", parameter)
    look("input images", inputs.images)
    look("targets", inputs.targets)
    if found:
        return f"{found[0]}; {_samples(inputs.images.flatten(1).sum(1), inputs.keys)}"
    with _hooks(module, look):
        terms = forward(inputs)
    look("loss", terms.total)
    if not found:
        terms.total.backward()  # type: ignore[no-untyped-call]
        for name, parameter in module.named_parameters():
            look(f"gradient of {name}", parameter.grad)
        module.zero_grad(set_to_none=True)
    return f"{found[0]}; {_samples(terms.per_sample, inputs.keys)}" if found else None


@contextmanager
def _hooks(module: nn.Module, look: Callable[[str, object], None]) -> Iterator[None]:
    handles = [
        child.register_forward_hook(lambda _m, _i, output, name=name: look(f"output of {name}", output))
        for name, child in module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _samples(values: Tensor, keys: list[str]) -> str:
    sick = [key for key, fine in zip(keys, torch.isfinite(values).tolist(), strict=True) if not fine]
    named = sick or keys
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"samples {', '.join(named[:8])}{more}"
