"""Arithmetic on rows is what torch's own norms, GELU and sums are, value and gradient, at sizes that fill no tile.

The kernels run where there is a GPU, else in Triton's interpreter.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vmamba_kernels import rows
from vmamba_kernels.testing import golden_tensor, relative_rms

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
# Rows, channels, rows a sample: less than a tile, several tiles with a rest, more channels than a tile has, one row.
SHAPES = [(10, 20, 5), (66, 96, 11), (6, 300, 3), (3, 2100, 1), (1, 7, 1)]
# Rows, K, columns of a product: tiles of all three with a rest, a whole K that Hopper cuts otherwise, less than a tile.
PRODUCTS = [(1100, 70, 260), (150, 448, 260), (5, 20, 36), (1, 1, 1)]
# The interpreter truncates to bfloat16, and computes in no other 16-bit way.
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN: an element that a kernel leaves out is seen."""
    monkeypatch.setattr(
        torch.utils.deterministic, "fill_uninitialized_memory", True
    )  # a trainer switches it off
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
    _same_by_autograd(case, (dx, d_branch, *d_parameters))
    near(rows.add_branch(case.x, case.branch, case.keep, case.per), total, limit)
    near(rows.add_branch(case.x, case.branch, None, case.per), x + branch, limit)


def _same_by_autograd(case: Case, expected: tuple[Tensor, ...]) -> None:
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.branch, case.weight, case.bias)]
    x, branch, weight, bias = leaves
    total, y, _ = rows.add_norm(x, branch, case.keep, case.per, weight, bias, EPS)
    found = torch.autograd.grad([total, y], leaves, [case.residual, case.dy])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_has_the_gradients_of_a_sum(dtype: torch.dtype) -> None:
    """Alone, and where nobody asks for the norm beside it."""
    case = Case(SHAPES[1], dtype)
    x, branch = (t.detach().clone().requires_grad_() for t in (case.x, case.branch))
    keep = case.keep.repeat_interleave(case.per)[:, None]
    sums = (
        rows.add_branch(x, branch, case.keep, case.per),
        rows.add_norm(x, branch, case.keep, case.per, case.weight, case.bias, EPS)[0],
    )
    for total in sums:
        dx, d_branch = torch.autograd.grad(total, (x, branch), case.residual)
        assert torch.equal(dx, case.residual)
        near(d_branch, (case.residual * keep).cpu(), TOLERANCE[dtype])


def test_no_gradient_is_left_out_in_silence() -> None:
    case = Case(SHAPES[0], torch.float32)
    x, keep = case.x.clone().requires_grad_(), case.keep.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="keep requires a gradient"):
        rows.add_branch(x, case.branch, keep, case.per).sum().backward()
    y = rows.layer_norm(x, case.weight, case.bias, EPS, torch.float32)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_to_a_flop_counter_rows_are_nothing() -> None:
    case = Case(SHAPES[0], torch.float32)
    with FlopCounterMode(display=False) as counter:
        rows.add_norm(case.x, case.branch, case.keep, case.per, case.weight, case.bias, EPS)
        torch.mm(case.x.t(), case.x)
    assert counter.get_total_flops() == 2 * case.x.shape[0] * case.x.shape[1] ** 2


