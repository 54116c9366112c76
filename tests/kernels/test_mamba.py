"""selective_scan_fn is Mamba-1's scan step by step: gate, groups and last state, in value and every gradient."""

import importlib.util
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vmamba_kernels.backend import interpreted
from vmamba_kernels.mamba import selective_scan_fn
from vmamba_kernels.testing import golden_tensor, relative_rms, worst

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", TRITON])


def device_of(backend):
    return "cpu" if backend == "torch" or interpreted() else "cuda"


def mamba(groups, *, batch=2, width=4, state=2, length=7):
    """Return float64 u, delta, A, B, C, D, z and delta_bias; groups None for B and C without the axis."""
    grouped = (batch, state, length) if groups is None else (batch, groups, state, length)
    sequences = (batch, width, length)
    return {
        "u": golden_tensor("u", sequences),
        "delta": 0.5 * golden_tensor("delta", sequences),
        "A": -golden_tensor("A", (width, state)).exp(),
        "B": golden_tensor("B", grouped),
        "C": golden_tensor("C", grouped),
        "D": golden_tensor("D", (width,)),
        "z": golden_tensor("z", sequences),
        "delta_bias": golden_tensor("delta_bias", (width,)),
    }


def step_by_step(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The definition, one step after another; returns the output and the last state."""
    B, C = (t if t.dim() == 4 else t[:, None] for t in (B, C))
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], dim=1) for t in (B, C))
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(u.shape[0], *A.shape)
    steps = []
    for t in range(u.shape[-1]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta * u)[..., t, None] * B[..., t]
        steps.append((C[..., t] * h).sum(-1))
    y = torch.stack(steps, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def values_and_gradients(function, inputs, dtype):
    """Return output, last state and the gradients of a weighted sum of both."""
    leaves = {n: t.to(dtype, copy=True).requires_grad_() for n, t in inputs.items()}
    y, last = function(**leaves)
    loss = (y * golden_tensor("dy", y.shape).to(y)).sum() + (
        last * golden_tensor("dh", last.shape).to(last)
    ).sum()
    loss.backward()
    return {"y": y.detach(), "last": last.detach(), **{n: t.grad for n, t in leaves.items()}}


@BACKENDS
@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "linear"])
def test_the_scan_of_mamba(softplus, groups, backend):
    inputs = {n: t.to(device_of(backend)) for n, t in mamba(groups).items()}
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    expected = values_and_gradients(partial(step_by_step, delta_softplus=softplus), inputs, torch.float64)
    scan = partial(selective_scan_fn, delta_softplus=softplus, return_last_state=True, backend=backend)
    found = values_and_gradients(scan, inputs, torch.float32)
    assert {
        n: relative_rms(found[n], t) for n, t in expected.items() if relative_rms(found[n], t) > 3e-6
    } == {}
    if backend == "torch":
        assert worst(values_and_gradients(scan, inputs, torch.float64), expected) <= 1e-12


@BACKENDS
def test_everything_after_c_is_optional(backend):
    inputs = {n: t.float().to(device_of(backend)) for n, t in mamba(None).items()}
    bare = [inputs[n] for n in ("u", "delta", "A", "B", "C")]
    y = selective_scan_fn(*bare, backend=backend)
    assert relative_rms(y, step_by_step(*bare)[0]) <= 3e-6


def test_half_precision_keeps_its_dtype_and_a_float32_state():
    inputs = {
        n: t.bfloat16() if n in ("u", "delta", "B", "C", "z") else t.float() for n, t in mamba(2).items()
    }
    y, last = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    expected, expected_last = step_by_step(**{n: t.double() for n, t in inputs.items()}, delta_softplus=True)
    assert relative_rms(y, expected) <= 6e-3
    assert relative_rms(last, expected_last) <= 1e-6


def test_layout_of_the_inputs_does_not_matter():
    """u and z of Mamba's in_proj are halves of one tensor, delta and B come from channels-last projections."""
    inputs = mamba(None)
    strided = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in inputs.items()}
    scan = partial(selective_scan_fn, delta_softplus=True, return_last_state=True)
    assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(scan(**strided), scan(**inputs), strict=True))


@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch_and_one_step(batch):
    y, last = selective_scan_fn(**mamba(None, batch=batch, length=1), return_last_state=True)
    assert (y.shape, last.shape) == ((batch, 4, 1), (batch, 4, 2))


def test_what_is_not_implemented_says_so():
    inputs = mamba(None)
    with pytest.raises(ValueError, match="A is complex; only the real"):
        selective_scan_fn(**inputs | {"A": inputs["A"].to(torch.complex128)})
    for name in ("B", "C"):
        with pytest.raises(ValueError, match=rf"{name} is \(4, 2\).*constant along L, \(D, N\), is not"):
            selective_scan_fn(**inputs | {name: inputs["A"]})
    with pytest.raises(ValueError, match="z is"):
        selective_scan_fn(**inputs | {"z": inputs["z"][..., :1]})
