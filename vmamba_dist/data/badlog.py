"""bad.jsonl: which samples could not be used, why, and what took their place.

Law: a choice that was made once is used again on resume, and stands in the file once. A choice is known by its
position and by the sample that lies there, so that what another order left in the file is no choice of this
one. Every rank appends lines of its own, each in one write.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from vmamba_dist.data.batch import BadSample

log = logging.getLogger(__name__)


class BadLog:
    """Appends to bad.jsonl, and knows what earlier attempts wrote there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known = _read(path)
        self._written = {_place(bad) for bad in self.known}

    def note(self, found: Sequence[BadSample]) -> None:
        """Write what is new, and say it in the log."""
        new = [bad for bad in found if _place(bad) not in self._written]
        if not new:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(dataclasses.asdict(bad)) + "\n" for bad in new))
        for bad in new:
            self._written.add(_place(bad))
            log.warning(
                "epoch %d: sample %s (number %d of %s) is unusable: %s; %s takes its place",
                bad.epoch,
                bad.key or "?",
                bad.index,
                bad.shard,
                bad.reason,
                bad.replacement_key,
            )


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
