"""The comparison that the other tests trust: it sees NaN, shape and size; the golden rule is the documented one."""

import math
import zlib

import numpy as np
import pytest
import torch

from vmamba_kernels.testing import golden_tensor, relative_max, relative_rms


def test_golden_rule_in_numpy():
    """The rule as golden/README.md writes it, in numpy's own uint64."""
    name, shape = "scan0.u", (3, 5, 7)
    z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(math.prod(shape), dtype=np.uint64)
    with np.errstate(over="ignore"):
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    u = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    assert np.array_equal(golden_tensor(name, shape).numpy(), u.reshape(shape))


def test_comparisons():
    expected = torch.tensor([3.0, -4.0])
    assert relative_max(expected + torch.tensor([0.0, 1.0]), expected) == 0.25
    # Processors round the mean and the roots differently in the last bit.
    assert relative_rms(expected + torch.tensor([0.0, 1.0]), expected) == pytest.approx(0.2, rel=1e-12)
    assert relative_max(torch.tensor([3.0, math.nan]), expected) == math.inf
    assert relative_rms(expected[:1], expected) == math.inf
    assert relative_max(expected[:0], expected[:0]) == 0
