"""The four-direction scan is the permuted reference, in value and every gradient; its walks are the official ones.

The Triton kernels run where there is a GPU, else in Triton's interpreter, which knows every law but speed.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from golden_rule import parameter
from vmamba_dist.models.ss2d import SS2D
from vmamba_kernels import PATTERNS, BackendError, backend, scan_order, ss2d_scan
from vmamba_kernels.scan import recurrence
from vmamba_kernels.ss2d import fast, fused, tiles
from vmamba_kernels.ss2d.op import scan_weight_gradients, scan_weights
from vmamba_kernels.ss2d.reference import ss2d_scan_reference
from vmamba_kernels.ss2d.tiles import Plan
from vmamba_kernels.testing import (
    IMAGE_SHAPES,
    ImageShape,
    golden_tensor,
    relative_max,
    relative_rms,
    value_and_gradients,
    worst,
)

GOLDEN = Path(__file__).parents[1] / "golden"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CAST = ("x", "projected", "dt_weight", "dy")  # what a model hands over in its own precision
# Relative RMS of the Triton kernels.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


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


def test_one_direction_after_the_other_adds_the_same(monkeypatch):
    """As on a GPU, where four at once would be added in any order."""
    inputs, add = IMAGE_SHAPES[0].inputs(), fast._add_tokens
    expected = value_and_gradients(ss2d_scan, inputs)
    monkeypatch.setattr(fast, "_add_tokens", lambda *args, **_: add(*args, at_once=False))
    assert worst(value_and_gradients(ss2d_scan, inputs), expected) <= 1e-12


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
    torch.library.opcheck(torch.ops.vmamba.ss2d_scan, (*tensors, "cross2d", "torch", True))


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
    with pytest.raises(ValueError, match=r"projected is .* it must be \(2, 3, 5, 16\)"):
        ss2d_scan(**inputs | {"projected": inputs["projected"][..., 1:]})
    with pytest.raises(BackendError, match="computes in float32 and the input is float64"):
        ss2d_scan(**{n: t.to(DEVICE) for n, t in inputs.items()}, backend="triton")


def test_triton_asks_for_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    inputs = IMAGE_SHAPES[1].inputs()
    del inputs["dy"]
    with pytest.raises(BackendError, match="need a CUDA device"):
        ss2d_scan(**{n: t.float() for n, t in inputs.items()}, backend="triton")


# The Triton kernels.

ON_TRITON = partial(ss2d_scan, backend="triton")
SMALL = Plan(span=4, steps=2, ends=16, output=16, gradients=16)
LINKED = Plan(span=2, steps=1, ends=16, output=16, gradients=16)
WIDE = Plan(
    span=4, steps=1, walked=2, ends=32, output=32, gradients=32
)  # as on a GPU: two parts, 16 bytes a thread
APART = Plan(span=4, steps=1, walked=2, ends=32, output=32, gradients=32, apart=True)
CUT = ImageShape(2, 3, 5, 20, 3)  # 4 segments of 4 steps, the last of 3; 2 blocks of channels, the last of 4
MINI = ImageShape(2, 3, 4, 6, 2)  # 3 segments of 4 steps


@pytest.fixture
def cut(monkeypatch) -> Callable[[Plan], None]:
    """Return what makes a plan the plan of every shape."""

    def use(plan: Plan) -> None:
        monkeypatch.setattr(tiles, "default_plan", lambda *_: plan)

    return use


def tensors(shape: ImageShape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a shape's inputs and dy on the device, in the precisions a model has them in."""
    return {n: t.to(DEVICE, dtype if n in CAST else torch.float32) for n, t in shape.inputs().items()}


