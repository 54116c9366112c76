"""The four-direction scan is the permuted reference, in value and every gradient; its walks are the official ones."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vmamba_kernels import PATTERNS, BackendError, scan_order, ss2d_scan
from vmamba_kernels.scan import recurrence
from vmamba_kernels.ss2d import fast
from vmamba_kernels.ss2d.reference import ss2d_scan_reference
from vmamba_kernels.testing import IMAGE_SHAPES, ImageShape, relative_max, value_and_gradients, worst

GOLDEN = Path(__file__).parents[1] / "golden"


def test_scan_orders_are_the_official_ones():
    stored = load_file(GOLDEN / "scan_orders.safetensors")
    assert stored.keys() >= {f"{pattern}.{size}" for pattern in PATTERNS for size in ("3x5", "4x4")}
    for name, order in stored.items():
        pattern, size = name.split(".")
        height, width = map(int, size.split("x"))
        assert torch.equal(scan_order(pattern, height, width), order.long()), name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (3, 5)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_direction_visits_each_position_once(pattern, height, width):
    order = scan_order(pattern, height, width)
    assert torch.equal(order.sort(dim=1).values, torch.arange(height * width).expand(4, -1))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
def test_fast_is_the_permuted_reference(shape, pattern):
    inputs = shape.inputs()
    expected = value_and_gradients(partial(ss2d_scan_reference, pattern=pattern), inputs)
    scan = partial(ss2d_scan, pattern=pattern)
    assert worst(value_and_gradients(scan, inputs), expected) <= 1e-12
    assert worst(value_and_gradients(scan, inputs, torch.float32), expected) <= 2e-6


def test_chunks_pass_their_state_on(monkeypatch):
    """Holds the carry: with chunks of 16 steps, a state dropped between two of them changes y."""
    monkeypatch.setattr(recurrence, "CHUNK_ELEMENTS", 1)
    inputs = ImageShape(2, 7, 9, 5, 2, 2).inputs()
    inputs["dt_bias"] -= 2
    assert fast.empty_saved(inputs["x"], inputs["A"]).shape == (4, 2, 4, 2, 5)
    expected = value_and_gradients(ss2d_scan_reference, inputs)
    assert worst(value_and_gradients(ss2d_scan, inputs), expected) <= 1e-12

    def forgetful(x, z, A, B, C, state, softplus, saved):
        return recurrence.chunk_forward(x, z, A, B, C, torch.zeros_like(state), softplus, saved)

    monkeypatch.setattr(fast, "chunk_forward", forgetful)
    del inputs["dy"]
    assert relative_max(ss2d_scan(**inputs), expected["y"]) > 1e-3


def test_gradients_are_those_of_the_values():
    inputs = ImageShape(1, 2, 3, 2, 1).inputs()
    del inputs["dy"]
    assert torch.autograd.gradcheck(ss2d_scan, [t.requires_grad_() for t in inputs.values()])


def test_an_all_row_pattern_turns_with_the_image_only_in_cross2d():
    """cross2d of the transposed image with directions 0 <-> 1 and 2 <-> 3 swapped is the transposed output."""
    inputs = ImageShape(2, 3, 5, 4, 2).inputs()
    del inputs["dy"]
    swap = torch.tensor([1, 0, 3, 2])

    def by_direction(t):
        return t.view(4, -1, *t.shape[1:])[swap].reshape(t.shape)

    turned = {
        "x": inputs["x"].transpose(1, 2),
        "projected": inputs["projected"].transpose(1, 2).unflatten(-1, (4, -1))[..., swap, :].flatten(-2),
        "dt_weight": inputs["dt_weight"][swap],
        "dt_bias": inputs["dt_bias"][swap],
        "A": by_direction(inputs["A"]),
        "D": by_direction(inputs["D"]),
    }
    assert relative_max(ss2d_scan(**turned).transpose(1, 2), ss2d_scan(**inputs)) <= 1e-12
    rows_only = ss2d_scan(**inputs, pattern="unidi")
    assert relative_max(ss2d_scan(**turned, pattern="unidi").transpose(1, 2), rows_only) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_a_float32_state(dtype):
    inputs = {name: t.to(dtype) for name, t in ImageShape(2, 12, 11, 6, 2).inputs().items()}
    found = value_and_gradients(ss2d_scan, inputs, dtype)
    expected = value_and_gradients(ss2d_scan, inputs, torch.float32)
    assert all(t.dtype == dtype for t in found.values())
    assert worst(found, expected) <= torch.finfo(dtype).eps


def test_layout_of_the_inputs_does_not_matter():
    inputs = ImageShape(2, 3, 5, 4, 2).inputs()
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in inputs.items()}
    assert not strided["x"].is_contiguous()
    assert worst(value_and_gradients(ss2d_scan, strided), value_and_gradients(ss2d_scan, inputs)) == 0


@pytest.mark.parametrize("shape", [ImageShape(4, 8, 8, 16, 1), ImageShape(3, 5, 7, 33, 3)], ids=str)
def test_two_runs_are_bit_equal(shape):
    first, second = (value_and_gradients(ss2d_scan, shape.inputs(), torch.float32) for _ in range(2))
    assert worst(first, second) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant):
    inputs = ImageShape(2, 7, 5, 6, 2).inputs()

    def recomputed(*tensors):
        return checkpoint(ss2d_scan, *tensors, use_reentrant=reentrant)

    plain = value_and_gradients(ss2d_scan, inputs, torch.float32)
    again = value_and_gradients(lambda **kw: recomputed(*kw.values()), inputs, torch.float32)
    assert worst(again, plain) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("rank", [1, 2])
def test_op_keeps_the_contract_of_torch(rank):
    """opcheck: schema, fake tensors, autograd registration, and autograd under compile with dynamic shapes."""
    inputs = ImageShape(2, 3, 4, 5, rank).inputs()
    del inputs["dy"]
    tensors = [t.float().requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.vmamba.ss2d_scan, (*tensors, "cross2d", "torch"))


def test_compiles_whole():
    """One graph, no break: the op is opaque to the compiler and its adjoint is one op too."""
    inputs = ImageShape(2, 3, 5, 4, 2).inputs()
    compiled = torch.compile(lambda **kw: ss2d_scan(**kw).sin(), fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(lambda **kw: ss2d_scan(**kw).sin(), inputs, torch.float32)
    assert worst(value_and_gradients(compiled, inputs, torch.float32), expected) == 0


def test_flops_are_counted():
    """The dt projection B*L*4C*R and four scans of 9*B*L*C*N + B*L*C multiply-adds, two FLOPs each."""
    inputs = ImageShape(2, 3, 5, 4, 2).inputs()
    del inputs["dy"]
    forward = 2 * (2 * 15 * 16) * (2 + 9 + 1)
    with FlopCounterMode(display=False) as counter:
        ss2d_scan(**{n: t.requires_grad_() for n, t in inputs.items()}).sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_evaluation_first_does_not_spoil_training():
    """The walks are cached: made under inference mode and a foreign default device, they must serve autograd too."""
    fast._walks.cache_clear()
    inputs = ImageShape(2, 3, 4, 3, 1).inputs()
    leaves = {n: t for n, t in inputs.items() if n != "dy"}
    with torch.inference_mode(), torch.device("meta"):
        y = ss2d_scan(**leaves)
    assert relative_max(y, value_and_gradients(ss2d_scan, inputs)["y"]) == 0


def test_mistakes_are_named():
    inputs = IMAGE_SHAPES[1].inputs()
    del inputs["dy"]
    with pytest.raises(ValueError, match="cross2d, unidi, bidi"):
        ss2d_scan(**inputs, pattern="cascade")
    with pytest.raises(BackendError, match="no Triton path"):
        ss2d_scan(**inputs, backend="triton")
    with pytest.raises(ValueError, match=r"projected is .* it must be \(2, 3, 5, 16\)"):
        ss2d_scan(**inputs | {"projected": inputs["projected"][..., 1:]})
