"""Going back to the last checkpoint, past the data that led astray.

Law: what will be left out is on the disk (rollbacks.jsonl, fsynced) before anything goes back, and every start
adds it to the state that it loads. So a roll-back is a new start, and no kill brings a skipped step back.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmamba_dist.core.rundir import sync_directory
from vmamba_dist.core.state import TrainState

log = logging.getLogger(__name__)
Ranges = list[list[int]]  # [first, end) of data steps, ascending and apart


class RollBack(Exception):
    """This attempt ends here, on every rank; the next one begins at the newest checkpoint, past the bad data."""


@dataclass(frozen=True)
class Entry:
    """One roll-back: a line of rollbacks.jsonl."""

    number: int  # of the run's roll-backs, from 1
    step: int  # at which it was found
    skipped: Ranges
    why: str


def record(path: Path, entry: Entry) -> None:
    """Append an entry and put it on the disk. Rank 0 alone."""
    with path.open("ab") as file:
        # The newline in front ends a line that a kill tore.
        file.write((b"\n" if file.tell() else b"") + json.dumps(asdict(entry)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def recorded(path: Path) -> list[Entry]:
    """Every roll-back of the run, oldest first. A torn line is none: its attempt has not gone back."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Entry(**json.loads(line)))
        except (ValueError, TypeError):
            if line:
                log.warning("%s: not a whole line, left out: %.60s", path, line)
    return found


def apply(state: TrainState, entries: Sequence[Entry]) -> None:
    """Add to a loaded state what was recorded; a checkpoint older than a roll-back does not know of it."""
    for entry in entries:
        if entry.number > state.rollbacks:
            state.rollbacks = entry.number
            state.nonfinite_in_a_row = 0  # the row that ended in it is left out
        state.skipped = union(state.skipped, entry.skipped)
    if state.rollbacks:
        log.info("roll-backs so far: %d; left out: %s", state.rollbacks, name(state.skipped))


def union(a: Ranges, b: Ranges) -> Ranges:
    """The data steps of both, as ranges that are ascending and apart."""
    joined: Ranges = []
    for first, end in sorted([*a, *b]):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([first, end])
    return joined


def steps_up_to(data_step: int, count: int, skipped: Ranges) -> Ranges:
    """The last `count` data steps that were learned from, up to and with `data_step`, as ranges."""
    found: Ranges = []
    at = data_step
    for _ in range(count):
        for first, end in reversed(skipped):
            if first <= at < end:
                at = first - 1
        if at < 0:
            break
        found = union(found, [[at, at + 1]])
        at -= 1
    return found


def to_leave_out(data_step: int, count: int, skipped: Ranges) -> Ranges:
    """The data steps to blame where `count` of them, up to and with `data_step`, went astray.

    Where they follow on steps that are left out already, skipping those was no cure: the weights had gone
    astray before, so one step more is taken from before them.
    """
    blamed = steps_up_to(data_step, count, skipped)
    if any(end == blamed[0][0] for _, end in skipped):
        blamed = steps_up_to(data_step, count + 1, skipped)
    return blamed


def name(ranges: Ranges) -> str:
    """data steps 3, 7–9."""
    single = len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1
    parts = [f"{first}" if end == first + 1 else f"{first}–{end - 1}" for first, end in ranges]
    return f"data step{'' if single else 's'} {', '.join(parts)}"
