"""The fast selective scan is the reference, in value and in every gradient, whatever the shape, dtype or layout."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vmamba_kernels import BackendError, backend, resolve_backend, selective_scan
from vmamba_kernels.scan import fast, recurrence
from vmamba_kernels.scan.reference import selective_scan_reference
from vmamba_kernels.testing import (
    SCAN_SHAPES,
    ScanShape,
    golden_tensor,
    relative_max,
    value_and_gradients,
    worst,
)

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = json.loads((GOLDEN / "selective_scan.json").read_text())
GOLDEN_NAMES = {"B": "Bs", "C": "Cs"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}


def optional(inputs: dict[str, Tensor], *absent: str) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.items() if name not in absent}


def golden_inputs(case: dict) -> dict[str, Tensor]:
    name, width = case["case"], case["K"] * case["C"]
    grouped = (case["B"], case["K"], case["N"], case["L"])
    delta = golden_tensor(f"{name}.delta", (case["B"], width, case["L"]))
    bias = golden_tensor(f"{name}.delta_bias", (width,))
    inputs = {
        "u": golden_tensor(f"{name}.u", (case["B"], width, case["L"])),
        "delta": 0.5 * delta if case["softplus"] else 0.1 * delta.abs(),
        "A": -golden_tensor(f"{name}.A", (width, case["N"])).exp(),
        "B": golden_tensor(f"{name}.B", grouped),
        "C": golden_tensor(f"{name}.C", grouped),
        "delta_bias": 0.5 * bias if case["softplus"] else 0.05 * bias.abs(),
        "dy": golden_tensor(f"{name}.dy", (case["B"], width, case["L"])),
    }
    return inputs | ({"D": golden_tensor(f"{name}.D", (width,))} if case["D"] else {})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_reference], ids=["fast", "reference"])
@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case["case"])
def test_golden_vectors(case, scan, dtype):
    stored = load_file(GOLDEN / "selective_scan.safetensors")
    found = value_and_gradients(partial(scan, delta_softplus=case["softplus"]), golden_inputs(case), dtype)
    for name, value in found.items():
        key = f"{case['case']}.y" if name == "y" else f"{case['case']}.grad.{GOLDEN_NAMES.get(name, name)}"
        assert relative_max(value, stored[key]) <= TOLERANCE[dtype], name


def test_reference_gradients_are_those_of_its_values():
    inputs = optional(ScanShape(1, 2, 2, 2, 3).inputs(), "dy")
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(selective_scan_reference, leaves)


@pytest.mark.parametrize("absent", [(), ("D",), ("delta_bias",), ("D", "delta_bias")], ids="-".join)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "linear"])
@pytest.mark.parametrize("shape", SCAN_SHAPES, ids=str)
def test_fast_is_the_reference(shape, softplus, absent):
    inputs = optional(shape.inputs(delta_softplus=softplus), *absent)
    expected = value_and_gradients(partial(selective_scan_reference, delta_softplus=softplus), inputs)
    scan = partial(selective_scan, delta_softplus=softplus)
    assert worst(value_and_gradients(scan, inputs), expected) <= 1e-12
    assert worst(value_and_gradients(scan, inputs, torch.float32), expected) <= 1e-5


@pytest.mark.parametrize("shape", [ScanShape(2, 2, 3, 2, 70), ScanShape(1, 4, 33, 4, 41)], ids=str)
def test_chunks_pass_their_state_on(shape, monkeypatch):
    """Holds the carry: with chunks of 16 steps, a state dropped between two of them changes y and gradients."""
    monkeypatch.setattr(recurrence, "CHUNK_ELEMENTS", 1)
    inputs = shape.inputs()
    inputs["delta_bias"] -= 3
    saved = fast.empty_saved(inputs["u"], inputs["A"], inputs["B"])
    assert saved.shape == (-(-shape.length // 16), shape.state, shape.batch, shape.groups, shape.channels)
    expected = value_and_gradients(selective_scan_reference, inputs)
    assert worst(value_and_gradients(selective_scan, inputs), expected) <= 1e-12

    def forgetful(x, z, A, B, C, state, softplus, saved):
        return recurrence.chunk_forward(x, z, A, B, C, torch.zeros_like(state), softplus, saved)

    monkeypatch.setattr(fast, "chunk_forward", forgetful)
    assert relative_max(selective_scan(**optional(inputs, "dy")), expected["y"]) > 1e-3


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("steps", [0, 1, 31, 32, 33, 100, 257])
def test_blocks_of_a_narrow_recurrence_are_its_rows(steps, reverse):
    x, factor = golden_tensor("x", (steps, 3)), golden_tensor("factor", (steps, 3)).abs() ** 0.1
    first = golden_tensor("first", (3,))
    rows, state = x.clone(), first
    for t in reversed(range(steps)) if reverse else range(steps):
        state = rows[t] = rows[t] + factor[t] * state
    last = recurrence.recur(x, factor, first, reverse=reverse)
    assert relative_max(x, rows) <= 1e-14
    assert relative_max(last, state) <= 1e-14


def test_decay_may_underflow_to_zero():
    """Gradients come from h itself, never from a division by a decay that a large delta has made 0.

    (In float64 torch's softplus has slope 1 above 20; ours has the true 1 - 2e-9.)
    """
    inputs = ScanShape(2, 2, 3, 2, 63).inputs()
    inputs["delta"] = inputs["delta"] * 400
    expected = value_and_gradients(selective_scan_reference, inputs)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = value_and_gradients(selective_scan, inputs, dtype)
        assert all(t.isfinite().all() for t in found.values())
        assert worst(found, expected) <= tolerance


def test_softplus_in_float32_is_exact_to_its_last_bits():
    z = torch.linspace(-60, 60, 40_001)
    exact = torch.nn.functional.softplus(z.double())
    error = (recurrence.positive(z).double() - exact).abs() / exact
    assert (error / (1 + z.abs())).max() <= 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_a_float32_state(dtype):
    """Only the rounding of inputs and outputs is left: the float32 scan of the same rounded numbers, rounded once."""
    inputs = {name: t.to(dtype) for name, t in ScanShape(2, 4, 3, 2, 300).inputs().items()}
    found = value_and_gradients(selective_scan, inputs, dtype)
    expected = value_and_gradients(selective_scan, inputs, torch.float32)
    assert all(t.dtype == dtype for t in found.values())
    assert worst(found, expected) <= torch.finfo(dtype).eps


def test_mixed_dtypes_as_under_autocast():
    inputs = {n: t.float() for n, t in ScanShape(2, 4, 3, 1, 20).inputs().items()}
    half = {
        n: t.bfloat16() if n in ("u", "delta", "B", "C") else t for n, t in optional(inputs, "dy").items()
    }
    leaves = {n: t.requires_grad_() for n, t in half.items()}
    y = selective_scan(**leaves)
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [t.dtype for t in leaves.values()]


def test_layout_of_the_inputs_does_not_matter():
    inputs = ScanShape(2, 2, 3, 2, 15).inputs()
    strided = {
        n: t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2] for n, t in inputs.items()
    }
    assert not strided["u"].is_contiguous()
    assert not strided["D"].is_contiguous()
    y = selective_scan(**optional(strided, "dy"))
    assert torch.equal(y, selective_scan(**optional(inputs, "dy")))
    assert (
        worst(value_and_gradients(selective_scan, strided), value_and_gradients(selective_scan, inputs)) == 0
    )


@pytest.mark.parametrize("shape", SCAN_SHAPES, ids=str)
def test_inputs_stay_as_they_were(shape):
    """Where one axis is 1, a transpose is a view of the caller's memory: adding the bias in place would corrupt it."""
    inputs = {n: t.float() for n, t in optional(shape.inputs(), "dy").items()}
    before = {n: t.clone() for n, t in inputs.items()}
    selective_scan(**{n: t.requires_grad_() for n, t in inputs.items()}).sum().backward()
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)


