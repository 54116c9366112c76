"""Arithmetic on rows is what torch's own norms, GELU and sums are, value and gradient, at sizes that fill no tile.

The kernels run where there is a GPU, else in Triton's interpreter.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_kernels import rows
from vmamba_kernels.testing import golden_tensor, relative_rms

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
# Rows, channels, rows a sample: less than a tile, several tiles with a rest, more channels than a tile has, one row.
SHAPES = [(10, 20, 5), (66, 96, 11), (6, 300, 3), (3, 2100, 1), (1, 7, 1)]
# The interpreter truncates to bfloat16, and computes in no other 16-bit way.
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN: an element that a kernel leaves out is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # a trainer switches it off
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def drawn(name: str, *shape: int) -> Tensor:
    return golden_tensor(f"rows.{name}", shape)


class Case:
    """Inputs in a dtype on the device, and the same in float64 with gradients to come."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        m, c, self.per = shape
        keep = drawn("keep", m // self.per, 2).add(1.5)
        self.narrow = {
            name: t.to(DEVICE, dtype)
            for name, t in {"branch": drawn("branch", m, c), "dy": drawn("dy", m, c)}.items()
        }
        self.wide = {
            "x": drawn("x", m, c),
            "weight": drawn("weight", c),
            "bias": drawn("bias", c),
            "residual": drawn("residual", m, c),
            "keep": keep[:, 1],
        }
        self.wide = {name: t.to(DEVICE, torch.float32) for name, t in self.wide.items()}
        if dtype == torch.float32:  # a column of a larger tensor, as the models hand it over
            self.wide["keep"] = keep.to(DEVICE, torch.float32)[:, 1]

    def __getattr__(self, name: str) -> Tensor:
        return {**self.narrow, **self.wide}[name]

    def double(self, name: str) -> Tensor:
        return getattr(self, name).detach().cpu().double().requires_grad_()


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert relative_rms(found.detach().cpu(), expected.detach()) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_norm_with_a_sum_before_it_is_the_definition(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    case, limit = Case(shape, dtype), TOLERANCE[dtype]
    x, branch, weight, bias = (case.double(name) for name in ("x", "branch", "weight", "bias"))
    keep = case.double("keep").detach().repeat_interleave(case.per)[:, None]
    total = x + keep * branch
    total.retain_grad()
    y = F.layer_norm(total, [shape[1]], weight, bias, EPS)
    total_, y_, stats = rows.add_norm(case.x, case.branch, case.keep, case.per, case.weight, case.bias, EPS)
    near(total_, total, limit)
    near(y_, y, limit)
    torch.autograd.backward([y, total], [case.double("dy").detach(), case.double("residual").detach()])
    dx, d_branch, d_parameters, again = rows.add_norm_backward(
        case.dy, case.residual, total_, stats, case.weight, case.bias, case.keep, case.per
    )
    for found, expected in (
        (dx, x.grad),
        (d_branch, branch.grad),
        (d_parameters[0], weight.grad),
        (d_parameters[1], bias.grad),
        (again, y),
    ):
        assert expected is not None
        near(found, expected, 3 * limit)
    near(rows.add_branch(case.x, case.branch, case.keep, case.per), total, limit)
    near(rows.add_branch(case.x, case.branch, None, case.per), x + branch, limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_norm_is_torchs(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case, limit = Case(shape, dtype), TOLERANCE[dtype]
    branch, weight, bias = (case.double(name) for name in ("branch", "weight", "bias"))
    expected = F.layer_norm(branch, [shape[1]], weight, bias, EPS)
    expected.backward(case.double("dy").detach())
    inputs = [t.detach().requires_grad_() for t in (case.branch, case.weight, case.bias)]
    y = rows.layer_norm(inputs[0].view(1, *shape[:2]), inputs[1], inputs[2], EPS, torch.float32)
    assert (y.shape, y.dtype) == ((1, *shape[:2]), torch.float32)
    near(y[0], expected, limit)
    y.backward(case.dy.float().view(y.shape))
    for found, wanted in zip(inputs, (branch, weight, bias), strict=True):
        assert found.grad is not None
        assert found.grad.dtype == found.dtype
        assert wanted.grad is not None
        near(found.grad, wanted.grad, 3 * limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_gelus_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case, limit = Case(shape, dtype), TOLERANCE[dtype]
    keep = case.double("keep").detach().repeat_interleave(case.per)[:, None]
    for given, scale in ((case.keep, keep), (None, torch.ones_like(keep))):
        y, total = rows.scale_and_sum(case.x, given, case.per, dtype)
        near(y, case.double("x") * scale, limit)
        near(total, (case.double("x") * scale).sum(0), 3 * limit)
    h = (4 * case.double("branch").detach()).requires_grad_()
    g = F.gelu(h)
    g.backward(case.double("dy").detach())
    assert h.grad is not None
    dh, again, total = rows.gelu_backward(4 * case.branch, case.dy)
    near(dh, h.grad, 3 * limit)
    near(again, g, limit)
    near(total, h.grad.sum(0), 30 * limit)  # a sum that mostly cancels


def test_the_same_input_gives_the_same_bits() -> None:
    case = Case((66, 96, 11), torch.float32)
    total, _, stats = rows.add_norm(case.x, case.branch, case.keep, 11, case.weight, case.bias, EPS)
    once, again = (
        rows.add_norm_backward(case.dy, case.residual, total, stats, case.weight, case.bias, case.keep, 11)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_ops_are_what_they_say() -> None:
    case = Case((10, 20, 5), torch.float32)
    parameters = (case.weight, case.bias)
    total, _, stats = rows.add_norm(case.x, case.branch, case.keep, 5, *parameters, EPS)
    ops, leaves = torch.ops.vmamba, [t.clone().requires_grad_() for t in (case.x, *parameters)]
    for op, args in (
        (ops.norm, (*leaves, EPS, torch.float32)),
        (ops.add_norm, (case.x, case.branch, case.keep, 5, *parameters, EPS)),
        (ops.add_branch, (case.x, case.branch, None, 5)),
        (ops.norm_backward, (case.dy, total, stats, *parameters, torch.float32)),
        (ops.add_norm_backward, (case.dy, case.residual, total, stats, *parameters, case.keep, 5)),
        (ops.scale_and_sum, (case.x, case.keep, 5, torch.float32)),
        (ops.gelu_backward, (case.branch, case.dy)),
    ):
        torch.library.opcheck(op.default, args)


def test_no_rows_are_no_rows() -> None:
    x, c = (
        torch.zeros(0, 8, device=DEVICE, requires_grad=True),
        torch.ones(8, device=DEVICE, requires_grad=True),
    )
    y = rows.layer_norm(x, c, c, EPS, torch.float32)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert c.grad is not None
    assert torch.equal(c.grad, torch.zeros(8, device=DEVICE))
