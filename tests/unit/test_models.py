"""The backbones: what a user of timm expects, drop path by masks, initial values by name, one precision law."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm.models
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_dist.models import Variant, VMamba, create_model, flops, get_variant, list_models, ss2d
from vmamba_dist.models.init import Init, init_tensor
from vmamba_dist.models.vmamba import Block, PatchMerging
from vmamba_kernels import BackendError
from vmamba_kernels.testing import golden_tensor, relative_max

VANILLA = get_variant("vanilla_vmamba_tiny", dims=(16, 32, 64, 128), depths=(1, 1, 2, 1))
PATTERNS = ("cross2d", "unidi", "bidi", "cascade")


def _atto(seed: int = 0, **options: Any) -> VMamba:
    model = create_model("vmamba_atto", **{"num_classes": 10, **options})
    model.init_weights(seed)
    return model


def _images(batch: int, height: int, width: int) -> Tensor:
    return golden_tensor(f"images {batch} {height} {width}", (batch, 3, height, width)).float()


def _gradients(model: VMamba, x: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x, keep), torch.arange(len(x)) % 10).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", list_models())
def test_every_model_has_the_parameters_of_the_table(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == flops.params(name)
    assert not list(model.buffers())


@pytest.mark.parametrize("variant", [get_variant("vmamba_atto"), VANILLA], ids=["final", "vanilla"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 20), (36, 52), (32, 8)], ids=str)
def test_any_size_of_whole_patches_works(variant: Variant, height: int, width: int) -> None:
    model = VMamba(variant, num_classes=10)
    assert model(_images(2, height, width)).shape == (2, 10)
    tokens = model.forward_features(_images(2, height, width))
    assert tokens.shape == (2, -(-height // 32), -(-width // 32), 128)


def test_odd_sizes_are_padded_right_and_below_when_merged() -> None:
    merge = PatchMerging(8, 16)
    for p in merge.parameters():
        torch.nn.init.normal_(p)
    x = golden_tensor("merge", (1, 5, 7, 8)).float()
    assert torch.equal(merge(x), merge(F.pad(x, (0, 0, 0, 1, 0, 1))))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scan_patterns_share_parameters_and_differ_in_result(pattern: Any) -> None:
    one, other = _atto(), _atto(scan_pattern=pattern)
    x = _images(1, 32, 32)
    assert _same(dict(one.state_dict()), dict(other.state_dict()))
    assert torch.equal(one(x), other(x)) == (pattern == "cross2d")


def test_an_override_changes_the_architecture() -> None:
    model = create_model("vmamba_atto", dims=[8, 24], depths=[1, 2], d_state=3, mlp_ratio=0, gate=True)
    assert model(_images(1, 12, 8)).shape == (1, 1000)
    assert (model.num_features, model.num_blocks) == (24, 3)
    assert get_variant("vanilla_vmamba_tiny", dims=16, depths=(1, 1, 2)).dims == (16, 32, 64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create_model("vmamba_tiny"), r"'vmamba_tiny' is unknown; did you mean vmamba_tiny_s"),
        (lambda: create_model("vmamba_atto", ssm_ration=2), r"ssm_ration=2: .*did you mean ssm_ratio"),
        (lambda: create_model("vmamba_atto", depths=(1, 2)), r"depths=\(1, 2\): .*4 stages"),
        (lambda: create_model("vmamba_atto", depths=(1, 2, 0, 1)), r"depths=\(1, 2, 0, 1\)"),
        (lambda: create_model("vmamba_atto", dims=(15, 30, 60, 120)), r"dims=\(15, .*even"),
        (lambda: create_model("vmamba_atto", drop_path_rate=1.0), r"drop_path_rate=1.0"),
        (lambda: create_model("vmamba_atto", ssm_ratio=0.01), r"ssm_ratio=0.01"),
        (lambda: create_model("vmamba_atto", mlp_ratio=-1), r"mlp_ratio=-1"),
        (lambda: create_model("vmamba_atto", d_state=0), r"d_state=0"),
        (lambda: create_model("vmamba_atto", patch_embed="v3"), r"patch_embed='v3': use v1 or v2"),
        (lambda: create_model("vmamba_atto", downsample="v2"), r"downsample='v2': use v1 or v3"),
        (
            lambda: create_model("vmamba_atto", scan_pattern="cross"),
            r"scan_pattern='cross': use one of cross2d",
        ),
        (lambda: create_model("vmamba_atto", scan_backend="cuda"), r"scan_backend='cuda': use one of auto"),
        (lambda: create_model("vmamba_atto", num_classes=-1), r"num_classes=-1"),
        (lambda: _atto()(torch.zeros(1, 3, 32, 30)), r"32x30 px.*multiples of 4.*32x32"),
        (lambda: _atto()(torch.zeros(1, 1, 32, 32)), r"\(1, 1, 32, 32\).*\(B, 3, H, W\)"),
        (lambda: _atto()(torch.zeros(2, 3, 8, 8), torch.ones(2, 5)), r"keep of shape \(2, 5\).*\(2, 10\)"),
        (lambda: _atto().reset_classifier(3, "max"), r"global_pool='max'"),
        (lambda: _atto().forward_intermediates(torch.zeros(1, 3, 8, 8), 5), r"indices=5: .*1 … 4"),
        (lambda: _atto().forward_intermediates(torch.zeros(1, 3, 8, 8), [4]), r"indices=\[4\]: .*0 … 3"),
        (lambda: _atto().forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NLC"), r"'NLC'"),
    ],
)
def test_a_mistake_is_named_with_its_value(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_rates_rise_linearly_over_all_blocks() -> None:
    assert _atto(drop_path_rate=0.4).drop_path_rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert create_model("vmamba_atto", dims=(16,), depths=(1,), drop_path_rate=0.4).drop_path_rates == [0]


def test_masks_scale_the_two_branches_of_each_block() -> None:
    block = Block(16, get_variant("vmamba_atto"), "cross2d", "auto")
    block.load_state_dict(_atto().layers[0].blocks[0].state_dict())
    x, keep = golden_tensor("tokens", (2, 3, 5, 16)).float(), torch.tensor([[0.0, 1.5], [2.0, 0.0]])
    first = x + keep[:, 0].view(2, 1, 1, 1) * block.op(block.norm(x))
    second = first + keep[:, 1].view(2, 1, 1, 1) * block.mlp(block.norm2(first))
    torch.testing.assert_close(block(x, keep), second, rtol=0, atol=0)


@pytest.mark.parametrize("variant", [get_variant("vmamba_atto"), VANILLA], ids=["final", "vanilla"])
def test_a_masks_columns_are_the_blocks_branches_in_order(variant: Variant) -> None:
    """A branch's parameters get no gradient exactly where its column is 0; vanilla blocks ignore the odd ones."""
    model = VMamba(variant, num_classes=10)
    names = [f"layers.{s}.blocks.{b}" for s, depth in enumerate(variant.depths) for b in range(depth)]
    x = _images(2, 64, 64)  # a single token in the last stage would leave its A without a gradient
    for block, name in enumerate(names):
        for branch, leaf in ((0, "op.out_proj.weight"), (1, "mlp.fc2.weight")):
            keep = torch.ones(2, 2 * len(names))
            keep[:, 2 * block + branch] = 0
            silent = {k for k, g in _gradients(model, x, keep).items() if not g.any()}
            owned = {k for k in dict(model.named_parameters()) if k == f"{name}.{leaf}"}
            assert silent >= owned
            assert not {k for k in silent if not k.startswith(f"{name}.")}


