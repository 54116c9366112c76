"""When training is sick: say so, and name where it began.

Law: the verdict follows from numbers that are the same on all ranks, so every rank reaches it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vmamba_dist.config.schema import UserError
from vmamba_dist.core.dist import gather
from vmamba_dist.core.state import TrainState
from vmamba_dist.objectives.base import Inputs
from vmamba_dist.parallel.engine import Engine
from vmamba_dist.parallel.materialise import local
from vmamba_dist.train.meter import Report

MAX_NONFINITE = 3
WINDOW = 64  # losses that a spike is measured by
MIN_KNOWN = 16  # of them
MAX_NAMED = 8  # samples, and ranks, in a message
_OF_NO_SAMPLE = ("parameter ", "gradient of ")  # whose first dim is not the batch's


class TrainingStoppedError(UserError, RuntimeError):
    """Training cannot go on: the message says since when, where it began and with which samples."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a step, or with the last ones."""

    why: str
    steps: int  # how many, up to the report's
    finite: bool  # then no tensor gives it away
    fatal: bool  # then the run cannot go on from here


def note_step(state: TrainState, report: Report, *, spike: float) -> Verdict | None:
    """Count the report's step and judge it: the third non-finite one in a row, or a loss that is a spike.

    A spike is a loss that is not finite or above `spike` times the median of the last applied ones; 0: none is.
    """
    finite = math.isfinite(report.loss)
    usual = statistics.median(state.losses) if len(state.losses) >= MIN_KNOWN else math.inf
    if report.applied:
        state.nonfinite_in_a_row = 0
        state.losses = [*state.losses, report.loss][-WINDOW:] if finite else state.losses
    else:
        state.nonfinite += 1
        state.nonfinite_in_a_row += 1
    in_a_row = state.nonfinite_in_a_row
    if in_a_row >= MAX_NONFINITE:
        why = f"steps up to {report.step} gave {in_a_row} non-finite gradients in a row"
        return Verdict(why, in_a_row, finite=False, fatal=True)
    if spike and not finite:
        state.spikes += 1
        return Verdict(f"step {report.step}: the loss is {report.loss}", 1, finite=False, fatal=False)
    if spike and report.loss > spike * usual:
        state.spikes += 1
        why = (
            f"step {report.step}: the loss is {report.loss:.4g}, {report.loss / usual:.1f} times the usual "
            f"{usual:.4g}, and run.loss_spike={spike:g}"
        )
        return Verdict(why, 1, finite=True, fatal=False)
    return None


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


def autopsy(engine: Engine, batches: Iterable[Inputs]) -> str:
    """Run micro-batches again and say what was first non-finite, on which ranks, with which samples. A collective.

    The weights are those that the samples met, but for one finite step that may have come in between: a verdict
    is read a step late. What ranks hold in common accuses a rank only where none has seen anything of its own.
    """
    looks = [find_nonfinite(engine, inputs) for inputs in batches]
    for own in (True, False):
        told = gather(next((f.text for f in looks if f is not None and f.own == own), None))
        named = [f"rank {rank}: {what}" for rank, what in enumerate(told) if what is not None]
        if named:
            more = f"; and {len(named) - MAX_NAMED} more ranks" if len(named) > MAX_NAMED else ""
            return "; ".join(named[:MAX_NAMED]) + more
    return "every tensor is finite when the last samples are run again"


@dataclass(frozen=True)
class Finding:
    """The first non-finite thing that a rank saw."""

    text: str
    own: bool  # seen before ranks' gradients are summed, which carries it to all of them


def find_nonfinite(engine: Engine, inputs: Inputs) -> Finding | None:
    """Run one micro-batch again and name the first non-finite thing and its samples; None if all is finite.

    A collective: under some engines ranks meet in the forward and backward pass, so all go through both whatever
    they see. Gradients are left cleared.
    """
    found: list[tuple[str, Tensor]] = []  # its name, and whose values are finite

    def look(name: str, tensors: object) -> None:
        for tensor in _tensors(tensors):
            if not found and tensor.is_floating_point():
                finite = torch.isfinite(local(tensor))
                if not bool(finite.all()):  # syncs host and device
                    found.append((name, finite))

    for name, weight in engine.weights().items():
        look(f"parameter {name}", weight)
    look("input images", inputs.images)
    look("targets", inputs.targets)
    # Compiled code would pass the hooks by.
    with torch.compiler.set_stance("force_eager"), engine.microbatch(sync=True), _hooks(engine.module, look):
        terms = engine(inputs)
        look("loss", terms.total)
        engine.backward(terms.total)
    own = bool(found)
    for name, parameter in engine.module.named_parameters():
        look(f"gradient of {name}", parameter.grad)
    engine.module.zero_grad(set_to_none=True)
    if not found:
        return None
    what, finite = found[0]
    if what.startswith(_OF_NO_SAMPLE) or finite.dim() == 0 or len(finite) != len(inputs.keys):
        finite = torch.isfinite(terms.per_sample)
    return Finding(
        f"{what}; {_samples(finite.flatten(1).all(1) if finite.dim() > 1 else finite, inputs.keys)}", own
    )


@contextmanager
def _hooks(module: nn.Module, look: Callable[[str, object], None]) -> Iterator[None]:
    """Look at what every module gives, and at the gradients that come back to it and to the parameters.

    A hook on a gradient sees this rank's own, before it is summed over ranks.
    """

    def watch_output(name: str, output: object) -> None:
        look(f"output of {name}", output)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                watch_gradient(f"gradient at the output of {name}", tensor)

    def watch_gradient(name: str, tensor: Tensor) -> torch.utils.hooks.RemovableHandle:
        return tensor.register_hook(lambda gradient: look(name, gradient))  # type: ignore[no-untyped-call, no-any-return]

    with ExitStack() as handles:
        for name, child in module.named_modules():
            if name:
                handle = child.register_forward_hook(
                    lambda _m, _i, output, name=name: watch_output(name, output)
                )
                handles.callback(handle.remove)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                handles.callback(watch_gradient(f"gradient of {name}", parameter).remove)
        yield


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _samples(finite: Tensor, keys: list[str]) -> str:
    sick = [key for key, fine in zip(keys, finite.tolist(), strict=True) if not fine]
    named = sick or keys
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return f"samples {', '.join(named[:MAX_NAMED])}{more}"