def outcome(inputs: dict[str, Tensor], scan: Callable[..., Tensor] = ON_TRITON) -> dict[str, Tensor]:
    """Return y and every gradient, each in its own dtype."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if n != "dy"}
    y = scan(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def errors(
    inputs: dict[str, Tensor],
    pattern: str = "cross2d",
    definition: Callable[..., Tensor] = ss2d_scan_reference,
):
    """Return by name the relative RMS difference from the float64 definition."""
    expected = outcome({n: t.double() for n, t in inputs.items()}, partial(definition, pattern=pattern))
    found = outcome(inputs, partial(ss2d_scan, pattern=pattern, backend="triton"))
    assert {n: t.dtype for n, t in found.items()} == {n: inputs["x" if n == "y" else n].dtype for n in found}
    return {n: relative_rms(t, expected[n]) for n, t in found.items()}


def above(found: dict[str, float], tolerance: float) -> dict[str, float]:
    return {name: error for name, error in found.items() if not error <= tolerance}


KERNEL_CASES = [
    (CUT, "cross2d", SMALL),
    (CUT, "unidi", SMALL),
    (CUT, "bidi", SMALL),
    (CUT, "cross2d", Plan(span=8, steps=4, ends=32, output=16, gradients=16)),
    (ImageShape(2, 3, 5, 36, 3), "cross2d", WIDE),
    # dz kept: blocks and rows in part; two steps; 17 blocks of channels; more tokens than one sum has; two states.
    (ImageShape(2, 3, 5, 36, 3), "cross2d", APART),
    (ImageShape(2, 4, 4, 64, 15), "unidi", Plan(span=4, steps=2, gradients=16, apart=True)),
    (ImageShape(1, 2, 2, 260, 2), "bidi", Plan(span=2, steps=1, gradients=16, apart=True)),
    (ImageShape(2, 1, 520, 3, 2), "cross2d", Plan(span=65, steps=1, gradients=16, apart=True)),
    (ImageShape(1, 3, 4, 20, 3, 2), "cross2d", APART),
    (ImageShape(1, 3, 5, 36, 3, 2), "bidi", Plan(span=8, steps=2, walked=4, gradients=32)),
    (ImageShape(5, 3, 5, 7, 2), "unidi", Plan(span=4, steps=4, ends=16, output=32, gradients=16)),  # 20 rows
    (ImageShape(1, 3, 5, 20, 2), "bidi", Plan(span=3, steps=1, ends=16, output=16, gradients=32)),
    (ImageShape(2, 3, 5, 20, 2), "cross2d", Plan(span=15, steps=1)),  # one segment, exactly filled
    (ImageShape(2, 3, 5, 20, 2), "cross2d", Plan(span=16, steps=4, ends=16, output=16, gradients=16)),
    (ImageShape(4, 2, 8, 33, 2), "cross2d", Plan(span=4, steps=4)),  # 16 rows: no tile is in part
    # Straight segments: whole tiles of rows and channels; neither; six rows of 16, one step a tile; two states.
    (ImageShape(2, 4, 8, 32, 2), "cross2d", SMALL),
    (ImageShape(3, 8, 4, 20, 3), "cross2d", SMALL),
    (ImageShape(1, 6, 3, 16, 2), "unidi", Plan(span=3, steps=1, ends=16, output=16, gradients=16)),
    (ImageShape(2, 4, 4, 20, 2, 2), "bidi", SMALL),
    (ImageShape(1, 4, 3, 20, 4, 2), "cross2d", SMALL),
    (ImageShape(1, 3, 4, 9, 1, 2), "bidi", SMALL),
    # Segments are linked 16 at once: 17, the last of whose end nobody wants; 18; 34, one in part. And 64 at once: 130.
    (ImageShape(1, 2, 17, 5, 2, 2), "cross2d", LINKED),
    (ImageShape(1, 1, 36, 70, 2), "unidi", Plan(span=2, steps=1)),
    (ImageShape(1, 1, 67, 5, 2), "cross2d", LINKED),
    (ImageShape(1, 10, 13, 5, 2), "cross2d", Plan(span=1, steps=1, ends=16, output=16, gradients=16)),
    (ImageShape(1, 3, 2, 5, 17, 16), "cross2d", Plan(span=2, steps=2, ends=16, output=16, gradients=16)),
    (ImageShape(2, 1, 1, 8, 1), "cross2d", SMALL),
    (ImageShape(2, 1, 1, 8, 2, 16), "unidi", SMALL),
    (ImageShape(1, 1, 13, 5, 2), "cross2d", SMALL),
    (ImageShape(1, 13, 1, 5, 2), "bidi", SMALL),
    (ImageShape(0, 6, 6, 4, 2), "cross2d", SMALL),
]


@pytest.mark.parametrize(("shape", "pattern", "plan"), KERNEL_CASES, ids=str)
def test_triton_is_the_permuted_reference(shape, pattern, plan, cut):
    cut(plan)
    found = errors(tensors(shape), pattern)
    assert above(found, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("shape", [ImageShape(2, 4, 8, 32, 2), ImageShape(3, 8, 4, 20, 3)], ids=str)
def test_straight_segments_and_the_table_give_the_same_bits(shape, cut, monkeypatch):
    cut(SMALL)
    inputs = tensors(shape)
    walk = tiles.walk_table("cross2d", shape.height, shape.width, SMALL.span, torch.device("cpu"))
    assert walk.straight
    straight = outcome(inputs)
    made = tiles.walk_table
    monkeypatch.setattr(fused, "walk_table", lambda *words: made(*words)._replace(straight=False))
    by_table = outcome(inputs)
    assert [name for name in straight if not torch.equal(straight[name], by_table[name])] == []


@pytest.mark.skipif(GPU, reason="takes 6 GiB, of which a CPU touches a few pages")
def test_partial_sums_that_together_pass_two_to_the_31_elements_are_added(monkeypatch):
    """COUNT alone is within an int32, its multiples are not."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    count, blocks = 2**30, 3
    partial_sums = torch.empty(blocks, count, dtype=torch.float16)
    partial_sums[:, :16] = torch.arange(1.0, 4.0)[:, None]
    out = torch.empty(16)
    constants = {"BLOCKS": blocks, "PITCH": 8, "R": 0, "N": 0, "TILE": 16, "EARLY": 0}
    fused.ss2d_projected_sum[(1,)](partial_sums, out, count, **constants)
    assert torch.equal(out, torch.full((16,), 6.0))


