"""The models equal the official code: every vector of tests/golden, in float32 and where quick in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from golden_rule import parameter
from vmamba_dist.models import create_model, get_variant, load_official
from vmamba_dist.models.official import export_official
from vmamba_dist.models.ss2d import SS2D
from vmamba_dist.models.vmamba import Block, VMamba, _downsample, _patch_embed
from vmamba_kernels.testing import golden_tensor, relative_max

GOLDEN = Path(__file__).parents[1] / "golden"
MODULES = load_file(GOLDEN / "modules.safetensors")
VECTORS = load_file(GOLDEN / "models.safetensors")
MODELS = json.loads((GOLDEN / "models.json").read_text())

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # the vectors are stored in float32
DTYPES = [torch.float32, torch.float64]


def _module(case: str) -> tuple[nn.Module, str, tuple[int, ...]]:
    """A case's module, the layout of its vectors and the shape of its input."""
    pair = ("NCHW", (2, 32, 6, 10))
    match case:
        case "ss2d_v05_noz":
            return SS2D(32), *pair
        case "ss2d_v05_noz_r2":
            return SS2D(32, ssm_ratio=2.0), *pair
        case "ss2d_v05_unidi" | "ss2d_v05_bidi" | "ss2d_v05_cascade":
            pattern: Any = case.removeprefix("ss2d_v05_")
            return SS2D(32, ssm_ratio=2.0, scan_pattern=pattern), *pair
        case "ss2d_v0":
            return SS2D(32, ssm_ratio=2.0, d_state=4, gate=True, conv_bias=True), "NHWC", (2, 6, 10, 32)
        case "block":
            return Block(32, get_variant("vmamba_atto"), "cross2d", "auto"), "NCHW", (1, 32, 6, 10)
        case "patch_embed_v2":
            return _patch_embed("v2", 32, "auto"), "image", (1, 3, 24, 40)
        case "downsample_v3":
            return _downsample("v3", 32, 64, "auto"), "NCHW", (1, 32, 6, 10)
        case "downsample_v1":
            return _downsample("v1", 32, 64, "auto"), "NHWC", (1, 6, 10, 32)
    raise AssertionError(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sorted({name.split(".")[0] for name in MODULES}))
def test_a_module_and_all_its_gradients_equal_the_official_ones(case: str, dtype: torch.dtype) -> None:
    module, layout, shape = _module(case)
    module.to(dtype)
    grads = {k.removeprefix(f"{case}.grad."): v for k, v in MODULES.items() if k.startswith(f"{case}.grad.")}
    dx = grads.pop("x")
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(grads)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(parameter(f"{case}.{name}", tuple(grads[name].shape)).view(p.shape))

    x = golden_tensor(f"{case}.x", shape).to(dtype).requires_grad_(True)
    y = module(x.permute(0, 2, 3, 1) if layout == "NCHW" else x)
    y = y if layout == "NHWC" else y.permute(0, 3, 1, 2)
    y.backward(golden_tensor(f"{case}.dy", tuple(y.shape)).to(dtype))

    assert x.grad is not None
    errors = {"y": relative_max(y, MODULES[f"{case}.y"]), "x": relative_max(x.grad, dx)}
    for name, p in parameters.items():
        assert p.grad is not None, name
        errors[name] = relative_max(p.grad.view(grads[name].shape), grads[name])
    assert {k: v for k, v in errors.items() if v > TOLERANCE[dtype]} == {}


def _model(name: str) -> VMamba:
    atto = get_variant("vmamba_atto")
    match name:
        case "nano_s1":
            return VMamba(atto, num_classes=10)
        case "nano_s2":
            return VMamba(replace(atto, ssm_ratio=2.0), num_classes=10)
        case "nano_v0":
            vanilla = get_variant("vanilla_vmamba_tiny", dims=atto.dims, depths=atto.depths)
            return VMamba(vanilla, num_classes=10)
    return create_model(name)


def _golden_model(name: str, dtype: torch.dtype) -> VMamba:
    with torch.device("meta"):
        model = _model(name)
    model.to(dtype).to_empty(device="cpu").eval()
    load_official(model, {k: parameter(k, tuple(v.shape)) for k, v in export_official(model).items()})
    return model


def _stage_samples(model: VMamba, x: Tensor, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of one forward, and what the vectors hold of each stage."""
    samples: dict[str, Tensor] = {}
    embedded: list[Tensor] = []
    with model.patch_embed.register_forward_hook(lambda _m, _i, y: embedded.append(y)):
        final, stages = model.forward_intermediates(x, output_fmt="NHWC")
    for label, tokens in (("patch_embed", embedded[0]), *((f"stage{i}", s) for i, s in enumerate(stages))):
        official = tokens if layout == "NHWC" else tokens.permute(0, 3, 1, 2)
        samples[f"{label}.sample"] = official.flatten()[:64]
        samples[f"{label}.stats"] = torch.stack((tokens.mean(), tokens.std()))
    assert isinstance(final, Tensor)
    return model.forward_head(final), samples


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.float32) for n in MODELS] + [(n, torch.float64) for n in MODELS if n.startswith("nano")],
    ids=lambda v: str(v),
)
def test_logits_and_stages_equal_the_official_ones(name: str, dtype: torch.dtype) -> None:
    info = MODELS[name]
    model = _golden_model(name, dtype)
    assert sum(p.numel() for p in model.parameters()) == info["params"]
    exported = {k: list(v.shape) for k, v in export_official(model).items()}
    if isinstance(info["state_dict"], int):
        assert len(exported) == info["state_dict"]
    else:
        assert exported == info["state_dict"]

    x = 1.7 * golden_tensor("input", tuple(info["input"])).to(dtype)
    with torch.no_grad():
        logits, samples = _stage_samples(model, x, info["layout"])
    wanted = {k.removeprefix(f"{name}."): v for k, v in VECTORS.items() if k.startswith(f"{name}.")}
    errors = {"logits": relative_max(logits, wanted.pop("logits"))}
    errors |= {k: relative_max(samples[k], v) for k, v in wanted.items() if not k.startswith("gradnorm.")}
    assert len(errors) == 10
    assert {k: v for k, v in errors.items() if v > TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("nano")])
def test_gradient_norms_equal_the_official_ones(name: str, dtype: torch.dtype) -> None:
    model = _golden_model(name, dtype)
    x = 1.7 * golden_tensor("input", tuple(MODELS[name]["input"])).to(dtype)
    F.cross_entropy(model(x), torch.arange(x.shape[0]) % 10).backward()
    errors = {}
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        errors[key] = relative_max(p.grad.norm().view(1), VECTORS[f"{name}.gradnorm.{key}"])
    assert len(errors) == sum(k.startswith(f"{name}.gradnorm.") for k in VECTORS)
    assert {k: v for k, v in errors.items() if v > TOLERANCE[dtype]} == {}
