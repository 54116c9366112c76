"""The Triton selective scan is the reference, in value and every gradient: interpreted on a CPU, native on a GPU.

The interpreter is slow, so there most tests cut the kernels' tiles down until a few steps cross several of them.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vmamba_kernels import BackendError, selective_scan
from vmamba_kernels.backend import interpreted
from vmamba_kernels.scan.reference import selective_scan_reference
from vmamba_kernels.testing import (
    ScanShape,
    golden_tensor,
    relative_max,
    relative_rms,
    value_and_gradients,
    worst,
)

triton_fwd = pytest.importorskip("vmamba_kernels.scan.triton_fwd")
triton_bwd = pytest.importorskip("vmamba_kernels.scan.triton_bwd")

DEVICE = "cpu" if interpreted() else "cuda"
GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = json.loads((GOLDEN / "selective_scan.json").read_text())
# The interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3 if interpreted() else 4e-3}

scan = partial(selective_scan, backend="triton")


@pytest.fixture
def tiny(monkeypatch):
    """Tiles of 4 and 2 channels × 2 segments × 2 steps under the interpreter; a GPU keeps those of its table."""
    if interpreted():
        tiles = triton_fwd.Tiles(triton_fwd.Tile(4, 2, 2, 1), triton_fwd.Tile(2, 2, 2, 1))
        monkeypatch.setattr(triton_fwd, "DEFAULT", tiles)


@pytest.fixture
def long_chunks(monkeypatch):
    """Twice the segments: the interpreter's time is that of chunks and states, not of their elements."""
    if interpreted():
        tile = triton_fwd.Tile(8, 16, 8, 1)
        monkeypatch.setattr(triton_fwd, "DEFAULT", triton_fwd.Tiles(tile, tile))


def without(inputs: dict[str, Tensor], *absent: str) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in inputs.items() if name not in absent}


def differences(inputs, dtype=torch.float32, *, delta_softplus=True) -> dict[str, float]:
    """Return the relative RMS of y and of each gradient against the float64 reference of the same rounded numbers."""
    rounded = {name: t.to(dtype).double() for name, t in inputs.items()}
    # The PyTorch path is the definition to 1e-12 in float64 (test_scan.py), and fast enough for long sequences.
    expected = value_and_gradients(
        partial(selective_scan, delta_softplus=delta_softplus, backend="torch"), rounded
    )
    found = value_and_gradients(partial(scan, delta_softplus=delta_softplus), inputs, dtype)
    assert found.keys() == expected.keys()
    assert all(t.dtype == dtype for t in found.values())
    return {name: relative_rms(found[name], expected[name]) for name in expected}


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case["case"])
def test_golden_vectors(case, long_chunks):
    name, width = case["case"], case["K"] * case["C"]
    sequences, grouped = (case["B"], width, case["L"]), (case["B"], case["K"], case["N"], case["L"])
    delta, bias = golden_tensor(f"{name}.delta", sequences), golden_tensor(f"{name}.delta_bias", (width,))
    inputs = {
        "u": golden_tensor(f"{name}.u", sequences),
        "delta": 0.5 * delta if case["softplus"] else 0.1 * delta.abs(),
        "A": -golden_tensor(f"{name}.A", (width, case["N"])).exp(),
        "B": golden_tensor(f"{name}.B", grouped),
        "C": golden_tensor(f"{name}.C", grouped),
        "D": golden_tensor(f"{name}.D", (width,)),
        "delta_bias": 0.5 * bias if case["softplus"] else 0.05 * bias.abs(),
        "dy": golden_tensor(f"{name}.dy", sequences),
    }
    inputs = without(inputs, *(() if case["D"] else ("D",)))
    stored = load_file(GOLDEN / "selective_scan.safetensors")
    found = value_and_gradients(partial(scan, delta_softplus=case["softplus"]), inputs, torch.float32)
    for key, value in found.items():
        stem = f"{name}.y" if key == "y" else f"{name}.grad.{ {'B': 'Bs', 'C': 'Cs'}.get(key, key) }"
        assert relative_max(value.cpu(), stored[stem]) <= 1e-5, key