def test_a_walk_is_straight_where_no_segment_turns():
    def straight(pattern: str, height: int, width: int, span: int) -> bool:
        return tiles.walk_table(pattern, height, width, span, torch.device("cpu")).straight

    assert straight("cross2d", 56, 56, 28)
    assert straight("cross2d", 14, 28, 7)
    assert straight("cross2d", 28, 6, 7)  # the tokens of rows follow one another
    assert not straight("cross2d", 6, 28, 7)  # columns of 6
    assert straight("bidi", 6, 28, 7)
    assert straight("unidi", 5, 3, 15)  # rows alone, one after the other
    assert not straight("unidi", 5, 3, 4)  # the last segment has a step that is none
    assert not straight("cross2d", 4, 4, 1)


@pytest.mark.filterwarnings(
    "ignore:.*encountered in (divide|multiply)"
)  # the interpreter's, of what is not taken
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps_of_any_length_are_finite(dtype, cut):
    """The exponential of a time step before its logarithm is bounded, and does not change what is beyond the bound."""
    cut(SMALL)
    inputs = tensors(MINI, dtype)
    inputs["dt_bias"] = torch.linspace(-300, 300, inputs["dt_bias"].numel(), device=DEVICE).view_as(
        inputs["dt_bias"]
    )
    tolerance = 8e-3 if dtype == torch.bfloat16 and not GPU else TOLERANCE[dtype]
    assert above(errors(inputs), tolerance) == {}