def test_masks_of_ones_are_no_masks_and_each_sample_has_its_own() -> None:
    model, x = _atto(drop_path_rate=0.5).eval(), _images(3, 32, 32)
    keep = torch.ones(3, 10)
    assert torch.equal(model(x, keep), model(x))
    keep[1] = 0
    mixed = model(x, keep)
    torch.testing.assert_close(mixed[[0, 2]], model(x)[[0, 2]])
    torch.testing.assert_close(mixed[1:2], model(x[1:2], torch.zeros(1, 10)))


def test_training_draws_masks_from_the_global_generator() -> None:
    model, x = _atto(drop_path_rate=0.5).train(), _images(4, 32, 32)
    torch.manual_seed(1)
    one = model(x)
    torch.manual_seed(1)
    assert torch.equal(one, model(x))
    assert not torch.equal(one, model(x))
    assert torch.equal(model(x, torch.ones(4, 10)), model.eval()(x))


def test_drawn_masks_drop_at_the_blocks_rate_and_keep_the_mean() -> None:
    torch.manual_seed(0)
    model = _atto(drop_path_rate=0.4).train()
    keep = model._draw_keep(torch.zeros(20_000, 3, 1, 1))
    assert keep is not None
    rates = np.repeat([0, 0.1, 0.2, 0.3, 0.4], 2)
    np.testing.assert_allclose((keep == 0).double().mean(0), rates, atol=0.015)
    np.testing.assert_allclose(keep.double().mean(0), 1, atol=0.02)


