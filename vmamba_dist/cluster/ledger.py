"""What happened to a run on Slurm: a line for each begin and each end of a start, in RUN/slurm/starts.jsonl.

Law: lines are only added, each put on the disk before what it announces is done; a line torn by a kill is no line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

LEDGER = Path("slurm") / "starts.jsonl"  # in a run directory


@dataclass(frozen=True)
class Line:
    """A line of the ledger: a start's begin or its end."""

    event: Literal["begin", "end", "resubmitted"]
    folder: str  # of the submission, below RUN/slurm: its name
    job: str
    restart: int
    step: int  # of the newest checkpoint at that moment
    nodes: str = ""
    code: int = 0  # srun's
    verdict: str = ""
    why: str = ""
    successor: str = ""  # the job that it goes on as
    counts: bool = True  # against the run, where it brought no new checkpoint
    at: str = ""


def append(run: Path, line: Line) -> None:
    """Add a line to the run's ledger, and put it on the disk."""
    path = run / LEDGER
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with path.open("ab") as file:
        # The newline in front ends a line that a kill tore.
        text = json.dumps(asdict(line) | {"at": now}, ensure_ascii=False)
        file.write((b"\n" if file.tell() else b"") + text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(run: Path) -> list[Line]:
    """What is known of the starts of a run on Slurm, oldest first; torn lines are left out."""
    path = run / LEDGER
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            lines.append(Line(**json.loads(text)))
        except (ValueError, TypeError):
            continue  # torn by a kill
    return lines


def last(run: Path) -> Line | None:
    """The newest line; None before the first start."""
    lines = read(run)
    return lines[-1] if lines else None


def fruitless_starts(lines: Sequence[Line], step: int) -> int:
    """How many of the last starts brought no new checkpoint; `step` is the newest one's now.

    A start without an end went down with its machine, and counts: a job may take machines down. One that somebody
    ended from outside does not.
    """
    count = 0
    after = step
    ended: Line | None = None
    for line in reversed(lines):
        if line.event == "end":
            ended = line
        elif line.event == "begin":
            if line.step < after:
                return count
            count += ended is None or ended.counts
            after, ended = line.step, None
    return count