@pytest.mark.parametrize(
    ("dtype", "shape", "plan"),
    [
        (torch.bfloat16, CUT, SMALL),
        (torch.bfloat16, ImageShape(1, 3, 5, 9, 4, 2), SMALL),
        (torch.float16, ImageShape(2, 3, 5, 9, 4), SMALL),
        # Columns in channel_order: whole blocks and rows; blocks and rows in part; a float32 sum; two states.
        (torch.bfloat16, ImageShape(4, 4, 4, 64, 3), WIDE),
        (torch.bfloat16, ImageShape(1, 3, 5, 40, 3), WIDE),
        (torch.float16, ImageShape(1, 3, 5, 40, 3), WIDE),
        (torch.bfloat16, ImageShape(1, 3, 4, 40, 3, 2), Plan(span=4, steps=2, gradients=32)),
        # dz kept; B and C beside the time steps in what is loaded, and beyond it.
        (torch.bfloat16, ImageShape(4, 4, 4, 64, 3), APART),
        (torch.float16, ImageShape(1, 3, 5, 40, 14), APART),
        (torch.bfloat16, ImageShape(1, 3, 5, 40, 16), APART),
        (torch.bfloat16, ImageShape(1, 3, 5, 40, 16), WIDE),
    ],
    ids=str,
)
def test_triton_in_half_precision_errs_by_its_rounding(dtype, shape, plan, cut):
    """The interpreter cuts bits off where a GPU rounds to bfloat16: an error of half a unit, always towards zero."""
    cut(plan)
    tolerance = 8e-3 if dtype == torch.bfloat16 and not GPU else TOLERANCE[dtype]
    assert above(errors(tensors(shape, dtype)), tolerance) == {}


def test_two_directions_beyond_float16_that_cancel_are_summed(cut):
    """8e4 of one direction and -8e4 of the other: y is what is left, in every sum of walks but float16's."""
    cut(SMALL)
    inputs = tensors(ImageShape(1, 1, 1, 8, 1), torch.float16)
    inputs["x"].fill_(400)
    inputs["dt_weight"].zero_()
    inputs["dt_bias"].fill_(0.55)
    inputs["A"].fill_(-1)
    inputs["projected"].view(4, 3)[:] = torch.tensor([[0.0, 1, 200], [0, 1, 0], [0, 1, -200], [0, 1, 0]])
    found, expected = (
        ss2d_scan(**{n: t.to(dtype) for n, t in inputs.items() if n != "dy"}, backend=backend)
        for dtype, backend in ((None, "triton"), (torch.float64, "torch"))
    )
    assert relative_rms(found, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    "plan", [{"walked": 3}, {"steps": 4, "walked": 2}, {"span": 6, "steps": 1, "walked": 4}], ids=str
)
def test_a_plan_whose_tiles_do_not_fit_is_refused(plan):
    with pytest.raises(ValueError, match=f"walked={plan['walked']}: use"):
        Plan(**plan)


@pytest.mark.parametrize("shape", [CUT, ImageShape(2, 1, 1, 8, 1)], ids=str)
def test_a_sum_of_four_directions_without_a_skip_errs_by_four_roundings(shape, cut):
    """With one, what is rounded between walks is a small part. The interpreter cuts off, four times the same way."""
    cut(SMALL)
    inputs = tensors(shape, torch.bfloat16)
    inputs["D"].zero_()
    found = errors(inputs)
    assert above({n: found[n] for n in ("y", "x")}, TOLERANCE[torch.bfloat16] if GPU else 1.6e-2) == {}


