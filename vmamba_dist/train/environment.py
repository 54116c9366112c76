"""The facts that bit-for-bit repetition rests on, recorded at each start.

Law: the identity promise holds where these are equal; a resume says which one changed.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

import vmamba_dist
from vmamba_dist.config.schema import Config
from vmamba_dist.core.dist import World
from vmamba_dist.core.machine import cores, processor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """Where a run computes."""

    world_size: int
    engine: str
    device: str
    machine: str  # the processor's kind
    processor: str  # its model
    cores: int  # of the machine
    threads: int  # of torch, a process
    micro_batch: int | None
    recompute: str
    compile: str
    torch: str
    torchvision: str  # these three make the pixels and the order
    pillow: str
    numpy: str
    cuda: str | None
    python: str
    vmamba_dist: str
    commit: str | None  # of the checkout that the code comes from


def describe_environment(cfg: Config, world: World) -> Environment:
    """Look at this process."""
    cuda = world.device.type == "cuda"
    return Environment(
        world_size=world.size,
        engine=cfg.parallel.engine,
        device=torch.cuda.get_device_name(world.device) if cuda else "cpu",
        machine=platform.machine(),
        processor=processor(),
        cores=cores(),
        threads=torch.get_num_threads(),
        micro_batch=cfg.parallel.micro_batch,
        recompute=cfg.parallel.recompute,
        compile=cfg.parallel.compile,
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        pillow=PIL.__version__,
        numpy=np.__version__,
        cuda=torch.version.cuda if cuda else None,
        python=platform.python_version(),
        vmamba_dist=vmamba_dist.__version__,
        commit=_commit(),
    )


def record_environment(path: Path, now: Environment) -> None:
    """Write environment.json, and log what differs from the start before."""
    facts = asdict(now)
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}  # torn by a kill: nothing to compare with
        for key, value in facts.items():
            if key in before and before[key] != value:
                log.warning(
                    "%s was %s at the start before, now %s: losses may differ by rounding",
                    key,
                    before[key],
                    value,
                )
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _commit() -> str | None:
    root = Path(vmamba_dist.__file__).resolve().parent.parent
    snapshot = root / "SNAPSHOT.json"  # as cluster/snapshot.py writes it
    if snapshot.exists():
        commit = json.loads(snapshot.read_text(encoding="utf-8"))["commit"]
        return None if commit is None else str(commit)
    if not (root / ".git").exists():
        return None
    told = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return told.stdout.strip() or None
