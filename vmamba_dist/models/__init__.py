"""Backbones: the table of variants, the model, its counts, and the official weight format.

Law: importing this package does not import torch; the names that need it load it on first use, because
the command line lists models and counts FLOPs within half a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vmamba_dist.models.variants import Variant, get_variant, list_models

if TYPE_CHECKING:
    from vmamba_dist.models.official import export_official, load_official
    from vmamba_dist.models.vmamba import VMamba, create_model

__all__ = [
    "create_model",
    "list_models",
    "VMamba",
    "Variant",
    "get_variant",
    "load_official",
    "export_official",
]

_HOME = {
    "VMamba": "vmamba",
    "create_model": "vmamba",
    "export_official": "official",
    "load_official": "official",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