def test_every_group_of_rows_is_in_the_parameters_gradients():
    """More groups than are added at once, the last of them in part; dD to each direction."""
    groups, channels, rank, state = (150, 270), 12, 3, 2
    sizes = [4 * channels * rank, 4 * channels], [4 * channels * state, channels]

    def numbers(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), dtype=torch.float32, device=DEVICE).view(shape) % 61

    weights, others = (numbers(n, sum(part)) for n, part in zip(groups, sizes, strict=True))
    found = [torch.full((n,), torch.nan, device=DEVICE) for n in (*sizes[0], sizes[1][0], 4 * channels)]
    grid = (sum(-(-sum(part) // fused.PARAMETER_TILE["TILE"]) for part in sizes),)
    constants = {"C": channels, "R": rank, "N": state, "EARLY": 0, **fused.PARAMETER_TILE}
    fused.ss2d_parameter_sum[grid](weights, others, *found, *groups, **constants)
    d_A, skip = others.sum(0).split(sizes[1])
    assert all(map(torch.equal, found, [*weights.sum(0).split(sizes[0]), d_A, skip.repeat(4)]))


@pytest.mark.parametrize("rank", [2, 6], ids=["two rows of filling", "none"])
def test_what_a_scan_reads_of_a_models_parameters(rank):
    """The projection's rows with zeros behind each direction's, A, and the adjoint of both; backends agree."""
    channels, state = 12, 1 if rank == 6 else 2
    width = rank + 2 * state
    x_proj, dt_proj, a_logs = (
        golden_tensor(f"weights.{n}", shape).float().to(DEVICE)
        for n, shape in enumerate([(4 * width, channels), (4, channels, rank), (4 * channels, state)])
    )
    for dtype in (torch.float32, torch.float16):
        padded, dt, A = scan_weights(x_proj, dt_proj, a_logs, dtype, "triton")
        plain, plain_dt, plain_A = scan_weights(x_proj, dt_proj, a_logs, dtype, "torch")
        rows = padded.view(4, 8, channels)
        assert torch.equal(rows[:, :width].reshape(plain.shape), plain)
        assert (rows[:, width:] == 0).all()
        assert torch.equal(dt, plain_dt)
        assert relative_rms(A, plain_A) < 1e-6
        assert relative_rms(plain_A, -a_logs.double().exp()) < 1e-6
        found = scan_weight_gradients(padded, dt, a_logs, A, torch.float32, "triton")
        assert torch.equal(found[0], plain.float())
        assert torch.equal(found[1], plain_dt.float())
        assert relative_rms(found[2], a_logs * A) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_making_weights_is_an_op_as_the_checks_want_it(backend):
    x_proj, dt_proj, a_logs = (torch.rand(s, device=DEVICE) for s in ((16, 6), (24, 2), (24, 1)))
    torch.library.opcheck(scan_weights, (x_proj, dt_proj, a_logs, torch.float16, backend))
    made = scan_weights(x_proj, dt_proj, a_logs, torch.float16, backend)
    torch.library.opcheck(scan_weight_gradients, (*made[:2], a_logs, made[2], torch.float32, backend))


def test_a_state_beyond_float16_is_kept(cut):
    """States of 10^5, of which a small C makes outputs of 10^2."""
    cut(SMALL)
    inputs = tensors(MINI, torch.float16)
    directions = inputs["projected"].view(*inputs["projected"].shape[:3], 4, -1)
    inputs["x"].fill_(400)
    inputs["dy"].mul_(1e-2)  # or C's gradient, a sum of states, is itself beyond float16
    directions[..., 2] = 400
    directions[..., 3] = 1e-3
    assert above(errors(inputs), 2e-3) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments_pass_their_state_on(dtype, cut, monkeypatch):
    """Holds both carries: a state dropped between two segments changes y, an adjoint state dropped changes dx."""
    cut(SMALL)
    inputs = tensors(MINI, dtype)
    whole, linked = outcome(inputs), fused._Problem.starts
    for dropped in (False, True):

        def forgetful(self, kernel, walked, reverse, dropped=dropped):
            starts = linked(self, kernel, walked, reverse)
            return torch.zeros_like(starts) if reverse == dropped else starts

        monkeypatch.setattr(fused._Problem, "starts", forgetful)
        broken = outcome(inputs)
        changed = {n for n in whole if relative_rms(broken[n], whole[n]) > 1e-3}
        assert changed >= ({"x", "projected", "dt_weight", "dt_bias", "A"} if dropped else {"y"})
        assert ("y" in changed) != dropped


@pytest.mark.parametrize("plan", [SMALL, APART], ids=["within", "apart"])
def test_no_memory_is_read_before_it_is_written(plan, cut, monkeypatch):
    """Everything that is allocated starts as NaN."""
    cut(plan)
    cases = [tensors(MINI, torch.bfloat16), tensors(ImageShape(1, 2, 3, 5, 3, 2))]
    plain = [outcome(inputs) for inputs in cases]

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.empty(1).isnan()
    assert torch.ones(1).new_empty((2, 3)).isnan().all()
    for inputs, expected in zip(cases, plain, strict=True):
        assert worst(outcome(inputs), expected) == 0


@pytest.mark.parametrize("plan", [SMALL, APART], ids=["within", "apart"])
def test_triton_gives_the_same_bits_twice(plan, cut):
    cut(plan)
    inputs = tensors(MINI, torch.bfloat16)
    assert worst(outcome(inputs), outcome(inputs)) == 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(ImageShape(4, 4, 4, 6, 2), torch.bfloat16), (ImageShape(2, 3, 3, 6, 3), torch.float32)],
    ids=str,
)
def test_a_batch_does_not_change_an_image(shape, dtype, cut):
    """The first batch fills its rows exactly and is compiled without masks, its images alone are not."""
    cut(SMALL)
    inputs = tensors(shape, dtype)
    together = outcome(inputs)
    alone = outcome(inputs | {n: inputs[n][-1:] for n in ("x", "projected", "dy")})
    for name in ("y", "x", "projected"):
        assert torch.equal(alone[name][0], together[name][-1]), name


def test_triton_takes_inputs_of_any_layout(cut):
    cut(SMALL)
    inputs = tensors(MINI)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in inputs.items()}
    assert not any(strided[n].is_contiguous() for n in ("x", "projected", "dt_weight", "dy"))
    assert worst(outcome(strided), outcome(inputs)) == 0


