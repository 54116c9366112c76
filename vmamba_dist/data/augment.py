"""What happens to an image between decoding and the model.

Law: every draw is a function of (seed, epoch, position), or of (seed, step) for mixing, and of nothing else;
the caller's own random state is as it was before.

On the host, a sample at a time, RGB → uint8: crop, flip, rotate, RandAugment, jitter. torchvision's v2 has no
generator argument, so torch's global generator is seeded for each sample and given back after the batch.
On the device, a micro-batch at a time: normalise, erase, mix. Erased boxes and their noise are hashed from the
position (core.rng.counter_uniform), so a sample's noise does not depend on the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from vmamba_dist.config.schema import AugmentConfig
from vmamba_dist.core.rng import counter_uniform, generator, tag
from vmamba_dist.data.batch import Batch

_AUGMENT = tag("augment")


@contextmanager
def borrowed_generator() -> Iterator[torch.Generator]:
    """Lend torch's global CPU generator, and give it back in the state it had."""
    state = torch.default_generator.get_state()
    try:
        yield torch.default_generator
    finally:
        torch.default_generator.set_state(state)


def sample_seeds(seed: int, epoch: int, positions: Sequence[int]) -> list[int]:
    """Give the seeds of samples' host transforms: 32 bits each, hashed from (seed, epoch, position).

    SplitMix64 (Steele et al., 2014) at the place `position` of a sequence that (seed, epoch) begins.
    """
    begin = np.random.SeedSequence([seed, _AUGMENT, epoch]).generate_state(1, np.uint64)
    x = begin + np.asarray(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(32)).tolist()  # type: ignore[no-any-return]


