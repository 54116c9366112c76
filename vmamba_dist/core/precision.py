"""The arithmetic of a forward: bfloat16 autocast over float32 masters, or plain float32."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Literal

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(name: Literal["float32", "bfloat16"]) -> torch.dtype:
    """The dtype that `precision.compute` names."""
    return _DTYPES[name]


def autocast(device: torch.device, compute: torch.dtype) -> AbstractContextManager[None]:
    """Around a forward; training, evaluation and an autopsy use the same one."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute == torch.bfloat16)


def be_deterministic() -> None:
    """Choose operators that repeat bit for bit; on a GPU this costs some speed, on a CPU nothing.

    Before the first use of CUDA: cuBLAS reads its variable once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that would write every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
