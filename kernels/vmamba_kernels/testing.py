"""What tests and benchmarks of the scans share: comparisons, shapes, and inputs that follow from a name.

Golden inputs are never stored: golden_tensor rebuilds each from its name and shape with integer arithmetic, so a
vector means the same on every machine.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def relative_max(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude expected; inf for a NaN or a shape that differs."""
    return _relative(actual, expected, lambda t: t.abs().max().item())


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference over the RMS expected; inf for a NaN or a shape that differs."""
    return _relative(actual, expected, lambda t: t.square().mean().sqrt().item())


def _relative(actual: Tensor, expected: Tensor, size: Callable[[Tensor], float]) -> float:
    if actual.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    difference = size(actual.detach().double() - expected.detach().double())
    if math.isnan(difference):
        return math.inf
    return difference / max(size(expected.detach().double()), torch.finfo(torch.float64).tiny)


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative_max over tensors by name; inf where the names differ."""
    if actual.keys() != expected.keys():
        return math.inf
    return max(relative_max(actual[name], expected[name]) for name in expected)


def golden_tensor(name: str, shape: Sequence[int]) -> Tensor:
    """Return the float64 tensor in [-1, 1) that a name and a shape stand for: splitmix64 seeded by crc32(name)."""
    mask = (1 << 64) - 1
    z = torch.arange(math.prod(shape), dtype=torch.int64)
    z = z + _signed((zlib.crc32(name.encode()) << 32) + 0x9E3779B97F4A7C15 & mask)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return (_shift(z, 40).double() / 2**23 - 1).reshape(tuple(shape))


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits: torch's int64 wraps as uint64 does."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right without dragging the sign along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class ScanShape:
    """A selective scan's sizes: batch, groups K, channels a group C, state N, length L."""

    batch: int
    groups: int
    channels: int
    state: int
    length: int

    def __str__(self) -> str:
        return f"B{self.batch}-K{self.groups}-C{self.channels}-N{self.state}-L{self.length}"

    def inputs(self, *, delta_softplus: bool = True) -> dict[str, Tensor]:
        """Return float64 u, delta, A, B, C, D, delta_bias and the upstream gradient dy, the same on every call."""
        width = self.groups * self.channels
        grouped = (self.batch, self.groups, self.state, self.length)
        delta = 0.5 * self._draw("delta", self.batch, width, self.length)
        bias = 0.5 * self._draw("delta_bias", width)
        return {
            "u": self._draw("u", self.batch, width, self.length),
            "delta": delta if delta_softplus else 0.2 * delta.abs(),
            "A": -torch.exp(self._draw("A", width, self.state)),
            "B": self._draw("B", *grouped),
            "C": self._draw("C", *grouped),
            "D": self._draw("D", width),
            "delta_bias": bias if delta_softplus else 0.1 * bias.abs(),
            "dy": self._draw("dy", self.batch, width, self.length),
        }

    def _draw(self, name: str, *shape: int) -> Tensor:
        return golden_tensor(f"{self}.{name}", shape)


@dataclass(frozen=True)
class ImageShape:
    """A four-direction scan's sizes: batch, height, width, channels C, dt rank R, state N."""

    batch: int
    height: int
    width: int
    channels: int
    rank: int
    state: int = 1

    def __str__(self) -> str:
        return f"B{self.batch}-{self.height}x{self.width}-C{self.channels}-R{self.rank}-N{self.state}"

    def inputs(self) -> dict[str, Tensor]:
        """Return float64 x, projected, dt_weight, dt_bias, A, D and the upstream gradient dy, always the same."""
        image = (self.batch, self.height, self.width)
        return {
            "x": self._draw("x", *image, self.channels),
            "projected": self._draw("projected", *image, 4 * (self.rank + 2 * self.state)),
            "dt_weight": self.rank**-0.5 * self._draw("dt_weight", 4, self.channels, self.rank),
            "dt_bias": self._draw("dt_bias", 4, self.channels) - 2,
            "A": -torch.exp(self._draw("A", 4 * self.channels, self.state)),
            "D": self._draw("D", 4 * self.channels),
            "dy": self._draw("dy", *image, self.channels),
        }

    def _draw(self, name: str, *shape: int) -> Tensor:
        return golden_tensor(f"{self}.{name}", shape)


# Lengths around block and chunk borders, one step, odd channels, every group count and state size in use.
SCAN_SHAPES = (
    ScanShape(2, 4, 3, 1, 1),
    ScanShape(3, 1, 5, 2, 2),
    ScanShape(2, 2, 7, 1, 15),
    ScanShape(1, 4, 5, 16, 49),
    ScanShape(2, 4, 3, 2, 63),
    ScanShape(1, 1, 1, 1, 130),
    ScanShape(0, 2, 3, 1, 63),
)

IMAGE_SHAPES = (
    ImageShape(2, 1, 1, 8, 1),
    ImageShape(2, 3, 5, 4, 2),
    ImageShape(1, 7, 4, 3, 1, 2),
    ImageShape(2, 9, 7, 5, 3, 16),
    ImageShape(0, 6, 6, 4, 2),
)

# What the benchmarks time: the comparison of the definition, and the blocks of a tiny and of a real model.
SCAN_BENCHMARK = ScanShape(8, 4, 96, 1, 784)
IMAGE_BENCHMARKS = (
    ImageShape(32, 8, 8, 16, 1),
    ImageShape(32, 4, 4, 32, 2),
    ImageShape(32, 2, 2, 64, 4),
    ImageShape(32, 1, 1, 128, 8),
    ImageShape(1, 56, 56, 16, 1),
    ImageShape(8, 28, 28, 96, 6),
)


def value_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Call function on inputs cast to dtype (all but dy, in order) and return "y" and each input's gradient by name."""
    leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in inputs.items() if k != "dy"}
    y = function(**leaves)
    torch.autograd.backward(y, inputs["dy"].to(y.dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items() if t.grad is not None}}
