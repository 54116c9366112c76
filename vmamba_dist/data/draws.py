"""What is drawn for a training image, before a pixel of it is touched.

Law: a draw is a function of (augment, image size, width, height, seed) and of nothing else, so every decoder, on the
host or on a GPU, crops, flips and changes an image alike. Operations carry final arguments: whoever applies them
draws nothing.

The numbers are those that torchvision's v2 transforms would draw from torch's generator seeded with `seed`; but the
generator is our own, and nobody's global state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vmamba_dist.config.schema import AugmentConfig
from vmamba_dist.core.rng import tag

_AUGMENT = tag("augment")
Matrix = tuple[float, float, float, float, float, float]


class Operation(NamedTuple):
    """One change of a whole image; `argument` holds what its name needs.

    flip · autocontrast · equalize · invert · posterize (bits) · solarize (threshold) · solarize_add (add) ·
    color, contrast, brightness, sharpness (factor) · warp (the six numbers of the matrix from an output pixel to its
    source, then red, green, blue of what lies outside)
    """

    name: str
    argument: tuple[float, ...] = ()


class Draw(NamedTuple):
    """What becomes of one image: a crop in its own pixels, resized to the square; then operations, in order."""

    crop: tuple[int, int, int, int]  # top, left, height, width
    operations: tuple[Operation, ...]


def sample_seeds(seed: int, epoch: int, positions: Sequence[int]) -> list[int]:
    """Give the seeds of samples' draws: 32 bits each, hashed from (seed, epoch, position).

    SplitMix64 (Steele et al., 2014) at the place `position` of a sequence that (seed, epoch) begins.
    """
    begin = np.random.SeedSequence([seed, _AUGMENT, epoch]).generate_state(1, np.uint64)
    x = begin + np.asarray(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(32)).tolist()  # type: ignore[no-any-return]


class Drawing:
    """Draws for images of any size. Not for use from several threads."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._augment = augment
        self._size = image_size
        self._fill = tuple(min(255.0, float(round(255 * m))) for m in augment.mean)
        self._log_ratio: list[float] = torch.log(torch.tensor(augment.crop_ratio)).tolist()
        self._random = torch.Generator()
        self._one = torch.empty(1)

    def __call__(self, width: int, height: int, seed: int) -> Draw:
        """Draw for an upright image of width × height px."""
        self._random.manual_seed(seed)
        crop = self._crop(width, height) if self._augment.crop else (0, 0, height, width)
        return Draw(crop, (*self._flip(), *self._affine(), *self._randaugment(), *self._jitter()))

    def _crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Draw an area and an aspect ratio; the first of ten tries that fits counts, else the largest centre crop."""
        low, high = self._augment.crop_ratio
        for _ in range(10):
            area = height * width * self._uniform(*self._augment.crop_scale)
            ratio = torch.exp(self._one.uniform_(*self._log_ratio, generator=self._random)).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return self._integer(height - h + 1), self._integer(width - w + 1), h, w
        w, h = width, height
        if width / height < low:
            h = round(w / low)
        elif width / height > high:
            w = round(h * high)
        return (height - h) // 2, (width - w) // 2, h, w

    def _flip(self) -> Iterator[Operation]:
        if self._augment.hflip and torch.rand(1, generator=self._random).item() < self._augment.hflip:
            yield Operation("flip")

    def _affine(self) -> Iterator[Operation]:
        augment, size = self._augment, self._size
        if not (augment.rotate_deg or augment.shift or augment.zoom):
            return
        angle = self._uniform(-augment.rotate_deg, augment.rotate_deg)
        shift = augment.shift * size
        translate = round(self._uniform(-shift, shift)), round(self._uniform(-shift, shift))
        scale = self._uniform(1 - augment.zoom, 1 + augment.zoom)
        matrix = affine(angle, translate=translate, scale=scale, center=(size * 0.5, size * 0.5))
        yield Operation("warp", (*matrix, 0.0, 0.0, 0.0))

    def _randaugment(self) -> Iterator[Operation]:
        """RandAugment as the recipe has it (timm's `rand-m9-mstd0.5-inc1`): each operation is applied with
        probability ½, at a magnitude drawn from a normal distribution. Cubuk et al., 2020.
        """
        if not self._augment.randaugment_ops:
            return
        augment, random = self._augment, self._random
        for choice in torch.randint(len(RANDAUGMENT), (augment.randaugment_ops,), generator=random).tolist():
            applied, sign = torch.rand((), generator=random).item(), torch.rand((), generator=random).item()
            deviation = torch.randn((), generator=random).item()
            if applied < 0.5:
                level = min(
                    10.0, max(0.0, augment.randaugment_magnitude + augment.randaugment_std * deviation)
                )
                yield randaugment(
                    RANDAUGMENT[choice], level / 10, -1.0 if sign < 0.5 else 1.0, self._size, self._fill
                )

    def _jitter(self) -> Iterator[Operation]:
        if not self._augment.color_jitter:
            return
        order = torch.randperm(4, generator=self._random).tolist()
        low, high = max(0.0, 1 - self._augment.color_jitter), 1 + self._augment.color_jitter
        factors = [self._uniform(low, high) for _ in range(3)]
        for i in order:
            if i < 3:  # the fourth would be the hue
                yield Operation(("brightness", "contrast", "color")[i], (factors[i],))

    def _uniform(self, low: float, high: float) -> float:
        return self._one.uniform_(low, high, generator=self._random).item()

    def _integer(self, end: int) -> int:
        return int(torch.randint(0, end, (1,), generator=self._random).item())


RANDAUGMENT = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)


def randaugment(name: str, level: float, sign: float, size: int, fill: tuple[float, ...]) -> Operation:
    """Return RandAugment's operation at a level of 0 … 1, for size × size px; ranges are timm's "increasing" ones."""
    match name:
        case "autocontrast" | "equalize" | "invert":
            return Operation(name)
        case "posterize":
            return Operation(name, (max(1, 4 - int(4 * level)),))
        case "solarize":
            return Operation(name, (256 - min(256, int(256 * level)),))
        case "solarize_add":
            return Operation(name, (min(128, int(110 * level)),))
        case "color" | "contrast" | "brightness" | "sharpness":
            return Operation(name, (max(0.1, 1 + 0.9 * level * sign),))
        case "rotate":
            matrix = rotation(30.0 * level * sign, size)
        case "shear_x":
            matrix = affine(shear=(math.degrees(math.atan(0.3 * level * sign)), 0.0))
        case "shear_y":
            matrix = affine(shear=(0.0, math.degrees(math.atan(0.3 * level * sign))))
        case "translate_x":
            matrix = affine(translate=(int(0.45 * level * sign * size), 0))
        case "translate_y":
            matrix = affine(translate=(0, int(0.45 * level * sign * size)))
        case _:
            raise ValueError(f"no operation {name!r}")
    return Operation("warp", (*matrix, *fill))


def rotation(angle: float, size: int) -> Matrix:
    """Return the matrix from output to source of a rotation by `angle` degrees against the clock, about the centre.

    Rounded to 15 digits, as Pillow's own rotation is.
    """
    turn = -math.radians(angle % 360.0)
    cos, sin, middle = round(math.cos(turn), 15), round(math.sin(turn), 15), size / 2
    minus_sin = round(-math.sin(turn), 15)
    return (
        *(cos, sin, cos * -middle + sin * -middle + middle),
        *(minus_sin, cos, minus_sin * -middle + cos * -middle + middle),
    )


def affine(
    angle: float = 0.0,
    *,
    translate: tuple[int, int] = (0, 0),
    scale: float = 1.0,
    shear: tuple[float, float] = (0.0, 0.0),
    center: tuple[float, float] = (0.0, 0.0),
) -> Matrix:
    """Return the matrix from output to source of: shear in x then y (degrees), scale, rotate (degrees, clockwise) about
    `center`, and translate (px).
    """
    turn, shear_x, shear_y = math.radians(angle), math.radians(shear[0]), math.radians(shear[1])
    along, across = math.cos(turn - shear_y), math.sin(turn - shear_y)
    xx = along / math.cos(shear_y)
    xy = -along * math.tan(shear_x) / math.cos(shear_y) - math.sin(turn)
    yx = across / math.cos(shear_y)
    yy = -across * math.tan(shear_x) / math.cos(shear_y) + math.cos(turn)
    # The determinant is 1, but for the scale.
    a, b, d, e = yy / scale, -xy / scale, -yx / scale, xx / scale
    x, y = -center[0] - translate[0], -center[1] - translate[1]
    return a, b, a * x + b * y + center[0], d, e, d * x + e * y + center[1]
