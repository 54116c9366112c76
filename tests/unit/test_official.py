"""Official weights come in strictly and go out unchanged."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from vmamba_dist.models import VMamba, create_model, export_official, get_variant, load_official
from vmamba_dist.models.official import official_shapes
from vmamba_dist.models.variants import Variant

FINAL = get_variant("vmamba_atto")
VANILLA = get_variant("vanilla_vmamba_tiny", dims=FINAL.dims, depths=FINAL.depths)
BOTH = pytest.mark.parametrize("variant", [FINAL, VANILLA], ids=["final", "vanilla"])


def _weights(model: VMamba, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) for k, s in official_shapes(model).items()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@BOTH
def test_export_of_load_is_the_identity(variant: Variant) -> None:
    model = VMamba(variant, num_classes=7)
    weights = _weights(model)
    load_official(model, weights)
    assert _equal(export_official(model), weights)
    assert _equal(load(save(export_official(model))), weights)


def test_load_of_export_is_the_identity() -> None:
    one, other = VMamba(FINAL, num_classes=7), VMamba(FINAL, num_classes=7)
    load_official(other, export_official(one))
    assert _equal(dict(one.state_dict()), dict(other.state_dict()))


def test_shapes_of_the_recurrence_are_the_official_ones() -> None:
    shapes = official_shapes(create_model("vmamba_atto"))
    op = "layers.1.blocks.0.op"  # width 32: R = 2, N = 1
    assert shapes[f"{op}.x_proj_weight"] == (4, 4, 32)
    assert shapes[f"{op}.dt_projs_weight"] == (4, 32, 2)
    assert shapes[f"{op}.dt_projs_bias"] == (4, 32)
    assert shapes[f"{op}.A_logs"] == (128, 1)
    assert shapes[f"{op}.Ds"] == (128,)


def test_a_checkpoint_is_unwrapped_by_its_key() -> None:
    model = VMamba(FINAL, num_classes=7)
    raw, averaged = _weights(model, 1), _weights(model, 2)
    checkpoint = {"model": raw, "model_ema": averaged, "optimizer": {"state": {}}, "epoch": 3}
    load_official(model, checkpoint)
    assert _equal(export_official(model), raw)
    load_official(model, checkpoint, key="model_ema")
    assert _equal(export_official(model), averaged)
    with pytest.raises(ValueError, match=r"key='ema'.*model, model_ema"):
        load_official(model, checkpoint, key="ema")
    with pytest.raises(ValueError, match=r"key='model'.*holds model_ema"):
        load_official(model, {"model_ema": averaged})
    with pytest.raises(ValueError, match=r"key='model_ema'.*holds none"):
        load_official(model, raw, key="model_ema")


def test_linears_may_be_stored_as_1x1_convolutions() -> None:
    model = VMamba(VANILLA, num_classes=7)
    weights = _weights(model)
    linear = re.compile(r"(in_proj|out_proj|reduction|head)\.weight$")
    stored = {k: v[..., None, None] if linear.search(k) else v for k, v in weights.items()}
    assert sum(v.shape != weights[k].shape for k, v in stored.items()) == 2 * 5 + 3 + 1
    load_official(model, stored)
    assert _equal(export_official(model), weights)


def test_names_of_the_first_release_are_known() -> None:
    model = VMamba(VANILLA, num_classes=7)
    weights = _weights(model)
    renames = [
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.2\.", "patch_embed.norm."),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"(blocks\.\d+)\.op\.", r"\1.self_attention."),
        (r"^classifier\.norm\.", "norm."),
        (r"^classifier\.head\.", "head."),
    ]
    legacy = {}
    for name, value in weights.items():
        spelled = name
        for pattern, replacement in renames:
            spelled = re.sub(pattern, replacement, spelled)
        legacy[spelled] = value
    assert sum(name in weights for name in legacy) == 3 * 3  # the downsamples alone keep their names
    load_official(model, legacy)
    assert _equal(export_official(model), weights)


@BOTH
def test_names_of_the_one_file_model_are_known(variant: Variant) -> None:
    model = VMamba(variant, num_classes=7)
    weights = _weights(model)
    one_file = {}
    for name, value in weights.items():
        spelled = name.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight")
        spelled = spelled.replace("downsample.norm", "downsample.1").replace(
            "downsample.reduction", "downsample.2"
        )
        one_file[spelled] = (
            value.flatten(0, 1) if spelled.endswith("projs.weight") or "x_proj." in spelled else value
        )
    load_official(model, one_file)
    assert _equal(export_official(model), weights)


def test_one_error_names_everything_that_does_not_fit_and_nothing_is_changed() -> None:
    model = VMamba(FINAL, num_classes=7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = _weights(model)
    missing = ["layers.0.blocks.0.op.Ds", "classifier.head.bias"]
    for name in missing:
        del weights[name]
    weights["pos_embed"] = torch.zeros(1)
    weights["layers.9.blocks.0.norm.weight"] = torch.zeros(1)
    weights["layers.0.blocks.0.op.x_proj_weight"] = torch.zeros(4, 16, 3)
    weights["layers.0.blocks.0.op.A_logs"] = torch.zeros(4, 16, 1)
    weights["layers.0.blocks.0.op.conv2d.weight"] = torch.zeros(16, 1, 3, 3, 1, 1)
    with pytest.raises(ValueError) as caught:
        load_official(model, weights)
    text = str(caught.value)
    for name in missing:
        assert f"missing {name} " in text
    for name in ("pos_embed", "layers.9.blocks.0.norm.weight"):
        assert f"unexpected {name}" in text
    assert "layers.0.blocks.0.op.x_proj_weight is (4, 16, 3), must be (4, 3, 16)" in text
    assert "layers.0.blocks.0.op.A_logs is (4, 16, 1), must be (64, 1)" in text
    assert "layers.0.blocks.0.op.conv2d.weight is (16, 1, 3, 3, 1, 1)" in text
    assert len(text.splitlines()) == 1 + 7
    assert _equal(before, dict(model.state_dict()))


def test_two_names_for_one_parameter_are_an_error() -> None:
    model = VMamba(FINAL, num_classes=7)
    weights = _weights(model)
    weights["head.bias"] = weights["classifier.head.bias"]
    with pytest.raises(
        ValueError, match=r"classifier\.head\.bias and head\.bias are both classifier\.head\.bias"
    ):
        load_official(model, weights)


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = create_model("vmamba_atto")
    weights = {k: torch.zeros(s) for k, s in official_shapes(model).items()}
    with pytest.raises(ValueError, match="to_empty"):
        load_official(model, weights)


def test_gradients_flow_after_loading() -> None:
    model = VMamba(FINAL, num_classes=7)
    load_official(model, _weights(model))
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
