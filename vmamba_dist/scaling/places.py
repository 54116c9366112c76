"""Where a study's runs ran and for how long, by what each left: environment.json, attempts.jsonl, points/NAME.json.

Law: reads files only. What a run did not record is looked up on the machine that reads, if that is the one it ran on,
and left out where it is not.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmamba_dist.core.machine import cores, processor
from vmamba_dist.core.rundir import attempts

_VERSIONS = ("vmamba_dist", "torch", "torchvision", "numpy", "pillow", "python", "cuda")


@dataclass(frozen=True)
class Place:
    """Runs that had the same machine, processes and versions."""

    machine: str  # processor, cores, and GPU where there was one
    processes: int  # of a run
    threads: int  # of a process
    versions: str
    runs: int
    cut_off: int  # earlier starts of these runs, whose time is not known
    first: datetime  # start
    last: datetime  # end
    process_seconds: float  # of each run's last start


def places(root: Path, names: Sequence[str]) -> list[Place]:
    """Group the runs below a study's folder by where they ran, the most runs first."""
    groups: dict[tuple[str, int, int, str], list[tuple[float, float, int]]] = {}
    for name in names:
        starts = attempts(root / name)
        facts = _facts(root / name / "environment.json")
        if not starts or facts is None:
            continue
        began = datetime.fromisoformat(starts[-1].started).timestamp()
        key = (
            _machine(facts, starts[-1].host),
            int(facts.get("world_size", 1)),
            int(facts.get("threads", 1)),
            _versions(facts),
        )
        ended = max(began, _ended(root, name) or began)
        groups.setdefault(key, []).append((began, ended, len(starts) - 1))
    found = [
        Place(
            *key,
            len(spans),
            sum(span[2] for span in spans),
            datetime.fromtimestamp(min(span[0] for span in spans), UTC),
            datetime.fromtimestamp(max(span[1] for span in spans), UTC),
            key[1] * sum(end - start for start, end, _ in spans),
        )
        for key, spans in groups.items()
    ]
    return sorted(found, key=lambda place: -place.runs)


def _facts(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # torn by a kill: the next start writes it anew
        return None
    return found if isinstance(found, dict) else None


def _machine(facts: Mapping[str, Any], host: str) -> str:
    here = host == socket.gethostname()
    kind = facts.get("processor") or (processor() if here else facts.get("machine", "unknown"))
    count = facts.get("cores") or (cores() if here else None)
    gpu = "" if facts.get("device", "cpu") == "cpu" else f", {facts['device']}"
    return f"{kind}{f', {count} cores' if count else ''}{gpu}"


def _versions(facts: Mapping[str, Any]) -> str:
    told = [f"{name} {facts[name]}" for name in _VERSIONS if facts.get(name)]
    commit = [f"commit {str(facts['commit'])[:12]}"] if facts.get("commit") else []
    return ", ".join([*told, *commit])


def _ended(root: Path, name: str) -> float | None:
    """When the last start ended: as the sweep noted it, else when the run last wrote a metric; None: unknown."""
    try:
        return float(json.loads((root / "points" / f"{name}.json").read_text(encoding="utf-8"))["at"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    try:
        return (root / name / "metrics.jsonl").stat().st_mtime
    except FileNotFoundError:
        return None
