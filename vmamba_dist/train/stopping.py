"""Why a run ends before its budget: a signal, or an evaluation that no longer improves.

Law: a handler only sets a flag. Ranks learn of each other's flags through the meter's reduction, so all save
at the same step.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vmamba_dist.config.schema import EvalConfig
from vmamba_dist.core.state import TrainState

log = logging.getLogger(__name__)

# SIGUSR2: Slurm's time limit is near; SIGTERM: pre-emption or a launcher's end; SIGINT: Ctrl-C.
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
AGAIN_S = 2.0  # a terminal and a launcher both pass on one Ctrl-C


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._pid = os.getpid()

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked reader inherits the handler; it is not the one to stop
            return
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._since > AGAIN_S:
            raise KeyboardInterrupt  # a second Ctrl-C: do not wait for the save

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the stop signals while inside; the previous handlers come back after.

        A launcher may have blocked them so that none is lost, or kills, before there is a handler: one that came
        meanwhile is handled now.
        """
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def note_evaluation(state: TrainState, value: float, *, higher_is_better: bool) -> None:
    """Record one evaluation: it is the best so far, or one more since the best. A NaN is never the best."""
    better = state.best is None or (value > state.best if higher_is_better else value < state.best)
    if better and not math.isnan(value):
        state.best, state.evals_since_best = value, 0
    else:
        state.evals_since_best += 1


def out_of_patience(state: TrainState, cfg: EvalConfig) -> bool:
    """True where early stopping is on and the last `eval.patience` evaluations brought nothing."""
    return cfg.patience > 0 and state.evals_since_best >= cfg.patience
