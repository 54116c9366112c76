"""Which rank the others wait for.

Law: a step takes as long as its slowest rank, so all see the same step time; what tells them apart is the time
that each works on its own. That is from the step's begin to the last backward pass, where gradients begin to be
summed. An engine whose forward pass gathers weights, or whose every micro-batch is reduced, makes the fast ranks
wait in there as well; then the time spent waiting for samples still tells, and a fixed product that each computes
alone, once a window (probe.py).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vmamba_dist.train.meter import Report

log = logging.getLogger(__name__)

BEHIND = 0.2  # of the median rank's time: from here on the slowest is named
QUIET_S = 300.0  # between two such warnings


@dataclass(frozen=True)
class Slowest:
    """The rank that is furthest behind the median one, and by what share of its time."""

    rank: int
    behind: float
    own: float  # seconds of its own work a step
    usual: float  # the median rank's
    wait: float  # seconds of its waiting for samples a step


def slowest(
    own: Sequence[float], waits: Sequence[float], step_time: float, product: Sequence[float] | None = None
) -> Slowest:
    """Find the slowest rank from each rank's seconds a step, and for the probe's product where it was timed.

    Own work and the product are compared with the median rank's; waiting, whose median may be nothing, with the
    step's time.
    """
    usual, usual_wait = statistics.median_low(own), statistics.median_low(waits)

    def behind(rank: int) -> float:
        late = max(_over_median(times, rank) for times in (own, product) if times is not None)
        return max(late, (waits[rank] - usual_wait) / step_time)

    rank = max(range(len(own)), key=behind)
    return Slowest(rank, behind(rank), own[rank], usual, waits[rank])


def _over_median(times: Sequence[float], rank: int) -> float:
    usual = statistics.median_low(times)
    return (times[rank] - usual) / usual if usual > 0 else 0.0


class Pace:
    """Averages the ranks' times over some steps and warns of a slow one. Rank 0's."""

    def __init__(self, hosts: Sequence[str], every: int) -> None:
        """`hosts`: where each rank runs; `every`: steps between two judgements."""
        self._hosts = hosts
        self._every = every
        self._reports: list[Report] = []
        self._quiet_until = 0.0
        self._skip = 1  # the first step compiles, connects and fills caches
        self._product: tuple[float, ...] | None = None  # of the window before

    def note(self, report: Report) -> None:
        """Take a step's times in; warn where one rank is more than 20 % behind over the last `every` steps."""
        if 0 in report.own:  # a step's own times come with the next one's report
            return
        if self._skip:
            self._skip -= 1
            return
        self._reports.append(report)
        if len(self._reports) < self._every:
            return
        reports, self._reports = self._reports, []
        ranks = range(len(self._hosts))
        product = self._twice(reports)
        found = slowest(
            [statistics.fmean(r.own[rank] for r in reports) for rank in ranks],
            [statistics.fmean(r.waits[rank] for r in reports) for rank in ranks],
            statistics.fmean(r.step_time for r in reports),
            product,
        )
        now = time.monotonic()
        if found.behind > BEHIND and now >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            log.warning(
                "rank %d on %s is %.0f%% behind the median rank over the last %d steps: %.3g s of its own a step "
                "(%.3g s of them waiting for samples) against %.3g s%s; the others wait for it",
                *(found.rank, self._hosts[found.rank], 100 * found.behind, len(reports)),
                *(found.own, found.wait, found.usual, _of_the_product(product, found.rank)),
            )

    def _twice(self, reports: Sequence[Report]) -> tuple[float, ...] | None:
        """Each rank's shorter time for the product in this window and the one before; None where one lacks it.

        One timing may be off by whatever else ran in that moment.
        """
        timed = [report.product for report in reports if all(report.product)]
        before, self._product = self._product, timed[-1] if timed else None
        return tuple(map(min, before, timed[-1])) if before is not None and timed else None


def _of_the_product(product: Sequence[float] | None, rank: int) -> str:
    if product is None:
        return ""
    return f", and {product[rank]:.3g} s for a fixed product against {statistics.median_low(product):.3g} s"
