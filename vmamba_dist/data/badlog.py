"""bad.jsonl: which samples could not be used, why, and what took their place.

Law: a choice that was made once is used again on resume, and stands in the file once. A choice is known by its
position and by the sample that lies there, so that what another order left in the file is no choice of this
one. Every rank appends lines of its own, each in one write. Lines that find no room wait in memory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from vmamba_dist.core.lines import WaitingLines
from vmamba_dist.data.batch import BadSample

log = logging.getLogger(__name__)


class BadLog(WaitingLines):
    """Appends to bad.jsonl, and knows what earlier attempts wrote there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known = _read(path)
        self._noted = {_place(bad) for bad in self.known}
        self._waiting = b""  # whole lines; data.max_bad_fraction bounds them
        self._failing = False

    @property
    def num_waiting(self) -> int:
        return self._waiting.count(b"\n")

    def close(self) -> None:
        """Write what waits; the file is not held open. Raises OSError where it cannot be written."""
        self.sync()

    def note(self, found: Sequence[BadSample]) -> None:
        """Write what is new, and say it in the log; where there is no room it is written later."""
        new = [bad for bad in found if _place(bad) not in self._noted]
        if not new:
            return
        self._waiting += "".join(json.dumps(dataclasses.asdict(bad)) + "\n" for bad in new).encode()
        try:
            self.sync()
        except OSError as error:
            if not self._failing:
                log.warning("%s; lines wait in memory until there is room", error)
            self._failing = True
        for bad in new:
            self._noted.add(_place(bad))
            log.warning(
                "epoch %d: sample %s (number %d of %s) is unusable: %s; %s takes its place",
                bad.epoch,
                bad.key or "?",
                bad.index,
                bad.shard,
                bad.reason,
                bad.replacement_key,
            )

    def sync(self) -> None:
        """Write the lines that wait. Raises OSError naming the file; what was not written is kept."""
        try:
            while self._waiting:
                count = _append(self._path, self._waiting)
                self._waiting = self._waiting[self._waiting.rfind(b"\n", 0, count) + 1 :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._failing = False


def _append(path: Path, lines: bytes) -> int:
    """Append lines in one write; return how many bytes of them found room.

    What a full disk tore, by whatever rank, is ended as a line of its own first.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        return max(0, os.write(descriptor, b"\n" * torn + lines) - torn)
    finally:
        os.close(descriptor)


def _place(bad: BadSample) -> tuple[int, int, str, int]:
    return bad.epoch, bad.position, bad.shard, bad.index


def cut_torn_line(path: Path) -> None:
    """Cut a last line that a kill tore, before anybody appends to it. Rank 0 alone, before the others start."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _read(path: Path) -> list[BadSample]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(BadSample(**json.loads(line)))
        except (ValueError, TypeError):
            log.warning("%s: not a line of ours, left out: %.60s", path, line)
    return found
