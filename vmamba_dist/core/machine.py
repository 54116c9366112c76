"""The machine that this process runs on, in words. No torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The model of the processor as the kernel names it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()


def cores() -> int:
    """Processors of the machine, whether this process may use them all or not."""
    return os.cpu_count() or 1
