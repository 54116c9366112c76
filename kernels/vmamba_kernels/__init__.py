"""Selective scans for image backbones: a readable definition beside fast paths, one custom op for each.

On CUDA the ops run as Triton kernels, elsewhere on plain torch; needs these two alone and imports nothing of the
training package.
"""

from vmamba_kernels.backend import BackendError, resolve_backend
from vmamba_kernels.scan.op import selective_scan
from vmamba_kernels.ss2d.op import ss2d_scan
from vmamba_kernels.ss2d.order import PATTERNS, scan_order

__all__ = [
    "selective_scan",
    "ss2d_scan",
    "scan_order",
    "PATTERNS",
    "resolve_backend",
    "BackendError",
]