def test_triton_skips_the_unused_columns_of_a_projection(cut):
    """The models pad a direction to a multiple of 8 columns; what finite value lies in them has no say."""
    cut(SMALL)
    inputs = tensors(MINI, torch.bfloat16)
    plain = outcome(inputs)
    padded = inputs | {
        "projected": torch.nn.functional.pad(
            inputs["projected"].unflatten(-1, (4, -1)), (0, 4), value=100.0
        ).flatten(-2)
    }
    found = outcome(padded)
    gradient = found["projected"].unflatten(-1, (4, -1))
    assert torch.equal(gradient[..., 4:], torch.zeros_like(gradient[..., 4:]))
    assert worst(found | {"projected": gradient[..., :4].flatten(-2)}, plain) == 0


def test_wide_offsets_change_no_bit(cut, monkeypatch):
    cut(SMALL)
    inputs = tensors(MINI)
    narrow = outcome(inputs)
    build = fused._Problem.__init__

    def wide(self, *args):
        build(self, *args)
        assert self.constants["WIDE"] is False
        self.constants["WIDE"] = True

    monkeypatch.setattr(fused._Problem, "__init__", wide)
    assert worst(outcome(inputs), narrow) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("save", [True, False])
def test_op_keeps_the_contract_of_torch_on_triton(save, cut):
    """Without saved states there is no adjoint to check."""
    cut(SMALL)
    inputs = tensors(ImageShape(1, 2, 3, 4, 2))
    del inputs["dy"]
    leaves = [t.requires_grad_(save) for t in inputs.values()]
    torch.library.opcheck(torch.ops.vmamba.ss2d_scan, (*leaves, "cross2d", "triton", save))


