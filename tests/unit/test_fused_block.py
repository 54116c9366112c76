"""A fused block is its modules' composition, value and every gradient, and steps aside where modules must be seen."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba_dist.models import fused
from vmamba_dist.models.vmamba import Block, VMamba, create_model
from vmamba_dist.parallel.recompute import apply_recompute
from vmamba_kernels.testing import golden_tensor, relative_rms

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Outcome = dict[str, Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "one": {},
    "wide": {"ssm_ratio": 2.0},
    "two states, conv bias": {"d_state": 2, "conv_bias": True},
    "rows alone": {"scan_pattern": "unidi"},
}


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes TF32 for float32 where it is let."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def model(**overrides: Any) -> VMamba:
    """Two stages of small blocks whose every parameter matters."""
    torch.manual_seed(0)
    made = create_model("vmamba_atto", num_classes=5, dims=12, depths=(1, 1, 1, 1), **overrides)
    for name, p in made.named_parameters():
        with torch.no_grad():
            p += 0.3 * golden_tensor(f"fused.{name}", tuple(p.shape)).to(p.dtype)
    return made.to(DEVICE)


def outcome(
    made: VMamba, fuse: str, dtype: torch.dtype, *, autocast: bool = False, keep: bool = True
) -> Outcome:
    """The logits and all gradients, in float64."""
    for block in made.blocks():
        block.fuse = fuse  # type: ignore[assignment]
    made.zero_grad()
    x = golden_tensor("fused.x", (2, 3, 24, 16)).to(DEVICE, dtype).requires_grad_()
    masks = (golden_tensor("fused.keep", (2, 2 * made.num_blocks)).to(DEVICE, dtype) > -0.5) / 0.75
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        y = made(x, masks.to(dtype) if keep else None)
    y.backward(golden_tensor("fused.dy", (2, 5)).to(y))
    found = {"y": y, "x": x.grad, **{name: p.grad for name, p in made.named_parameters()}}
    return {name: t.detach().double().cpu() for name, t in found.items() if t is not None}


def apart(a: Outcome, b: Outcome) -> float:
    assert a.keys() == b.keys()
    return max(relative_rms(a[name], b[name]) for name in a)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_it_is_the_composition(overrides: dict[str, Any]) -> None:
    made = model(drop_path_rate=0.2, **overrides).double()
    for keep in (True, False):
        a, b = (outcome(made.eval(), fuse, torch.float64, keep=keep) for fuse in ("never", "always"))
        assert apart(a, b) <= 1e-12


def test_in_float32_through_the_kernels() -> None:
    made = model(drop_path_rate=0.2)
    exact = outcome(
        deepcopy(made).double().cpu() if not GPU else deepcopy(made).double(), "never", torch.float64
    )
    assert apart(outcome(made, "always", torch.float32), exact) <= 3e-5


@pytest.mark.parametrize("name", ["y", "gradients"])
def test_in_bfloat16_it_errs_no_more_than_the_composition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # which truncates to bfloat16
    made = model(drop_path_rate=0.2)
    exact = outcome(deepcopy(made).double(), "never", torch.float64)
    errors = {}
    for fuse in ("never", "always"):
        found = outcome(made, fuse, torch.float32, autocast=True)
        chosen = ["y"] if name == "y" else [n for n in found if n != "y"]
        errors[fuse] = sum(relative_rms(found[n], exact[n]) for n in chosen) / len(chosen)
    assert errors["always"] <= 1.3 * errors["never"]
    assert errors["never"] <= 0.1


def test_inference_has_the_bits_of_training() -> None:
    made = model().eval()
    for block in made.blocks():
        block.fuse = "always"
    x = golden_tensor("fused.x", (2, 3, 24, 16)).float().to(DEVICE)
    with torch.no_grad():
        quiet = made(x)
    assert torch.equal(quiet, made(x).detach())


def test_recomputed_it_has_the_same_bits() -> None:
    made = model(drop_path_rate=0.2)
    plain = outcome(made, "always", torch.float32)
    apply_recompute(made, "block")
    assert apart(outcome(made, "always", torch.float32), plain) == 0


def test_a_frozen_weight_gets_no_gradient() -> None:
    made = model()
    block = next(made.blocks())
    block.mlp.fc1.weight.requires_grad_(False)
    found = outcome(made, "always", torch.float32)
    assert "layers.0.blocks.0.mlp.fc1.weight" not in found
    assert "layers.0.blocks.0.mlp.fc1.bias" in found


def test_products_are_counted_as_the_composition_counts_them_and_one_more() -> None:
    """The MLP's first product is made twice."""
    counts = {}
    for fuse in ("never", "always"):
        made = model()
        with FlopCounterMode(display=False) as counter:
            outcome(made, fuse, torch.float32)
        counts[fuse] = counter.get_total_flops()
    tokens = 2 * torch.tensor([6 * 4, 3 * 2, 2 * 1, 1])
    again = sum(2 * int(n) * b.mlp.fc1.weight.numel() for n, b in zip(tokens, made.blocks(), strict=True))
    assert counts["always"] - counts["never"] == again


def _hook(block: Block) -> None:
    block.op.in_proj.register_forward_hook(lambda *_: None)


def _replace(block: Block) -> None:
    class Adapted(nn.Linear):
        pass

    block.mlp.fc1 = Adapted(*reversed(block.mlp.fc1.weight.shape), device=DEVICE)


def _listen(block: Block) -> None:
    block.norm.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [_hook, _replace, _listen], ids=lambda f: f.__name__)
def test_it_steps_aside_for_whoever_looks_at_the_modules(
    change: Callable[[Block], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model()
    ran: list[int] = []
    right = fused.run
    monkeypatch.setattr(fused, "run", lambda *args: ran.append(1) or right(*args))  # type: ignore[func-returns-value]
    outcome(made, "always", torch.float32)
    assert len(ran) == 4
    change(next(made.blocks()))
    outcome(made, "always", torch.float32)
    assert len(ran) == 4 + 3


@pytest.mark.parametrize(
    ("overrides", "policy"), [({"scan_pattern": "cascade"}, "off"), ({}, "selective")], ids=str
)
def test_it_leaves_alone_what_it_cannot_compute(
    overrides: dict[str, Any], policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(**overrides)
    for block in made.blocks():
        block.fuse = "always"
    apply_recompute(made, policy)
    monkeypatch.setattr(fused, "run", None)
    made(golden_tensor("fused.x", (2, 3, 24, 16)).float().to(DEVICE))
