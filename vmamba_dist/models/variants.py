"""The table of backbones: plain data that torch is not needed to read.

Law: everything about an architecture that its parameters depend on stands in one `Variant`, and each name
has one row here. Rows marked official are the VMamba paper's (arXiv 2401.10166); the others are ours.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vmamba_dist.config.schema import ConfigError, ModelConfig

STRIDE = 4  # px a token of the first stage covers on a side


@dataclass(frozen=True)
class Variant:
    """One architecture; raises ValueError naming the field, its value and the fix."""

    dims: tuple[int, ...]  # width of each stage
    depths: tuple[int, ...]  # blocks in each stage
    drop_path_rate: float  # of the last block; blocks before it rise linearly from 0
    ssm_ratio: float = 1.0  # inner width of SS2D over the block's
    d_state: int = 1  # N, states a channel
    mlp_ratio: float = 4.0  # hidden width of the MLP over the block's; 0: no MLP branch
    gate: bool = False  # multiply the scan's output by SiLU(z), z from a doubled in_proj
    conv_bias: bool = False  # of the depthwise 3x3
    patch_embed: Literal["v1", "v2"] = "v2"  # v1: one 4x4 stride 4; v2: two overlapping 3x3 stride 2
    downsample: Literal["v1", "v3"] = "v3"  # v1: Swin's patch merging; v3: 3x3 stride 2

    def __post_init__(self) -> None:
        # YAML and JSON know lists only; equal architectures must compare equal.
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "depths", tuple(self.depths))
        self._require(
            bool(self.dims) and all(isinstance(d, int) and d > 0 for d in self.dims),
            "dims",
            "give one positive width a stage",
        )
        self._require(
            len(self.depths) == len(self.dims) and all(isinstance(d, int) and d > 0 for d in self.depths),
            "depths",
            f"give one positive number of blocks for each of the {len(self.dims)} stages of dims={self.dims}",
        )
        self._require(0 <= self.drop_path_rate < 1, "drop_path_rate", "use 0 … below 1")
        self._require(
            all(self.inner(d) >= 1 for d in self.dims),
            "ssm_ratio",
            "leave at least one inner channel a stage",
        )
        self._require(1 <= self.d_state <= 256, "d_state", "use 1 … 256, what the scan kernels hold")
        self._require(
            self.mlp_ratio == 0 or (self.mlp_ratio > 0 and all(self.hidden(d) >= 1 for d in self.dims)),
            "mlp_ratio",
            "use 0 for no MLP, or leave at least one hidden channel a stage",
        )
        self._require(self.patch_embed in ("v1", "v2"), "patch_embed", "use v1 or v2")
        self._require(
            self.patch_embed == "v1" or self.dims[0] % 2 == 0,
            "dims",
            "patch_embed=v2 goes through half the first width: make that even",
        )
        self._require(self.downsample in ("v1", "v3"), "downsample", "use v1 or v3")

    def _require(self, ok: bool, field: str, fix: str) -> None:
        if not ok:
            raise ValueError(f"{field}={getattr(self, field)!r}: {fix}")

    def inner(self, dim: int) -> int:
        """Channels that the scan of a block of width `dim` sees."""
        return int(self.ssm_ratio * dim)

    def hidden(self, dim: int) -> int:
        """Hidden channels of the MLP of a block of width `dim`."""
        return int(self.mlp_ratio * dim)

    @property
    def num_blocks(self) -> int:
        return sum(self.depths)


def dt_rank(dim: int) -> int:
    """R of a block of width `dim`: from the block's width, not from the scan's."""
    return math.ceil(dim / 16)


def check_image_size(height: int, width: int) -> None:
    """Raise ValueError unless whole tokens of 4 x 4 px tile the image."""
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        raise ValueError(
            f"image of {height}x{width} px (height x width): both must be multiples of {STRIDE}, the patch; "
            f"resize or pad to {_round_up(height)}x{_round_up(width)}"
        )


def _round_up(size: int) -> int:
    return max(STRIDE, math.ceil(size / STRIDE) * STRIDE)


def _doubling(first: int, stages: int = 4) -> tuple[int, ...]:
    return tuple(first << stage for stage in range(stages))


def _final(first: int, depths: tuple[int, ...], drop_path: float, ssm_ratio: float = 1.0) -> Variant:
    return Variant(_doubling(first), depths, drop_path, ssm_ratio)


def _vanilla(first: int, depths: tuple[int, ...], drop_path: float) -> Variant:
    return Variant(
        _doubling(first),
        depths,
        drop_path,
        ssm_ratio=2.0,
        d_state=16,
        mlp_ratio=0.0,
        gate=True,
        conv_bias=True,
        patch_embed="v1",
        downsample="v1",
    )


_VARIANTS: dict[str, Variant] = {
    # Ours, for studies and tests, in timm's order of sizes.
    "vmamba_atto": _final(16, (1, 1, 2, 1), 0.0),
    "vmamba_femto": _final(32, (1, 1, 4, 1), 0.0),
    "vmamba_pico": _final(48, (2, 2, 4, 2), 0.1),
    "vmamba_nano": _final(64, (2, 2, 6, 2), 0.1),
    # Official.
    "vmamba_tiny_s1l8": _final(96, (2, 2, 8, 2), 0.2),
    "vmamba_tiny_s2l5": _final(96, (2, 2, 5, 2), 0.2, ssm_ratio=2.0),
    "vmamba_small_s1l20": _final(96, (2, 2, 20, 2), 0.3),
    "vmamba_small_s2l15": _final(96, (2, 2, 15, 2), 0.3, ssm_ratio=2.0),
    "vmamba_base_s1l20": _final(128, (2, 2, 20, 2), 0.5),
    "vmamba_base_s2l15": _final(128, (2, 2, 15, 2), 0.6, ssm_ratio=2.0),
    "vanilla_vmamba_tiny": _vanilla(96, (2, 2, 9, 2), 0.2),
    "vanilla_vmamba_small": _vanilla(96, (2, 2, 27, 2), 0.3),
    "vanilla_vmamba_base": _vanilla(128, (2, 2, 27, 2), 0.6),
    # Ours, beyond Base: widths are multiples of 64. The drop path rates go on from Base's and are untuned.
    "vmamba_large": _final(192, (2, 2, 20, 2), 0.5),
    "vmamba_xlarge": _final(256, (2, 2, 24, 2), 0.6),
    "vmamba_huge": _final(320, (2, 2, 30, 2), 0.6),
    "vmamba_giant": _final(384, (3, 3, 36, 3), 0.6),
    "vmamba_2b": _final(512, (3, 3, 30, 3), 0.6),
}


def list_models() -> list[str]:
    """List the names `create_model` knows, smallest first within a family."""
    return list(_VARIANTS)


def get_variant(name: str, **overrides: Any) -> Variant:
    """Return the row of a name, with fields replaced; one number for `dims` doubles from stage to stage.

    Raises ValueError naming the nearest known name or option.
    """
    if name not in _VARIANTS:
        raise ValueError(f"model {name!r} is unknown{_nearest(name, list(_VARIANTS))}")
    known = [f.name for f in fields(Variant)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"{key}={overrides[key]!r}: a model has no such option{_nearest(key, known)}")
    row = _VARIANTS[name]
    if isinstance(overrides.get("dims"), int):
        overrides["dims"] = _doubling(overrides["dims"], len(overrides.get("depths", row.depths)))
    return replace(row, **overrides)


def overrides_of(model: ModelConfig) -> dict[str, Any]:
    """The fields of a config that replace those of the model it names."""
    given = {
        "dims": model.width,
        "depths": model.depths,
        "ssm_ratio": model.ssm_ratio,
        "drop_path_rate": model.drop_path,
    }
    return {key: value for key, value in given.items() if value is not None}


def configured(model: ModelConfig) -> Variant:
    """The architecture that a config means. Raises ConfigError naming the key, the value and the fix."""
    try:
        return get_variant(model.name, **overrides_of(model))
    except ValueError as error:
        raise ConfigError(f"model.name={model.name}: {error}") from error


def describe(model: ModelConfig) -> str:
    """The model's name, with what is replaced in it."""
    given = {"width": model.width, "depths": model.depths, "ssm_ratio": model.ssm_ratio}
    changed = [
        f"{key} {list(value) if isinstance(value, tuple) else value}"
        for key, value in given.items()
        if value is not None
    ]
    return model.name + (f" at {', '.join(changed)}" if changed else "")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return (
        f"; did you mean {close[0]}? Known: {', '.join(known)}" if close else f"; known: {', '.join(known)}"
    )