def test_recomputing_blocks_changes_no_bit() -> None:
    model, x = _atto(drop_path_rate=0.5).train(), _images(2, 32, 32)
    torch.manual_seed(3)
    plain = _gradients(model, x)
    model.set_grad_checkpointing()
    torch.manual_seed(3)
    assert _same(plain, _gradients(model, x))
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


def test_values_depend_on_name_and_seed_only() -> None:
    with torch.device("meta"):
        late = create_model("vmamba_atto", num_classes=10)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    late.init_weights(5)
    assert _same(dict(late.state_dict()), dict(_atto(5).state_dict()))
    assert not _same(dict(late.state_dict()), dict(_atto(6).state_dict()))

    deeper = create_model("vmamba_atto", num_classes=3, depths=(2, 3, 2, 1), scan_pattern="bidi")
    deeper.init_weights(5)
    mine, theirs = dict(late.state_dict()), dict(deeper.state_dict())
    shared = mine.keys() & theirs.keys() - {"classifier.head.weight", "classifier.head.bias"}
    assert len(shared) == len(mine) - 2
    assert all(torch.equal(mine[k], theirs[k]) for k in shared)


def test_values_are_pinned() -> None:
    """A change of these would silently change every run's start."""
    values = init_tensor("layers.0.blocks.0.op.in_proj.weight", (16, 16), 0, Init("normal", 0.02))
    assert values.dtype == torch.float32
    assert values.flatten()[:3].tolist() == pytest.approx(
        [0.0193483867, 0.0176476818, -0.0424598716], rel=1e-6
    )


def test_torch_manual_seed_decides_a_plain_construction() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return dict(create_model("vmamba_atto", num_classes=10).state_dict())

    assert _same(build(1), build(1))
    assert not _same(build(1), build(2))


