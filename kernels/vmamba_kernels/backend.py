"""The one place that chooses an implementation: the user's word and a device become "torch" or "triton".

And that names a device's generation, by which kernels are cut.
"""

import importlib.util
import logging
import os
from functools import cache

import torch

BACKENDS = ("auto", "triton", "torch")

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_log = logging.getLogger(__name__)


class BackendError(RuntimeError):
    """The scan implementation that was asked for cannot run here."""


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """Return "torch" or "triton" for a request of auto, triton or torch on a device.

    auto is Triton on CUDA and the PyTorch path elsewhere. Raises ValueError for an unknown name and BackendError
    where the named implementation cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    kind = torch.device(device).type
    if backend == "torch":
        return "torch"
    if backend == "auto":
        chosen = "triton" if kind == "cuda" and _TRITON_IS_INSTALLED else "torch"
        if not torch.compiler.is_compiling():
            _announce(kind, chosen)
        return chosen
    if not _TRITON_IS_INSTALLED:
        raise BackendError("backend='triton' needs the package triton; use backend='auto' or 'torch'")
    if kind != "cuda" and not interpreted():
        raise BackendError(
            f"backend='triton' cannot run on {kind!r}: the kernels need a CUDA device; use backend='auto' or "
            "'torch' (or set TRITON_INTERPRET=1 before Python starts, for tests)"
        )
    return "triton"


def backend_for(backend: str, x: torch.Tensor) -> str:
    """Return resolve_backend's choice for a tensor; auto keeps float64 on the PyTorch path, as the kernels have none.

    Raises what resolve_backend raises, and BackendError for triton with float64.
    """
    chosen = resolve_backend(backend, x.device)
    if chosen == "triton" and x.dtype == torch.float64:
        if backend == "triton":
            raise BackendError(
                "backend='triton' computes in float32 and the input is float64; use backend='auto' or 'torch'"
            )
        return "torch"
    return chosen


@cache
def generation(device: torch.device) -> str:
    """Return the device generation that kernels' tables name: sm_90; or cpu, where kernels are interpreted."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Return whether a kernel may begin before the one before it ends (programmatic dependent launch: sm_90 and on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _announce(device_type: str, chosen: str) -> None:
    path = "as Triton kernels" if chosen == "triton" else "on the PyTorch path"
    _log.info("selective scans on %s run %s", device_type, path)
