"""The GPUs that training is planned for and measured on: one table of vendors' figures. No torch.

Law: a figure stands here once. Peaks are dense bf16 without sparsity; memory is what torch calls total_memory, a little
less than the name says; links are of one direction.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from vmamba_dist.config.schema import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str  # as a user writes it
    called: str  # part of the device's own name that tells it from others of the table
    generation: str  # as a kernel's table names it
    memory_gib: float
    bf16_tflops: float
    memory_tbs: float  # TB/s
    link_gbs: float  # GB/s to another GPU of the machine: NVLink, or PCIe


# Later rows with the same `called` are the same chip with another memory: for a peak the first is as good.
GPUS = (
    Gpu("b200-192", "B200", "sm_100", 178.0, 2250.0, 8.0, 900.0),
    Gpu("h200-141", "H200", "sm_90", 139.8, 989.0, 4.8, 450.0),
    Gpu("h100-80", "H100", "sm_90", 79.2, 989.0, 3.35, 450.0),
    Gpu("a100-80", "A100", "sm_80", 79.2, 312.0, 2.04, 300.0),
    Gpu("a100-40", "A100", "sm_80", 39.4, 312.0, 1.555, 300.0),
    Gpu("l40s-48", "L40S", "sm_89", 44.4, 362.0, 0.864, 32.0),
    Gpu("4090-24", "4090", "sm_89", 23.5, 165.0, 1.008, 32.0),
)


def gpu_named(name: str) -> Gpu:
    """Return the row that a user names. Raises ConfigError listing what there is."""
    known = [gpu.name for gpu in GPUS]
    if name in known:
        return GPUS[known.index(name)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"gpu={name}: not in the table; {hint}known: {', '.join(known)}")


def peak_tflops_of(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device by the name that it gives itself; None where unknown."""
    return next((gpu.bf16_tflops for gpu in GPUS if gpu.called in device_name), None)