def test_initial_values_follow_the_official_distributions() -> None:
    model = create_model("vmamba_pico", d_state=4)
    model.init_weights(0)
    p = {k: v.detach().double() for k, v in model.named_parameters()}
    op = "layers.3.blocks.1.op"  # width 384 = inner, R = 24
    for name in (f"{op}.in_proj.weight", f"{op}.out_proj.weight", "classifier.head.weight"):
        assert p[name].std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(p[name].mean().item()) < 2e-4
    for name, bound in (
        (f"{op}.x_proj_weight", 384**-0.5),
        (f"{op}.dt_projs_weight", 24**-0.5),
        (f"{op}.conv2d.weight", 1 / 3),
        ("layers.2.downsample.1.weight", (9 * 192) ** -0.5),
        ("layers.2.downsample.1.bias", (9 * 192) ** -0.5),
        ("patch_embed.0.weight", 27**-0.5),
    ):
        assert 0.97 * bound < p[name].abs().max() <= bound
        assert p[name].var().item() == pytest.approx(bound**2 / 3, rel=0.15)
    log_steps = F.softplus(p[f"{op}.dt_projs_bias"]).log10()
    assert -3.001 < log_steps.min() < -2.97
    assert -1.03 < log_steps.max() < -0.999
    assert log_steps.mean().item() == pytest.approx(-2, abs=0.05)
    assert torch.equal(p[f"{op}.A_logs"], torch.arange(1.0, 5).log().double().expand(4 * 384, 4))
    assert (p[f"{op}.Ds"] == 1).all()
    for name, values in p.items():
        if name.endswith(("norm.weight", "norm2.weight")):
            assert (values == 1).all()
        if name.endswith(("norm.bias", "norm2.bias", "fc1.bias", "fc2.bias", "head.bias")):
            assert (values == 0).all()


def test_initialising_a_model_without_memory_says_what_to_call() -> None:
    with torch.device("meta"):
        model = create_model("vmamba_atto")
    with pytest.raises(ValueError, match="to_empty"):
        model.init_weights(0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_autocast_stays_near_float32_and_its_gradients_are_float32(pattern: Any) -> None:
    model, x = _atto(scan_pattern=pattern), _images(2, 32, 48)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, torch.ones(2, 10))
    rough.float().square().mean().backward()
    assert relative_max(rough, exact) < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_recurrence_computes_in_float32_under_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []
    real = ss2d.ss2d_scan

    def watched(*args: Tensor, **options: Any) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        seen.append(args)
        return real(*args, **options)

    monkeypatch.setattr(ss2d, "ss2d_scan", watched)
    model, x = _atto(), _images(1, 32, 32)
    residual: list[torch.dtype] = []
    for stage in model.layers:
        stage.blocks[0].register_forward_hook(lambda _m, _i, y: residual.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    tokens, recurrence = torch.bfloat16, torch.float32
    assert [tuple(t.dtype for t in args) for args in seen] == [
        (tokens, tokens, tokens, recurrence, recurrence, recurrence)
    ] * 5
    assert residual == [torch.float32] * 4
    seen.clear()
    model.to(torch.bfloat16)(x.bfloat16())
    assert {t.dtype for args in seen for t in args[3:]} == {torch.float32}


def test_float64_is_float64_throughout() -> None:
    model = _atto().double()
    assert model(_images(1, 32, 32).double()).dtype == torch.float64


def test_features_are_the_stages_outputs_before_the_downsample() -> None:
    model, x = _atto().eval(), _images(2, 36, 52)
    final, features = model.forward_intermediates(x)
    assert isinstance(final, Tensor)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model.forward_head(final), model(x))
    assert [tuple(f.shape) for f in features] == [
        (2, 16, 9, 13),
        (2, 32, 5, 7),
        (2, 64, 3, 4),
        (2, 128, 2, 2),
    ]
    assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == [
        (16, 4),
        (32, 8),
        (64, 16),
        (128, 32),
    ]
    assert [model.get_submodule(str(i["module"])) for i in model.feature_info] == [
        s.blocks for s in model.layers
    ]
    assert all(f.is_contiguous() for f in features)