def test_to_a_flop_counter_a_product_with_gelu_is_a_product() -> None:
    """And its gradients are two and the same one again."""
    shape = m, k, n = PRODUCTS[2]
    leaves = [t.requires_grad_() for t in product(shape, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        y = rows.linear_gelu(*leaves)
        assert counter.get_total_flops() == 2 * m * k * n
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * m * k * n


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
    again, dh, total = gelu_backward(4 * case.branch, case.dy)
    near(dh, h.grad, 3 * limit)
    near(again, g, limit)
    near(total, h.grad.sum(0), 30 * limit)  # a sum that mostly cancels


def gelu_backward(h: Tensor, dg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(h), dh and its sum over rows, computed in the place of copies of the same layout."""
    h, dg = h.clone(), dg.clone()
    total = rows.gelu_backward_(h, dg)
    return h, dg, total


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_a_product_with_gelu_is_the_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    limit = (TOLERANCE | {torch.float16: 4e-4, torch.float64: 1e-14})[dtype]
    limit *= 5 if dtype == torch.bfloat16 and not GPU else 1  # truncated, the sum and GELU of it
    leaves = [t.requires_grad_() for t in product(shape, dtype)]
    x, weight, bias = exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    expected = F.gelu(torch.addmm(bias, x, weight.t()))
    y = rows.linear_gelu(*leaves)
    assert y.dtype == dtype
    near(y, expected, limit)
    dy = drawn("dy", *y.shape).to(DEVICE, dtype)
    found = torch.autograd.grad(y, leaves, dy)
    for grad, wanted in zip(found, torch.autograd.grad(expected, exact, dy.cpu().double()), strict=True):
        near(grad, wanted, 3 * limit)


def product(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Rows, a weight whose products are GELU's to bend, and a bias."""
    m, k, n = shape
    drawn_ = drawn("x", m, k), 4 * k**-0.5 * drawn("weight", n, k), drawn("bias", n)
    return [t.to(DEVICE, dtype) for t in drawn_]


def test_of_every_half_gelu_is_rounded_once() -> None:
    """Each number is a column's bias: what comes back is no more than half a unit from GELU of it."""
    every = torch.arange(-(2**15), 2**15, 1 if GPU else 5).to(torch.int16).view(torch.float16)
    every = torch.cat((every[every.isfinite()], torch.tensor([-torch.inf, torch.inf, torch.nan]).half()))
    none = torch.zeros(len(every), 1, dtype=torch.float16, device=DEVICE)
    (found,) = rows.linear_gelu(none[:1], none, every.to(DEVICE)).cpu().double()
    expected = F.gelu(every[:-3].double())
    assert ((found[:-3] - expected).abs() <= 2**-11 * expected.abs() + 2**-25).all()
    assert found[-3:].nan_to_num(1, posinf=2).tolist() == [0, 2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16 if GPU else torch.float32, torch.float16], ids=str)
def test_a_product_with_gelu_has_a_rows_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, weight, bias = product(PRODUCTS[0], dtype)
    whole = rows.linear_gelu(x, weight, bias)
    assert torch.equal(rows.linear_gelu(x, weight, bias), whole)
    assert torch.equal(rows.linear_gelu(x[7:], weight, bias), whole[7:])


def test_a_product_with_gelu_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels look at no bounds; and autocast, which casts for torch's products, changes nothing here."""
    x, weight, bias = product(PRODUCTS[2], torch.float32)
    for wrong in ((x[:, 1:], weight, bias), (x, weight, bias[1:]), (x, weight, bias.double())):
        with pytest.raises(
            RuntimeError, match=r"takes x \(M, K\), weight \(N, K\) and bias \(N\) of one dtype"
        ):
            rows.linear_gelu(*wrong)
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        expected = rows.linear_gelu(x, weight, bias)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert torch.equal(rows.linear_gelu(x, weight, bias), expected)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_gelus_backward_writes_over_its_inputs_and_nothing_beside(
    interpret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of a larger tensor each: no element before or behind is touched, and the bits are the same as alone."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    case = Case((66, 96, 11), torch.float32)
    expected = gelu_backward(case.branch, case.dy)
    if interpret == "0" and not GPU:
        assert torch.equal(expected[0], F.gelu(case.branch))
        assert torch.equal(expected[1], torch.ops.aten.gelu_backward(case.dy, case.branch))
    h, dg = (F.pad(t, (0, 0, 1, 1), value=7.0) for t in (case.branch, case.dy))
    total = rows.gelu_backward_(h[1:-1], dg[1:-1])
    for found, wanted in zip((h, dg), expected[:2], strict=True):
        assert torch.equal(found[1:-1], wanted)
        assert (found[[0, -1]] == 7).all()
    assert torch.equal(total, expected[2])


def test_what_autograd_follows_is_not_written_over() -> None:
    """It would take what it finds there for GELU's input."""
    case = Case((10, 20, 5), torch.float32)
    for h, dg in (
        (case.branch.clone().requires_grad_(), case.dy),
        (case.branch, case.dy.clone().requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match="writes over both: detach them"):
            rows.gelu_backward_(h, dg)
    with torch.no_grad():
        h = case.branch * torch.ones(20, device=DEVICE, requires_grad=True)
        rows.gelu_backward_(h, case.dy.clone())


def test_layout_of_the_inputs_does_not_matter() -> None:
    case = Case((66, 96, 11), torch.float32)

    def every_op(*t: Tensor) -> list[Tensor]:
        x, branch, residual = t
        total, y, stats = rows.add_norm(x, branch, case.keep, 11, case.weight, case.bias, EPS)
        return [
            total, y, rows.add_branch(x, branch, case.keep, 11), *rows.scale_and_sum(x, case.keep, 11, x.dtype),
            *rows.norm(x, case.weight, case.bias, EPS, x.dtype), *gelu_backward(branch, residual),
            *rows.norm_backward(branch, x, stats, case.weight, case.bias, x.dtype),
            *rows.add_norm_backward(branch, residual, x, stats, case.weight, case.bias, case.keep, 11),
            rows.linear_gelu(x, branch, residual[:, 0]),
        ]  # fmt: skip

    tensors = (case.x, case.branch, case.residual)
    turned = (t.t().contiguous().t() for t in tensors)
    for found, expected in zip(every_op(*turned), every_op(*tensors), strict=True):
        assert torch.equal(found, expected)


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
    branch = case.branch.clone().requires_grad_()
    for op, args in (
        (ops.norm, (*leaves, EPS, torch.float32)),
        (ops.add_norm, (leaves[0], branch, case.keep, 5, *leaves[1:], EPS)),
        (ops.add_branch, (leaves[0], branch, case.keep, 5)),
        (ops.add_branch, (leaves[0], branch, None, 5)),
        (ops.norm_backward, (case.dy, total, stats, *parameters, torch.float32)),
        (ops.add_norm_backward, (case.dy, case.residual, total, stats, *parameters, case.keep, 5)),
        (ops.scale_and_sum, (case.x, case.keep, 5, torch.float32)),
        (ops.gelu_backward_, (case.branch, case.dy)),
        (ops.linear_gelu, (leaves[0], branch, leaves[0].detach()[:, 0].requires_grad_())),
        (ops.norm_backward, (case.dy.t().contiguous().t(), total, stats, *parameters, None)),
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
    y = rows.linear_gelu(x, torch.ones(5, 8, device=DEVICE), c[:5])
    y.sum().backward()
    assert y.shape == (0, 5)
    assert torch.equal(c.grad, torch.zeros(8, device=DEVICE))
    two, three = (torch.ones(n, 8, device=DEVICE) for n in (2, 3))
    assert rows.linear_gelu(two, three[:0], c[:0]).shape == (2, 0)
    assert torch.equal(rows.linear_gelu(two[:, :0], three[:, :0], c[:3]), F.gelu(c[:3]).expand(2, 3))