def test_triton_compiles_whole(cut):
    cut(SMALL)
    inputs = tensors(ImageShape(2, 3, 5, 4, 2))
    scan = partial(ss2d_scan, backend="triton")
    compiled = torch.compile(lambda **kw: scan(**kw).sin(), fullgraph=True, backend="aot_eager")
    assert worst(outcome(inputs, compiled), outcome(inputs, lambda **kw: scan(**kw).sin())) == 0


@pytest.fixture
def launches(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Return the list of what each forward from here on returned: y and the states it saved."""
    returned = []
    forward = fused.forward

    def noted(*args):
        returned.append(forward(*args))
        return returned[-1]

    monkeypatch.setattr(fused, "forward", noted)
    return returned


SAVING = partial(create_selective_checkpoint_contexts, [torch.ops.vmamba.ss2d_scan.default])


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"use_reentrant": True}, 2),
        ({"use_reentrant": False}, 2),
        ({"use_reentrant": False, "context_fn": SAVING}, 1),
    ],
    ids=["reentrant", "not reentrant", "selective"],
)
def test_checkpointing_triton_changes_no_bit(options, forwards, cut, launches):
    """Selective checkpointing keeps the scan: its forward runs once, where full checkpointing runs it again."""
    cut(SMALL)
    inputs = tensors(MINI)

    def block(*args):
        return ss2d_scan(*args, backend="triton").sin()

    plain = with_backward(inputs, lambda **kw: block(*kw.values()))
    launches.clear()
    again = with_backward(inputs, lambda **kw: checkpoint(block, *kw.values(), **options))
    assert len(launches) == forwards
    assert worst(again, plain) == 0


def with_backward(inputs: dict[str, Tensor], scan: Callable[..., Tensor]) -> dict[str, Tensor]:
    """As outcome, by backward(): reentrant checkpointing knows no other way."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if n != "dy"}
    y = scan(**leaves)
    y.backward(inputs["dy"])
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items() if t.grad is not None}}


def test_inference_saves_nothing(cut, launches):
    cut(SMALL)
    inputs = tensors(MINI)
    trained = outcome(inputs)
    del inputs["dy"]
    y = ss2d_scan(**inputs, backend="triton")
    with torch.no_grad():
        ss2d_scan(**{n: t.requires_grad_() for n, t in inputs.items()}, backend="triton")
    assert [saved.numel() > 0 for _, saved in launches] == [True, False, False]
    assert torch.equal(y, trained["y"])


def test_segments_and_tiles_of_directions_that_mirror_each_other_share_tokens():
    """A program adds both senses of an axis in place: in each of its tiles it must meet the same tokens."""
    for pattern in PATTERNS:
        table, count, _straight = tiles.walk_table(pattern, 5, 9, 8, torch.device("cpu"))
        order = scan_order(pattern, 5, 9)
        assert count == 6
        assert table.shape == (4, 48)
        for k in range(4):
            assert torch.equal(table[k][table[k] >= 0], order[k].int())
        if tiles.mirrored(pattern):
            assert torch.equal(table[2:], table[:2].flip(1))


@pytest.mark.parametrize("case", ["ss2d_v05_noz", "ss2d_v05_bidi"])
def test_a_module_on_triton_equals_the_official_one(case, cut):
    """The vectors of tests/unit/test_models_golden.py, that file's law and tolerance."""
    cut(Plan(span=20, steps=4, ends=64, output=64, gradients=64))
    stored = load_file(GOLDEN / "modules.safetensors")
    if case == "ss2d_v05_noz":
        module = SS2D(32, scan_backend="triton")
    else:
        module = SS2D(32, ssm_ratio=2.0, scan_pattern="bidi", scan_backend="triton")
    official = {n: stored[f"{case}.grad.{n}"] for n, _ in module.named_parameters()}
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(parameter(f"{case}.{name}", tuple(official[name].shape)).view(p.shape))
    module.to(DEVICE)
    x = golden_tensor(f"{case}.x", (2, 32, 6, 10)).float().to(DEVICE).requires_grad_()
    y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    y.backward(golden_tensor(f"{case}.dy", tuple(y.shape)).to(y))
    found = {
        "y": relative_max(y.cpu(), stored[f"{case}.y"]),
        "x": relative_max(x.grad.cpu(), stored[f"{case}.grad.x"]),
    }
    for name, p in module.named_parameters():
        found[name] = relative_max(p.grad.cpu().view(official[name].shape), official[name])
    assert above(found, 1e-4) == {}


