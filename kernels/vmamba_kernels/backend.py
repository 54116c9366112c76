"""The one place that chooses an implementation: the user's word and a device become "torch" or "triton"."""

import logging
from functools import cache

import torch

BACKENDS = ("auto", "triton", "torch")

_log = logging.getLogger(__name__)


class BackendError(RuntimeError):
    """The scan implementation that was asked for cannot run here."""


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """Return "torch" or "triton" for a request of auto, triton or torch on a device.

    Raises ValueError for an unknown name and BackendError where the named implementation cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise BackendError(
            f"backend='triton' cannot run on {torch.device(device).type!r}: this version has no Triton path "
            "(and it will need a CUDA device); use backend='auto' or 'torch'"
        )
    if backend == "auto" and not torch.compiler.is_compiling():
        _announce(torch.device(device).type)
    return "torch"


@cache
def _announce(device_type: str) -> None:
    _log.info("selective scans on %s run on the PyTorch path", device_type)
