"""`vmamba doctor`: what this machine can do, and the command that gets what is missing.

Law: looks and changes nothing. What is missing comes with its command, or with the plain word that no
command installs it. Only what a CPU needs to train decides the exit code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmamba_dist.config.schema import ConfigError

INSTALL = "pip install -c constraints.txt -e ."
# Forced: a torch that does not load, or a CPU build where CUDA is wanted, counts as installed for pip.
INSTALL_TORCH = "pip install --force-reinstall -c constraints.txt torch torchvision"
INSTALL_SLURM = "sudo apt-get install slurm-client  (Debian, Ubuntu; a cluster's login nodes have it)"
NEEDED_DISK_GIB = 2.0  # a run of the quick start, its data, and room for a checkpoint
NEEDED_MEMORY_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what is there, or what to do about it."""

    name: str
    state: str
    fix: str = ""  # the command, or that there is none; "" where nothing is missing
    needed: bool = False  # training on a CPU cannot do without

    @property
    def blocks(self) -> bool:
        return self.needed and bool(self.fix)

    def line(self) -> str:
        mark = "ok" if not self.fix else "MISSING" if self.needed else "-"
        hint = f"  →  {self.fix}" if self.fix else ""
        return f"{mark:<8}{self.name:<16}{self.state}{hint}"


def python() -> Finding:
    version = platform.python_version()
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding("python", version, "" if ok else "make install PYTHON=python3.11", needed=True)


def package(name: str, fix: str, *, needed: bool = False) -> Finding:
    """Whether a distribution is installed; it is not imported."""
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", fix, needed)


def program(name: str, purpose: str, fix: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path or f"not found ({purpose})", "" if path else fix)


def torch_findings() -> list[Finding]:
    """The torch that is installed, whether it loads, and the GPUs it sees."""
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a library of its own is missing
        return [Finding("torch", f"does not load: {error}", INSTALL_TORCH, needed=True)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = [
        Finding(
            "torch", f"{torch.__version__} ({build}), torchvision {importlib.metadata.version('torchvision')}"
        )
    ]
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    found.append(
        Finding("gloo", "yes" if gloo else "not in this torch", "" if gloo else INSTALL_TORCH, needed=True)
    )
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    no_gpu = "none: runs use the CPU"
    if Path("/proc/driver/nvidia/version").exists() and not count:
        found.append(Finding("GPUs", f"a driver, but torch ({build}) sees no device", INSTALL_TORCH))
    else:
        found.append(Finding("GPUs", f"{count} × {', '.join(names)}" if count else no_gpu))
    return found


def free_disk(path: Path) -> Finding:
    gib = shutil.disk_usage(path).free / 2**30
    fix = f"no command adds disk: free {NEEDED_DISK_GIB:g} GiB, or set run.dir to another disk"
    return Finding("disk", f"{gib:.1f} GiB free here", "" if gib >= NEEDED_DISK_GIB else fix, needed=True)


def memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    fix = "no command adds memory: use a machine with more, or add data.workers=0 to the command"
    return Finding("memory", f"{gib:.1f} GiB", "" if gib >= NEEDED_MEMORY_GIB else fix)


def cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "not set: jobs share the cores among their processes")
    return Finding("cores", f"{count}; OMP_NUM_THREADS {threads}")


def dependencies() -> list[Finding]:
    """The packages that ours names and that are not here."""
    try:
        named = importlib.metadata.requires("vmamba-dist") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("vmamba-dist", "used from its folder, not installed", INSTALL)]
    always = [re.split(r"[^A-Za-z0-9._-]", name, maxsplit=1)[0] for name in named if "extra ==" not in name]
    return [found for name in always if (found := package(name, INSTALL, needed=True)).fix]


def findings() -> list[Finding]:
    """Everything worth knowing, in the order in which it is needed."""
    checks: Iterable[Callable[[], list[Finding]]] = (
        lambda: [python()],
        torch_findings,
        dependencies,
        lambda: [cores(), memory(), free_disk(Path.cwd())],
        lambda: [package("triton", f"{INSTALL_TORCH}  (torch for CUDA brings it)")],
        lambda: [package("deepspeed", "pip install deepspeed")],
        lambda: [
            program("g++", "for torch.compile and DeepSpeed", "sudo apt-get install g++"),
            program("ninja", "for DeepSpeed", "pip install ninja"),
            program("srun", "to run on a Slurm cluster", INSTALL_SLURM),
            program("sbatch", "to submit to Slurm", INSTALL_SLURM),
        ],
    )
    return [finding for check in checks for finding in check()]


def main(words: Sequence[str]) -> int:
    """Print the findings; 0 where training on a CPU works, 1 where it cannot."""
    if words:
        raise ConfigError(f"vmamba doctor takes no words, got {' '.join(words)!r}")
    found = findings()
    print("\n".join(finding.line() for finding in found))
    blocked = [finding.name for finding in found if finding.blocks]
    print()
    if blocked:
        print(f"training does not work here yet: {', '.join(blocked)}")
        return 1
    print(
        "training on this machine works"
        + ("" if not any(f.fix for f in found) else "; - marks what is optional")
    )
    return 0