def test_features_can_be_chosen_normalised_and_cut_short() -> None:
    model, x = _atto().eval(), _images(1, 32, 32)
    final, every = model.forward_intermediates(x, output_fmt="NHWC")
    ran: list[int] = []
    for i, stage in enumerate(model.layers):
        stage.blocks[0].register_forward_hook(lambda *_, i=i: ran.append(i))
    two = model.forward_intermediates(x, [0, -3], stop_early=True, output_fmt="NHWC", intermediates_only=True)
    assert ran == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(two, every[:2], strict=True))
    last, early = model.forward_intermediates(x, [1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(last, early[0])
    normed = model.forward_intermediates(x, 2, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(normed[0], every[2])
    assert torch.equal(normed[1], final)
    kept = model.forward_intermediates(x, keep=torch.zeros(1, 10), output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(kept[0], model.patch_embed(x))


def test_intermediate_layers_are_tokens_or_maps() -> None:
    model, x = _atto().eval(), _images(2, 36, 52)
    (tokens,) = model.get_intermediate_layers(x)
    assert torch.equal(tokens, model.forward_features(x).flatten(1, 2))
    third, fourth = model.get_intermediate_layers(x, n=2, reshape=True, norm=False)
    _, features = model.forward_intermediates(x)
    assert torch.equal(third, features[2])
    assert torch.equal(fourth, features[3])
    assert [t.shape for t in model.get_intermediate_layers(x, n=[0, 1])] == [(2, 117, 16), (2, 35, 32)]


def test_the_head_can_be_replaced() -> None:
    model, x = _atto().eval(), _images(2, 36, 52)
    pooled = model.forward_features(x).mean((1, 2))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    torch.manual_seed(0)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    assert model.get_classifier().weight.std() > 0
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(x), model.forward_features(x))
    model.to(torch.float64).reset_classifier(5, "avg")
    assert model(x.double()).dtype == torch.float64


def test_no_weight_decay_names_the_recurrence() -> None:
    model = _atto()
    names = model.no_weight_decay()
    assert len(names) == 3 * 5
    assert {n.rsplit(".", 1)[1] for n in names} == {"A_logs", "Ds", "dt_projs_bias"}
    assert names < dict(model.named_parameters()).keys()


def test_timm_can_decay_rates_by_depth() -> None:
    model = _atto()
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(p.numel() for g in groups for p in g["params"]) == flops.params("vmamba_atto", 10)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    order = ["patch_embed.0", "layers.0.blocks.0.op.in_proj", "layers.1.blocks.0.mlp.fc1"]
    order += ["layers.2.blocks.1.mlp.fc1", "layers.3.blocks.0.mlp.fc1", "classifier.head"]
    scales = [scale[id(model.get_parameter(f"{name}.weight"))] for name in order]
    assert scales == sorted(set(scales))
    assert scales[-1] == 1
    assert scale[id(model.get_parameter("layers.0.downsample.1.weight"))] == scales[1]  # with its last block
    by_stage = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(by_stage) == 6  # stem, four stages, classifier


@pytest.mark.parametrize("height", [1, 2, 3])
def test_a_single_column_is_halved_with_right_gradients_in_bfloat16(height: int) -> None:
    """A convolution of stride 2 gave its weights, in bfloat16, what lay in memory: here 1e30."""
    halve, x = _atto().layers[2].downsample, golden_tensor("token", (12, height, 1, 64)).float()
    found = {}
    for enabled in (False, True, True, True):
        halve.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = halve(x)
        dirt = [torch.full((size,), 1e30) for size in (1000, 10_000, 100_000) for _ in range(20)]
        del dirt
        (y * golden_tensor("gradient", tuple(y.shape)).float()).sum().backward()
        found[enabled] = halve.get_parameter("1.weight").grad.clone()
        assert relative_max(found[enabled], found[False]) < 0.05


def test_a_copy_is_a_model_of_its_own() -> None:
    model, x = _atto().eval(), _images(1, 32, 32)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))
    twin.init_weights(1)
    assert not torch.equal(model(x), twin(x))


def test_a_block_compiles_whole() -> None:
    block = Block(16, replace(get_variant("vmamba_atto"), d_state=2), "cross2d", "auto")
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x, keep = golden_tensor("tokens", (2, 3, 5, 16)).float(), torch.tensor([[0.0, 1.5], [2.0, 0.0]])
    torch.testing.assert_close(compiled(x, keep), block(x, keep))


def test_a_backend_that_cannot_run_here_is_an_error_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="need"):
        create_model("vmamba_atto", scan_backend="triton")
