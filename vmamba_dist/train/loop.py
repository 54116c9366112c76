"""One training step in the order in which it happens, until the budget is spent.

Law: a resumed run repeats an unbroken one. What a step needs is derived from the state, or is in the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from torch import Tensor

from vmamba_dist.train.run import Outcome, Run

log = logging.getLogger(__name__)
T = TypeVar("T")


def lookahead(items: Iterable[T]) -> Iterator[tuple[bool, T]]:
    """Yield (is it the last, item)."""
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield False, item
        item = following
    yield True, item


def train(run: Run) -> Outcome:
    """Train until the budget, `run.max_steps`, or a stop request. A collective, step by step."""
    state, engine, progress = run.state, run.engine, run.progress
    while not (run.finished or run.paused):
        progress.begin(state.step + 1)
        lr = run.schedule(state.samples)
        engine.set_lr(lr)
        losses: list[Tensor] = []
        data_step = 0
        for last, inputs in lookahead(islice(run.feed, run.accumulate)):
            with engine.microbatch(sync=last):
                progress.at("forward")
                terms = engine(inputs)
                progress.at("backward")  # up to the last of these a rank works on its own
                engine.backward(terms.total / run.accumulate)
            losses.append(terms.total.detach())
            data_step = inputs.step
        progress.at("update")
        update = engine.update(run.clip)  # applies only where the norm is finite, decided on the device
        state.advance(samples=run.batch_size, data_step=data_step, steps_per_epoch=run.steps_per_epoch)
        if run.ema is not None:
            run.ema.update(state.step)

        epoch, step_in_epoch = divmod(data_step, run.steps_per_epoch)
        waited, bad = run.feed.tally()
        before = run.meter.record(
            step=state.step,
            data_step=data_step,
            epoch=epoch,
            seen=(step_in_epoch + 1) * run.batch_size,
            samples=state.samples,
            batch=run.batch_size,
            lr=lr,
            losses=losses,
            update=update,
            waited=waited,
            bad=bad,
            stop=run.stop.requested,
        )
        stopping = run.record.note(before)  # one step late: the reduction has had a step's time to finish

        at_end = run.finished or run.paused
        regular = run.finished or run.eval_every.due(state)
        evaluating = at_end or regular
        saving = at_end or run.save_every.due(state)
        if not (evaluating or saving or stopping):
            continue
        report = run.meter.drain()  # syncs host and device
        evaluation = run.evaluate(counts=regular) if evaluating else {}
        stopping = run.record.note(report, evaluation) or stopping
        is_best = run.save_best and regular and state.evals_since_best == 0
        if saving or stopping or is_best or run.finished:
            run.save(evaluation, wait=stopping or at_end)
        if stopping and not run.finished:
            log.info("asked to stop: saved step %d; the same command goes on from there", state.step)
            return Outcome.REQUEUE
        run.meter.restart_clock()
    return Outcome.FINISHED if run.finished else Outcome.PAUSED