class TrainTransform:
    """RGB image → (3, S, S) uint8, with draws from torch's global generator."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        size = [image_size, image_size]
        how = InterpolationMode(augment.interpolation)
        steps: list[Callable[[Image.Image], Image.Image]] = []
        if augment.crop:
            steps.append(
                v2.RandomResizedCrop(size, augment.crop_scale, augment.crop_ratio, interpolation=how)
            )
        else:
            steps.append(v2.Resize(size, interpolation=how))
        if augment.hflip:
            steps.append(v2.RandomHorizontalFlip(augment.hflip))
        if augment.rotate_deg or augment.shift or augment.zoom:
            steps.append(
                v2.RandomAffine(
                    augment.rotate_deg,
                    translate=(augment.shift, augment.shift),
                    scale=(1 - augment.zoom, 1 + augment.zoom),
                    interpolation=how,
                )
            )
        if augment.randaugment_ops:
            steps.append(RandAugment(augment, how))
        if augment.color_jitter:
            steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
        self._steps = steps

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self._steps:
            image = step(image)
        return _to_tensor(image)


class EvalTransform:
    """RGB image → (3, S, S) uint8: the shorter side to S / crop, then the centre; crop 1 takes the whole image."""

    def __init__(self, image_size: int, crop: float, interpolation: str = "bicubic") -> None:
        how = InterpolationMode(interpolation)
        size = [image_size, image_size]
        self._resize = v2.Resize(size if crop == 1 else [math.floor(image_size / crop)], interpolation=how)
        self._crop = v2.CenterCrop(size)

    def __call__(self, image: Image.Image) -> Tensor:
        return _to_tensor(self._crop(self._resize(image)))


class RandAugment:
    """RandAugment as the recipe has it (timm's `rand-m9-mstd0.5-inc1`): 15 operations, each applied with
    probability ½ at a magnitude drawn from a normal distribution; all grow with the magnitude, 0 … 10.

    Cubuk et al., 2020; the ranges are timm's "increasing" ones.
    """

    PROBABILITY = 0.5
    OPERATIONS = (
        *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color"),
        *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
    )

    def __init__(self, augment: AugmentConfig, interpolation: InterpolationMode) -> None:
        self._num_ops = augment.randaugment_ops
        self._magnitude = augment.randaugment_magnitude
        self._std = augment.randaugment_std
        self._how = interpolation
        self._fill = [min(255, round(255 * m)) for m in augment.mean]

    def __call__(self, image: Image.Image) -> Image.Image:
        for choice in torch.randint(len(self.OPERATIONS), (self._num_ops,)).tolist():
            apply, sign, deviation = torch.rand(()).item(), torch.rand(()).item(), torch.randn(()).item()
            if apply < self.PROBABILITY:
                level = min(10.0, max(0.0, self._magnitude + self._std * deviation)) / 10
                image = self.operate(image, self.OPERATIONS[choice], level, -1.0 if sign < 0.5 else 1.0)
        return image

    def operate(self, image: Image.Image, name: str, level: float, sign: float) -> Image.Image:
        """Apply one operation at a level of 0 … 1."""
        changed: Image.Image
        match name:
            case "autocontrast":
                changed = F.autocontrast(image)
            case "equalize":
                changed = F.equalize(image)
            case "invert":
                changed = F.invert(image)
            case "rotate":
                changed = F.rotate(image, 30.0 * level * sign, interpolation=self._how, fill=self._fill)
            case "posterize":
                changed = F.posterize(image, max(1, 4 - int(4 * level)))
            case "solarize":
                changed = F.solarize(image, 256 - min(256, int(256 * level)))
            case "solarize_add":
                add = min(128, int(110 * level))
                changed = image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)
            case "color":
                changed = F.adjust_saturation(image, max(0.1, 1 + 0.9 * level * sign))
            case "contrast":
                changed = F.adjust_contrast(image, max(0.1, 1 + 0.9 * level * sign))
            case "brightness":
                changed = F.adjust_brightness(image, max(0.1, 1 + 0.9 * level * sign))
            case "sharpness":
                changed = F.adjust_sharpness(image, max(0.1, 1 + 0.9 * level * sign))
            case "shear_x":
                changed = self._affine(image, shear=[math.degrees(math.atan(0.3 * level * sign)), 0.0])
            case "shear_y":
                changed = self._affine(image, shear=[0.0, math.degrees(math.atan(0.3 * level * sign))])
            case "translate_x":
                changed = self._affine(image, translate=[int(0.45 * level * sign * image.width), 0])
            case "translate_y":
                changed = self._affine(image, translate=[0, int(0.45 * level * sign * image.height)])
            case _:
                raise ValueError(f"no operation {name!r}")
        return changed

    def _affine(
        self, image: Image.Image, shear: Sequence[float] = (0.0, 0.0), translate: Sequence[int] = (0, 0)
    ) -> Image.Image:
        changed: Image.Image = F.affine(
            image,
            angle=0.0,
            translate=list(translate),
            scale=1.0,
            shear=list(shear),
            interpolation=self._how,
            fill=self._fill,
            center=[0.0, 0.0],
        )
        return changed


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Normalize:
    """uint8 (B, 3, S, S) → float32 on the device, (x / 255 - mean) / std."""

    def __init__(self, augment: AugmentConfig) -> None:
        self._mean = torch.tensor(augment.mean).view(1, 3, 1, 1) * 255
        self._scale = 1 / (torch.tensor(augment.std).view(1, 3, 1, 1) * 255)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._mean.to(device), self._scale.to(device)
        mean, scale = self._on[device]
        there = images.to(device, non_blocking=True)
        return there.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).mul_(scale)


@dataclass(frozen=True)
class Mix:
    """How one update's pairs are mixed: `lam` of the sample itself, the rest of its partner; box: cutmix's."""

    lam: float
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right


def draw_mix(augment: AugmentConfig, seed: int, step: int, image_size: int) -> Mix | None:
    """Draw mixup's or cutmix's parameters, one for all pairs of update `step`; None leaves it unmixed.

    Zhang et al., 2018; Yun et al., 2019; lam is corrected to the area that the clipped box really has.
    """
    if not (augment.mixup or augment.cutmix):
        return None
    rng = generator(seed, "mix", step)
    use, which, cy, cx = rng.random(4)
    if use >= augment.mix_prob:
        return None
    if augment.cutmix and (not augment.mixup or which < augment.switch):
        side = math.sqrt(1 - rng.beta(augment.cutmix, augment.cutmix))
        top, bottom = _clip(int(cy * image_size), int(side * image_size), image_size)
        left, right = _clip(int(cx * image_size), int(side * image_size), image_size)
        return Mix(1 - (bottom - top) * (right - left) / image_size**2, (top, bottom, left, right))
    return Mix(float(rng.beta(augment.mixup, augment.mixup)))


def _clip(center: int, length: int, size: int) -> tuple[int, int]:
    return max(0, center - length // 2), min(size, center + (length + 1) // 2)


class DeviceTransform:
    """A training micro-batch → (images (B, 3, S, S) float32, targets (B, num_classes) float32) on the device.

    Normalise, erase (Zhong et al., 2020: 2 … 33 % of the area, aspect .3 … 3.3, normal noise a pixel), mix
    positions 2i and 2i + 1. Targets are smoothed as timm does: s / K off the label, 1 - s + s / K on it.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, label_smoothing: float, seed: int) -> None:
        self._augment = augment
        self._num_classes = num_classes
        self._smoothing = label_smoothing
        self._seed = seed
        self._normalize = Normalize(augment)

    def __call__(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        images = self._normalize(batch.images, device)
        if self._augment.erasing:
            self._erase(images, batch.epoch, batch.positions)
        off = self._smoothing / self._num_classes
        targets = torch.full((len(images), self._num_classes), off, device=device)
        labels = batch.labels.to(device, non_blocking=True).unsqueeze(1)
        targets.scatter_(1, labels, 1 - self._smoothing + off)
        mix = draw_mix(self._augment, self._seed, batch.step, images.shape[-1])
        if mix is not None:
            first, second = batch.positions[0::2], batch.positions[1::2]
            assert torch.equal(first + 1, second), "a pair was parted"
            assert not (first % 2).any(), "a pair was parted"
            images = _mix_images(images, mix)
            targets = targets * mix.lam + _partners(targets) * (1 - mix.lam)
        return images, targets

    def _erase(self, images: Tensor, epoch: int, positions: Tensor) -> None:
        """Fill each chosen sample's box with noise, in place: one scatter for the batch, and no host sync."""
        size = images.shape[-1]
        rows, tops, lefts, heights, widths = self._boxes(epoch, positions, size)
        counts = 3 * heights * widths
        total = int(counts.sum())
        if total == 0:
            return
        table = torch.stack([rows, tops, lefts, heights, widths, counts.cumsum(0) - counts, positions[rows]])
        table = table.to(images.device, non_blocking=True)
        own = torch.repeat_interleave(counts.to(images.device, non_blocking=True), output_size=total)
        row, top, left, height, width, start, position = table[:, own]
        k = torch.arange(total, device=images.device) - start
        pixel = (k // (height * width) * size + top + k % (height * width) // width) * size + left + k % width
        u1 = counter_uniform(self._seed, "erasing.radius", epoch, position, pixel)
        u2 = counter_uniform(self._seed, "erasing.angle", epoch, position, pixel)
        noise = (-2 * (1 - u1).log()).sqrt() * (2 * math.pi * u2).cos()  # Box and Muller, 1958
        images.view(-1)[row * (3 * size * size) + pixel] = noise

    def _boxes(
        self, epoch: int, positions: Tensor, size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Choose samples and boxes on the host; the first of ten tries that fits inside the image counts."""
        chosen = counter_uniform(self._seed, "erasing.chosen", epoch, positions) < self._augment.erasing
        tries = torch.arange(40).view(4, 10, 1)
        area, aspect, y, x = counter_uniform(self._seed, "erasing.box", epoch, positions, tries).double()
        pixels = (0.02 + (1 / 3 - 0.02) * area) * size * size
        ratio = torch.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * aspect)
        heights = (pixels * ratio).sqrt().round().long()
        widths = (pixels / ratio).sqrt().round().long()
        fits = (heights < size) & (widths < size)
        rows = (chosen & fits.any(0)).nonzero().squeeze(1)
        first = fits.int().argmax(0)[rows]
        height, width = heights[first, rows], widths[first, rows]
        top = (y[first, rows] * (size - height + 1)).long()
        left = (x[first, rows] * (size - width + 1)).long()
        return rows, top, left, height, width


def _partners(x: Tensor) -> Tensor:
    return x.view(len(x) // 2, 2, *x.shape[1:]).flip(1).view(x.shape)


def _mix_images(images: Tensor, mix: Mix) -> Tensor:
    if mix.box is None:
        return images * mix.lam + _partners(images) * (1 - mix.lam)
    top, bottom, left, right = mix.box
    images[:, :, top:bottom, left:right] = _partners(images[:, :, top:bottom, left:right].contiguous())
    return images