@pytest.mark.parametrize(
    ("shape", "absent", "softplus"),
    [
        (ScanShape(1, 2, 5, 3, 11), (), True),
        (ScanShape(2, 1, 3, 1, 9), (), False),
        (ScanShape(1, 1, 3, 1, 5), ("D",), True),
        (ScanShape(1, 1, 3, 1, 5), ("delta_bias",), True),
        (ScanShape(1, 1, 3, 1, 5), ("D", "delta_bias"), False),
        (ScanShape(1, 1, 3, 16, 5), (), True),
        (ScanShape(2, 2, 3, 2, 1), (), True),
        (ScanShape(1, 1, 1, 1, 2), (), True),
        (ScanShape(0, 2, 3, 1, 5), (), True),
    ],
    ids=str,
)
def test_kernel_is_the_reference(shape, absent, softplus, tiny):
    found = differences(without(shape.inputs(delta_softplus=softplus), *absent), delta_softplus=softplus)
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernel_is_the_reference_with_the_tiles_of_the_table(dtype):
    """Two tiles of channels, three chunks, vectors of 4 or 8 steps; float32 state under half-precision inputs."""
    found = differences(without(ScanShape(1, 1, 17, 1, 136).inputs()), dtype)
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.skipif(not interpreted(), reason="a compiled kernel has its functions built in")
@pytest.mark.parametrize(
    ("module", "function", "wrong"),
    [
        (triton_fwd, "across", "y"),
        (triton_bwd, "across", "C"),
        (triton_bwd, "across_back", "B"),
    ],
)
def test_a_kernel_without_its_chunk_carry_is_wrong(module, function, wrong, tiny, monkeypatch):
    inputs = ScanShape(1, 1, 3, 1, 11).inputs()
    inputs["delta_bias"] -= 3
    kept = getattr(module, function)

    def forgetful(b_decay, b_end, b_carry, *rest):
        return kept(b_decay, b_end, b_carry * 0.0, *rest)

    assert differences(inputs)[wrong] <= TOLERANCE[torch.float32]
    monkeypatch.setattr(module, function, forgetful)
    assert differences(inputs)[wrong] > 1e-2


def test_decay_may_underflow_to_zero(tiny):
    inputs = without(ScanShape(1, 1, 3, 2, 11).inputs())
    inputs["delta"] = inputs["delta"] * 400
    found = differences(inputs)
    assert max(found.values()) <= 1e-5, found


def test_softplus_in_float32_is_exact_to_its_last_bits():
    """One step with u = B = C = 1 and no D returns delta itself."""
    z = torch.linspace(-30, 30, 64).view(1, 64, 1).to(DEVICE)
    one = torch.ones(1, 1, 1, 1, device=DEVICE)
    delta = scan(torch.ones_like(z), z, -torch.ones(64, 1, device=DEVICE), one, one)
    exact = torch.nn.functional.softplus(z.double(), threshold=100)
    assert ((delta.double() - exact).abs() / exact / (1 + z.abs())).max() <= 4e-7


def test_mixed_dtypes_as_under_autocast(tiny):
    inputs = {n: t.float() for n, t in without(ScanShape(1, 1, 3, 1, 5).inputs(), "dy").items()}
    half = {n: t.bfloat16() if n in ("u", "B", "C") else t for n, t in inputs.items()}
    leaves = {n: t.requires_grad_() for n, t in half.items()}
    y = scan(**leaves)
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [t.dtype for t in leaves.values()]
    expected = selective_scan_reference(**{n: t.detach().double() for n, t in leaves.items()})
    assert relative_rms(y, expected) <= TOLERANCE[torch.bfloat16]


def test_layout_of_the_inputs_does_not_matter(tiny):
    """Not on the steps' axis, which is made dense, nor on the others, whose strides the kernels take."""
    inputs = without(ScanShape(2, 2, 3, 1, 5).inputs())
    dense = value_and_gradients(scan, inputs, torch.float32)

    def strided(t):
        if t.dim() == 1:
            return t.repeat_interleave(2)[::2]
        return t.mT.contiguous().mT

    def padded(t):
        return torch.nn.functional.pad(t, (1, 2))[..., 1:-2] if t.dim() > 1 else t

    for change in (strided, padded):
        found = value_and_gradients(
            lambda change=change, **named: scan(**{n: change(t) for n, t in named.items()}),
            inputs,
            torch.float32,
        )
        assert worst(found, dense) == 0