def test_two_runs_are_bit_equal():
    inputs = ScanShape(3, 4, 17, 2, 200).inputs()
    first, second = (value_and_gradients(selective_scan, inputs, torch.float32) for _ in range(2))
    assert worst(first, second) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant):
    inputs = ScanShape(2, 4, 5, 1, 63).inputs()

    def recomputed(*tensors):
        return checkpoint(selective_scan, *tensors, use_reentrant=reentrant)

    plain = value_and_gradients(selective_scan, inputs, torch.float32)
    again = value_and_gradients(lambda **kw: recomputed(*kw.values()), inputs, torch.float32)
    assert worst(again, plain) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("absent", [(), ("D", "delta_bias")], ids=["all", "bare"])
def test_op_keeps_the_contract_of_torch(absent):
    """opcheck: schema, fake tensors, autograd registration, and autograd under compile with dynamic shapes."""
    inputs = optional(ScanShape(2, 2, 3, 2, 7).inputs(), "dy")
    tensors = [None if n in absent else t.float().requires_grad_() for n, t in inputs.items()]
    torch.library.opcheck(torch.ops.vmamba.selective_scan, (*tensors, True, "torch"))


def test_flops_are_counted():
    """The published convention: 9*B*L*K*C*N + B*L*K*C multiply-adds, two FLOPs each; twice that for the adjoint."""
    inputs = optional(ScanShape(2, 4, 3, 2, 15).inputs(), "dy")
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    forward = 2 * (2 * 15 * 12) * (9 * 2 + 1)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**leaves).sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_the_choice_is_logged_once(caplog):
    backend._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="vmamba_kernels"):
        for _ in range(3):
            assert resolve_backend("auto", "cpu") == "torch"
    assert [record.message for record in caplog.records] == ["selective scans on cpu run on the PyTorch path"]


def test_explicit_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = optional(SCAN_SHAPES[0].inputs(), "dy")
    with pytest.raises(BackendError, match=r"cannot run on 'cpu'.*CUDA|needs the package triton"):
        selective_scan(**inputs, backend="triton")
    with pytest.raises(ValueError, match="auto, triton, torch"):
        resolve_backend("cuda", "cpu")
    assert resolve_backend("auto", "cpu") == resolve_backend("torch", "cpu") == "torch"


@pytest.mark.parametrize(
    ("name", "axis"), [("delta", 2), ("A", 0), ("B", 2), ("C", 3), ("D", 0), ("delta_bias", 0)]
)
def test_a_shape_that_does_not_fit_is_named(name, axis):
    inputs = optional(ScanShape(2, 2, 3, 2, 5).inputs(), "dy")
    inputs[name] = inputs[name].narrow(axis, 0, 1)
    with pytest.raises(ValueError, match=rf"{'(B|C)' if name == 'B' else name} is|multiple"):
        selective_scan(**inputs)
