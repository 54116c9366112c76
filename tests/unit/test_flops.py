"""The closed form equals the published counts and what a real forward does."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba_dist.models import flops, list_models, ss2d
from vmamba_dist.models.variants import Variant, get_variant
from vmamba_dist.models.vmamba import VMamba

PUBLISHED = {  # parameters, GMACs at 224 px, as printed
    "vmamba_tiny_s1l8": (30_249_064, "4.906"),
    "vmamba_tiny_s2l5": (30_705_832, "4.858"),
    "vmamba_small_s1l20": (49_012_840, "8.612"),
    "vmamba_small_s2l15": (50_147_752, "8.716"),
    "vmamba_base_s1l20": (86_614_504, "15.221"),
    "vmamba_base_s2l15": (88_557_800, "15.359"),
    "vanilla_vmamba_tiny": (22_893_448, "5.627"),
    "vanilla_vmamba_small": (44_417_416, "11.232"),
    "vanilla_vmamba_base": (76_254_056, "18.020"),
    "vmamba_large": (193_714_408, "34.045"),
    "vmamba_xlarge": (387_547_112, "69.035"),
    "vmamba_huge": (708_044_520, "128.02"),
    "vmamba_giant": (1_274_532_328, "228.11"),
    "vmamba_2b": (1_998_515_176, "352.99"),
    "vmamba_atto": (511_784, None),
    "vmamba_femto": (2_115_688, None),
    "vmamba_pico": (6_229_672, None),
    "vmamba_nano": (12_266_216, None),
}

SIZES = (224, 256, 288, 320, 384, 448, 512, 640, 768, 1024)
BY_RESOLUTION = {
    "vmamba_tiny_s1l8": "4.91 6.41 8.11 10.01 14.41 19.62 25.63 40.04 57.66 102.50",
    "vmamba_tiny_s2l5": "4.86 6.34 8.03 9.91 14.27 19.43 25.38 39.65 57.09 101.50",
    "vmamba_small_s2l15": "8.72 11.38 14.41 17.79 25.61 34.86 45.53 71.14 102.45 182.13",
    "vmamba_small_s1l20": "8.61 11.25 14.24 17.58 25.31 34.45 44.99 70.30 101.23 179.96",
    "vmamba_base_s2l15": "15.36 20.06 25.39 31.34 45.13 61.43 80.24 125.37 180.53 320.95",
    "vmamba_base_s1l20": "15.22 19.88 25.16 31.06 44.73 60.88 79.52 124.24 178.91 318.06",
    "vanilla_vmamba_tiny": "5.63 7.35 9.30 11.48 16.53 22.51 29.39 45.93 66.14 117.58",
    "vanilla_vmamba_small": "11.23 14.67 18.57 22.92 33.01 44.92 58.68 91.68 132.02 234.70",
    "vanilla_vmamba_base": "18.02 23.54 29.79 36.77 52.95 72.08 94.14 147.09 211.81 376.55",
}


def _printed(macs: int, like: str) -> str:
    return f"{macs / 1e9:.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    params, gmacs = PUBLISHED[name]
    assert flops.params(name) == params
    if gmacs is not None:
        assert _printed(flops.macs(name, 224, 224), gmacs) == gmacs


def test_every_model_is_in_the_table() -> None:
    assert set(PUBLISHED) == set(list_models())


@pytest.mark.parametrize("name", BY_RESOLUTION)
def test_published_counts_by_resolution(name: str) -> None:
    wanted = BY_RESOLUTION[name].split()
    assert [_printed(flops.macs(name, s, s), w) for s, w in zip(SIZES, wanted, strict=True)] == wanted


@dataclass
class _Counter(TorchDispatchMode):
    """Counts the convention's operations from the shapes of the tensors that pass."""

    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def add(self, kind: str, count: int) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        match func.overloadpacket.__name__:
            case "convolution":
                self.add("conv", out.numel() * math.prod(args[1].shape[1:]))
            case "mm" | "bmm":
                self.add("linear", out.numel() * args[0].shape[-1])
            case "addmm":
                self.add("linear", out.numel() * args[1].shape[-1])
            case "native_layer_norm":
                self.add("norm", 5 * args[0].numel())
            case "mean":
                self.add("pool", args[0].numel())
            case "ss2d_scan":
                x, _, dt_weight, _, a, d = args[:6]
                tokens = x.shape[0] * x.shape[1] * x.shape[2]
                self.add("dt", tokens * dt_weight.numel())
                self.add("scan", tokens * (9 * a.numel() + d.numel()))
        return out


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    stages = draw(st.integers(1, 4))
    v1 = draw(st.booleans())
    return Variant(
        dims=tuple(draw(st.integers(1, 12)) * 2 for _ in range(stages)),
        depths=tuple(draw(st.integers(1, 2)) for _ in range(stages)),
        drop_path_rate=0.0,
        ssm_ratio=draw(st.sampled_from([0.5, 1.0, 1.5, 2.0])),
        d_state=draw(st.integers(1, 5)),
        mlp_ratio=draw(st.sampled_from([0.0, 0.5, 2.0, 4.0])),
        gate=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        patch_embed="v1" if v1 else "v2",
        downsample="v1" if draw(st.booleans()) else "v3",
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(variants(), st.integers(1, 13), st.integers(1, 13), st.integers(0, 7))
def test_closed_form_equals_a_counting_run(variant: Variant, rows: int, columns: int, classes: int) -> None:
    model = VMamba(variant, num_classes=classes).eval()
    with torch.no_grad(), _Counter() as counter:
        model(torch.zeros(1, 3, 4 * rows, 4 * columns))
    assert {"conv", "linear", "norm", "pool", "dt", "scan"} == set(counter.counts)
    assert flops.macs(variant, 4 * rows, 4 * columns, classes) == sum(counter.counts.values())
    assert flops.params(variant, classes) == sum(p.numel() for p in model.parameters())


def test_feature_sizes_are_the_models_own() -> None:
    model = VMamba(get_variant("vmamba_atto"), num_classes=0).eval()
    features = model.forward_intermediates(torch.zeros(1, 3, 36, 52), intermediates_only=True)
    assert [tuple(f.shape[2:]) for f in features if isinstance(f, Tensor)] == list(
        flops.feature_sizes("vmamba_atto", 36, 52)
    )


def test_training_is_six_operations_a_multiply_add() -> None:
    assert flops.train_flops_per_image("vmamba_nano", 64, 96, 10) == 6 * flops.macs("vmamba_nano", 64, 96, 10)


def test_an_image_that_no_patches_tile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30x64 px.*multiples of 4.*32x64"):
        flops.macs("vmamba_atto", 30, 64)


def test_counting_does_not_import_torch() -> None:
    code = (
        "import sys; from vmamba_dist.models import flops, list_models; "
        "flops.macs(list_models()[0], 32, 32); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_scan_counts_four_directions() -> None:
    assert flops._K == ss2d.K