def test_poisoned_memory_changes_no_bit(tiny, monkeypatch):
    """Every number of what the kernels allocate is written: two runs, one over NaN, give the same bits."""
    inputs = without(ScanShape(1, 2, 3, 3, 5).inputs())
    plain = value_and_gradients(scan, inputs, torch.float32)
    new_empty = Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    again = value_and_gradients(scan, inputs, torch.float32)
    assert worst(again, plain) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant, tiny):
    inputs = without(ScanShape(1, 1, 3, 1, 5).inputs())

    def recomputed(*tensors):
        return checkpoint(scan, *tensors, use_reentrant=reentrant)

    plain = value_and_gradients(scan, inputs, torch.float32)
    again = value_and_gradients(lambda **kw: recomputed(*kw.values()), inputs, torch.float32)
    assert worst(again, plain) == 0


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(("saved", "launches"), [(True, 1), (False, 2)], ids=["saved", "recomputed"])
def test_selective_checkpointing_keeps_the_output_of_the_op(saved, launches, tiny, monkeypatch):
    kernel = Counted(triton_fwd.scan_forward)
    monkeypatch.setattr(triton_fwd, "scan_forward", kernel)
    inputs = without(ScanShape(1, 1, 3, 1, 5).inputs())
    ops = [torch.ops.vmamba.selective_scan.default] if saved else []

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    def block(u, *tensors):
        return scan(u.sin(), *tensors).cos()

    def recomputed(**named):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, *named.values(), use_reentrant=False, context_fn=contexts)

    found = value_and_gradients(recomputed, inputs, torch.float32)
    assert kernel.launches == launches
    plain = value_and_gradients(lambda **named: block(*named.values()), inputs, torch.float32)
    assert worst(found, plain) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_op_keeps_the_contract_of_torch(tiny):
    """opcheck: schema, fake tensors, autograd registration, and autograd under compile with dynamic shapes."""
    inputs = without(ScanShape(1, 1, 3, 2, 5).inputs(), "dy")
    tensors = [None if n == "D" else t.float().requires_grad_() for n, t in inputs.items()]
    torch.library.opcheck(torch.ops.vmamba.selective_scan, (*tensors, True, "triton"))


def test_compiles_as_one_graph(tiny):
    inputs = without(ScanShape(1, 1, 3, 1, 5).inputs())
    compiled = torch.compile(lambda *tensors: scan(*tensors).sigmoid(), fullgraph=True, backend="aot_eager")
    found = value_and_gradients(lambda **named: compiled(*named.values()), inputs, torch.float32)
    plain = value_and_gradients(lambda **named: scan(**named).sigmoid(), inputs, torch.float32)
    assert worst(found, plain) == 0


def test_float64_stays_on_the_pytorch_path():
    inputs = without(ScanShape(1, 1, 3, 1, 5).inputs(), "dy")
    assert selective_scan(**inputs).dtype == torch.float64
    with pytest.raises(BackendError, match="float32 and the input is float64"):
        scan(**inputs)


def test_the_op_imports_where_triton_is_absent():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from vmamba_kernels import selective_scan\n"
        "a = torch.rand(1, 2, 3); b = torch.rand(1, 1, 1, 3)\n"
        "assert selective_scan(a, a, -torch.ones(2, 1), b, b).shape == a.shape\n"
        "assert not [name for name in sys.modules if name.startswith('vmamba_kernels.scan.triton')]\n"
    )
    kernels = Path(triton_fwd.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=kernels, timeout=120)


def test_both_kernels_of_a_generation_cut_the_same_chunks():
    for tiles in (triton_fwd.DEFAULT, *triton_fwd.TABLE.values()):
        assert tiles.backward.segments * tiles.backward.steps == tiles.chunk
        for tile in (tiles.forward, tiles.backward):
            assert 32 % tile.segments == 0
            assert tile.steps in (1, 2, 4, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("state", [1, 2, 16])
@pytest.mark.parametrize("length", [1, 2, 15, 49, 196, 784, 3136, 3137])
def test_native_kernel_is_the_reference(length, state, dtype):
    """37 channels: no multiple of a tile; every vector width among the lengths."""
    found = differences(without(ScanShape(2, 4, 37, state, length).inputs()), dtype)
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.gpu
@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("D", "delta_bias")], ids="-".join)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "linear"])
def test_native_kernel_without_optional_inputs(softplus, absent):
    inputs = without(ScanShape(2, 2, 37, 2, 200).inputs(delta_softplus=softplus), *absent)
    found = differences(inputs, delta_softplus=softplus)
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@pytest.mark.gpu
@pytest.mark.parametrize("state", [1, 16])
def test_two_native_runs_are_bit_equal(state):
    inputs = without(ScanShape(8, 4, 96, state, 784).inputs())
    first, second = (value_and_gradients(scan, inputs, torch.bfloat16) for _ in range(2))
    assert worst(first, second) == 0


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31():
    """The last sequence of a tensor of more than 2^31 elements is that of the same sequence alone."""
    length, width = 1 << 16, 192
    batch = (1 << 31) // (length * width) + 2
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)

    u, delta = random(batch, width, length), random(batch, width, length)
    B, C = random(batch, 1, 1, length), random(batch, 1, 1, length)
    A, D = -torch.ones(width, 1, device=DEVICE), torch.ones(width, device=DEVICE)
    assert u.numel() > 1 << 31
    whole = [u, delta, A, B, C, D]
    alone = [t[-1:].clone() if t.dim() > 2 else t.clone() for t in whole]
    outputs = []
    for tensors in (whole, alone):
        leaves = [t.requires_grad_() for t in tensors]
        y = scan(*leaves)
        y.backward(torch.ones_like(y))
        outputs.append([y.detach()[-1], *(leaves[i].grad[-1] for i in (0, 1, 3, 4))])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