def test_words_of_two_are_read_only_where_words_begin(monkeypatch):
    """A view that begins at an odd 16-bit number would be a misaligned address on a GPU."""
    monkeypatch.setattr(fused, "interpreted", lambda: False)
    inputs = {n: t for n, t in tensors(ImageShape(1, 2, 3, 8, 2), torch.bfloat16).items() if n != "dy"}
    assert fused._Problem(**inputs, pattern="cross2d").constants["PAIRED"]
    numel, shape = inputs["projected"].numel(), inputs["projected"].shape
    inputs["projected"] = inputs["projected"].new_zeros(numel + 1)[1:].view(shape)
    assert not fused._Problem(**inputs, pattern="cross2d").constants["PAIRED"]


def test_of_a_few_tokens_partial_sums_are_float32():
    """No mean over many tokens hides what rounding does to one; at two, bfloat16 missed its bar on a GPU."""
    for height, wanted in ((3, torch.float32), (4, torch.bfloat16)):
        inputs = tensors(ImageShape(1, height, 5, 8, 2), torch.bfloat16)
        del inputs["dy"]
        assert fused._Problem(**inputs, pattern="cross2d").partial_dtype == wanted


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("state", [1, 2, 16])
@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2), (3, 5), (7, 7), (14, 14), (28, 28), (56, 56), (1, 3137), (128, 64)],
    ids="{0[0]}x{0[1]}".format,
)
def test_native_kernels_are_the_definition_at_every_length(size, state, dtype):
    """Against the PyTorch path in float64, which is the reference to 1e-12 and does not walk step by step."""
    shape = ImageShape(2, *size, 40, 6 if state == 1 else 3, state)
    found = errors(tensors(shape, dtype), definition=partial(ss2d_scan, backend="torch"))
    assert above(found, TOLERANCE[dtype]) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 768], ids=["within", "apart"])
def test_launches_that_overlap_change_no_bit(channels, monkeypatch):
    """Twenty times against kernels each of which begins when the one before has ended."""
    inputs = tensors(ImageShape(16, 28, 28, channels, channels // 16), torch.bfloat16)
    overlapping = [outcome(inputs) for _ in range(20)]
    monkeypatch.setattr(fused, "overlaps_launches", lambda device: False)
    one_by_one = outcome(inputs)
    assert {worst(found, one_by_one) for found in overlapping} == {0}


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_31_elements():
    """The last image of a batch whose offsets pass 2**31 has the bits that it has alone."""
    height, channels, rank = 56, 96, 6
    batch = 2**31 // (height * height * channels) + 2
    if torch.cuda.mem_get_info()[0] < 64 * 2**30:
        pytest.skip("needs 64 GiB of GPU memory")
    small = tensors(ImageShape(1, height, height, channels, rank), torch.bfloat16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = dict(small)
    for name in ("x", "projected", "dy"):
        size = (batch, height, height, small[name].shape[-1])
        inputs[name] = torch.empty(size, dtype=torch.bfloat16, device=DEVICE).uniform_(
            -1, 1, generator=generator
        )
    assert inputs["x"].numel() >= 2**31
    together = outcome(inputs)
    for i in (0, batch - 1):
        alone = outcome(inputs | {n: inputs[n][i : i + 1].clone() for n in ("x", "projected", "dy")})
        for name in ("y", "x", "projected"):
            assert torch.equal(alone[name][0], together[name][i]), (name, i)
