"""A fused block is its modules' composition, value and every gradient, and steps aside where modules must be seen."""

from __future__ import annotations

import weakref
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


def test_the_kernels_padded_projection_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A direction of 1 + 2 columns is padded to 8 for the kernels alone."""
    if not GPU:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    exact = outcome(model().double(), "never", torch.float64)
    made = model(scan_backend="triton")
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


@pytest.mark.parametrize("policy", ["off", "block"])
def test_run_again_it_lets_go_of_what_it_has_used(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the scan's backward begins, the memory of its output and of the sum after it is free.

    Without recomputation autograd holds both to the end.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # which holds what a kernel was given
    made = model()
    apply_recompute(made, policy)
    used: list[weakref.ref[torch.UntypedStorage]] = []
    gone = []

    def add_norm_backward(dy: Tensor, residual: Tensor, total: Tensor, *rest: Any) -> Any:
        used[:] = [weakref.ref(total.untyped_storage())]
        return right.add_norm_backward(dy, residual, total, *rest)

    def norm_backward(dy: Tensor, y: Tensor, *rest: Any) -> Any:
        used.append(weakref.ref(y.untyped_storage()))
        return right.norm_backward(dy, y, *rest)

    def scan_backward(*args: Any) -> Any:
        gone.append([storage() is None for storage in used])
        return right.scan_backward(*args)

    right = fused.OWN_CODE
    ops = right._replace(
        add_norm_backward=add_norm_backward, norm_backward=norm_backward, scan_backward=scan_backward
    )
    monkeypatch.setattr(fused, "OWN_CODE", ops)
    outcome(made, "always", torch.float32)
    assert gone == [[policy == "block"] * 2] * made.num_blocks


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


def _listen_before(block: Block) -> None:
    block.op.out_proj.register_full_backward_pre_hook(lambda *_: None)


def _hook_the_mlp(block: Block) -> None:
    block.mlp.register_forward_hook(lambda *_: None)


def _replace_the_mlp(block: Block) -> None:
    block.mlp = nn.Identity()  # type: ignore[assignment]


def _give_a_bias(block: Block) -> None:
    dim, inner = block.op.out_proj.weight.shape
    block.op.out_proj = nn.Linear(inner, dim, device=DEVICE)


def _reset_a_norm(block: Block) -> None:
    block.norm2.eps = 0.1


def _pad_otherwise(block: Block) -> None:
    block.op.conv2d.padding_mode = "circular"


def _drop_a_bias(block: Block) -> None:
    block.mlp.fc1.bias = None


def _wrap_a_forward(block: Block) -> None:
    """As accelerate does."""
    right = block.op.in_proj.forward
    block.op.in_proj.forward = lambda x: 2 * right(x)  # type: ignore[method-assign]


def _wrap_the_mlps_forward(block: Block) -> None:
    right = block.mlp.forward
    block.mlp.forward = lambda x: 2 * right(x)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        _hook,
        _replace,
        _listen,
        _listen_before,
        _hook_the_mlp,
        _replace_the_mlp,
        _give_a_bias,
        _reset_a_norm,
        _pad_otherwise,
        _drop_a_bias,
        _wrap_a_forward,
        _wrap_the_mlps_forward,
    ],
    ids=lambda f: f.__name__,
)
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


def block_and_tokens(fuse: str) -> tuple[Block, Tensor]:
    block = next(model().blocks())
    block.fuse = fuse  # type: ignore[assignment]
    return block, golden_tensor("fused.tokens", (2, 6, 4, 12)).float().to(DEVICE).requires_grad_()


def test_who_wants_a_gradient_of_keep_gets_it() -> None:
    found = []
    for fuse in ("never", "always"):
        block, x = block_and_tokens(fuse)
        keep = torch.ones(2, 2, device=DEVICE, requires_grad=True)
        (grad,) = torch.autograd.grad(block(x, keep).square().sum(), keep)
        found.append(grad)
    assert relative_rms(found[1], found[0]) <= 1e-6


def test_what_it_returns_may_be_changed_in_place() -> None:
    """Returned as a view, autograd refused that, and FSDP2 warned of every block."""
    block, x = block_and_tokens("always")
    (expected,) = torch.autograd.grad((block(x) * 2).square().sum(), x)
    y = block(x)
    y *= 2
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, expected)


def test_one_row_of_keep_is_for_all_samples_and_three_for_two_are_refused() -> None:
    """Kernels look at no bounds."""
    block, x = block_and_tokens("always")
    keep = torch.tensor([[0.0, 2.0]], device=DEVICE)
    assert torch.equal(block(x, keep), block(x, keep.repeat(2, 1)))
    with pytest.raises(RuntimeError, match="expand"):
        block(x, keep.repeat(3, 1))


def test_a_second_derivative_is_refused() -> None:
    block, x = block_and_tokens("always")
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


def test_recompute_leaves_the_word_of_whoever_set_fuse() -> None:
    made = model()
    for word in ("never", "always", "auto"):
        next(made.blocks()).fuse = word
        apply_recompute(made, "off")
        apply_recompute(made, "block")
        assert next(made.blocks()).fuse == word
    apply_recompute(made, "selective")
    assert next(made.blocks()).fuse == "never"
    apply_recompute(made, "off")
    assert next(made.blocks()).fuse == "auto"


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
