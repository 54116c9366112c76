"""What happens to an image between decoding and the model.

Law: every draw is a function of (seed, epoch, position), or of (seed, step) for mixing, and of nothing else;
the caller's own random state is as it was before.

First, RGB → (3, S, S) uint8, as draws.Draw says: crop, flip, rotate, RandAugment, jitter. Here with Pillow, an
image at a time; pixels.py does the same to a batch of tensors.
On the device, a micro-batch at a time: normalise, erase, mix. Erased boxes and their noise are hashed from the
position (core.rng.counter_uniform), so a sample's noise does not depend on the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from vmamba_dist.config.schema import AugmentConfig
from vmamba_dist.core.rng import counter_uniform, generator
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.draws import Draw, Drawing, Operation

RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


class TrainTransform:
    """RGB image → (3, S, S) uint8, by Pillow."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self.draw = Drawing(augment, image_size)
        self._size = image_size
        self._resample = RESAMPLE[augment.interpolation]

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Draw by `seed` and apply."""
        return self.apply(image, self.draw(*image.size, seed))

    def apply(self, image: Image.Image, draw: Draw) -> Tensor:
        top, left, height, width = draw.crop
        cropped = image.crop((left, top, left + width, top + height))
        return self.finish(cropped.resize((self._size, self._size), self._resample), draw.operations)

    def finish(self, image: Image.Image, operations: Sequence[Operation]) -> Tensor:
        """Apply what follows the crop, to an image of S × S px."""
        for operation in operations:
            image = operate(image, operation, self._resample)
        return to_tensor(image)


class EvalTransform:
    """RGB image → (3, S, S) uint8: the shorter side to S / crop, then the centre; crop 1 takes the whole image."""

    def __init__(self, image_size: int, crop: float, interpolation: str = "bicubic") -> None:
        how = InterpolationMode(interpolation)
        size = [image_size, image_size]
        self._resize = v2.Resize(size if crop == 1 else [math.floor(image_size / crop)], interpolation=how)
        self._crop = v2.CenterCrop(size)

    def __call__(self, image: Image.Image) -> Tensor:
        return to_tensor(self._crop(self._resize(image)))


def operate(image: Image.Image, operation: Operation, resample: Image.Resampling) -> Image.Image:
    """Apply one operation with Pillow."""
    argument = operation.argument
    match operation.name:
        case "flip":
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "posterize":
            return ImageOps.posterize(image, int(argument[0]))
        case "solarize":
            return ImageOps.solarize(image, int(argument[0]))
        case "solarize_add":
            add = int(argument[0])
            return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)
        case "color":
            return ImageEnhance.Color(image).enhance(argument[0])
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(argument[0])
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(argument[0])
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(argument[0])
        case "warp":
            fill = tuple(int(value) for value in argument[6:])
            return image.transform(image.size, Image.Transform.AFFINE, argument[:6], resample, fillcolor=fill)
    raise ValueError(f"no operation {operation.name!r}")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image → (3, H, W) uint8, channels last in memory."""
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
