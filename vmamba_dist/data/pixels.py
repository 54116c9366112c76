"""What Pillow does to one image, done to a batch of tensors on any device.

Law: the same draws give the same bytes as Pillow's own operations, on every device and in every batch. Pillow's
arithmetic is repeated as it is: resizing in 22-bit fixed point, whose sums float64 holds exactly; blending in
float32; warping in float64; whatever is rounded is rounded where Pillow rounds.

Images are (B, 3, S, S) uint8. A batch is walked by groups: of each place in the lists of operations, all images with
the same one are changed together, so the number of kernels does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vmamba_dist.data.draws import Operation

Interpolation = Literal["bicubic", "bilinear", "nearest"]
_PRECISION = 22  # bits of a resizing weight, Pillow's
_AT_ONCE = 1 << 23  # padded float64 elements that are resized together: 64 MiB
_WARPED_AT_ONCE = 64  # images: at 224 px the points of a bicubic warp take some 600 MB
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}


def resize_crops(
    images: Sequence[Tensor],
    crops: Sequence[tuple[int, int, int, int]],
    size: int,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Crop each (3, H, W) uint8 image to its (top, left, height, width) and resize it: (B, 3, size, size) uint8."""
    device = images[0].device
    made = torch.empty((len(images), 3, size, size), dtype=torch.uint8, device=device)
    for rows in _buckets([max(height, width) for _, _, height, width in crops], size):
        heights, widths = (max(crops[row][i] for row in rows) for i in (2, 3))
        padded = torch.zeros((len(rows), 3, heights, widths), dtype=torch.float64, device=device)
        for i, row in enumerate(rows):
            top, left, height, width = crops[row]
            padded[i, :, :height, :width] = images[row][:, top : top + height, left : left + width]
        lengths = torch.tensor([crops[row][2:] for row in rows], dtype=torch.float64)
        weights = _nearest if interpolation == "nearest" else partial(_weights, interpolation=interpolation)
        across = weights(lengths[:, 1], widths, size, device).transpose(1, 2).unsqueeze(1)
        down = weights(lengths[:, 0], heights, size, device).unsqueeze(1)
        resized = _rounded(down @ _rounded(padded @ across))
        made[torch.tensor(rows, device=device)] = resized.to(torch.uint8)
    return made


def _buckets(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield rows of like lengths, so many that they fit _AT_ONCE when padded to their longest."""
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
    bucket: list[int] = []
    for row in rows:
        side = max(size, lengths[row])
        if bucket and (len(bucket) + 1) * 3 * side * side > _AT_ONCE:
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket


def _rounded(sums: Tensor) -> Tensor:
    """From 22-bit fixed point to whole pixels, in place."""
    return sums.add_(1 << (_PRECISION - 1)).div_(1 << _PRECISION).floor_().clamp_(0, 255)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """Divide. Both are tensors: by a number, torch may multiply with the inverse, which rounds another way."""
    return a / b


def _nearest(lengths: Tensor, longest: int, size: int, device: torch.device) -> Tensor:
    """Return what _weights does, for the nearest pixel. Places are summed up one by one, on the host, as in Pillow."""
    steps = (lengths / size).unsqueeze(1).repeat(1, size)
    steps[:, 0] *= 0.5
    places = steps.cumsum(1).floor().to(device).unsqueeze(2)
    return (torch.arange(longest, device=device) == places).double() * (1 << _PRECISION)


def _weights(
    lengths: Tensor, longest: int, size: int, device: torch.device, interpolation: Interpolation
) -> Tensor:
    """Return (B, size, longest) fixed-point weights that resize `lengths` (B,) pixels to `size`; whole numbers."""
    scale = (lengths / size).to(device).view(-1, 1, 1)
    lengths = lengths.to(device)
    source = torch.arange(longest, dtype=torch.float64, device=device)
    center = (torch.arange(size, dtype=torch.float64, device=device).view(-1, 1) + 0.5) * scale
    stretch = scale.clamp(min=1.0)
    reach = _SUPPORT[interpolation] * stretch
    first = (center - reach + 0.5).trunc().clamp(min=0)
    end = torch.minimum((center + reach + 0.5).trunc(), lengths.view(-1, 1, 1))
    x = ((source - center + 0.5) * _over(torch.ones_like(stretch), stretch)).abs()
    if interpolation == "bicubic":
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    else:
        weights = (1 - x).clamp(min=0)
    weights = torch.where((source >= first) & (source < end), weights, 0.0)
    weights = weights / weights.sum(2, keepdim=True) * (1 << _PRECISION)
    return (weights + torch.where(weights < 0, -0.5, 0.5)).trunc_()


def operate(
    images: Tensor, operations: Sequence[Sequence[Operation]], interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Apply each image's operations, in their order, in place; returns the images."""
    groups: list[tuple[str, int, int]] = []
    rows: list[int] = []
    arguments: list[tuple[float, ...]] = []
    for place in range(max((len(own) for own in operations), default=0)):
        by_name: dict[str, list[int]] = {}
        for row, own in enumerate(operations):
            if place < len(own):
                by_name.setdefault(own[place].name, []).append(row)
        for name, members in by_name.items():
            groups.append((name, len(rows), len(rows) + len(members)))
            rows += members
            arguments += [operations[row][place].argument for row in members]
    if not rows:
        return images
    widest = max(1, *map(len, arguments))
    table = torch.tensor(
        [(*argument, *[0.0] * (widest - len(argument))) for argument in arguments], dtype=torch.float64
    )
    # One copy for the batch: a small one for each group would wait for the device each time.
    on_device, all_rows = table.to(images.device), torch.tensor(rows).to(images.device)
    for name, start, end in groups:
        step = _WARPED_AT_ONCE if name == "warp" else end - start
        for first in range(start, end, step):
            chosen, argument = (x[first : min(first + step, end)] for x in (all_rows, on_device))
            changed = (
                _warp(images[chosen], argument, interpolation)
                if name == "warp"
                else _OPERATIONS[name](images[chosen], argument[:, :1].view(-1, 1, 1, 1))
            )
            images.index_copy_(0, chosen, changed)
    return images


def _flip(images: Tensor, _: Tensor) -> Tensor:
    return images.flip(-1)


def _invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - torch.exp2(8 - bits)).round().to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold, images, 255 - images)


def _solarize_add(images: Tensor, add: Tensor) -> Tensor:
    added = (images.to(torch.int16) + add.to(torch.int16)).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, added, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = (found.double() for found in torch.aminmax(images.flatten(2), dim=2, keepdim=True))
    scale = _over(torch.full_like(low, 255.0), (high - low).clamp(min=1))
    table = torch.arange(256, dtype=torch.float64, device=images.device) * scale
    table = (table + -low * scale).trunc_().clamp_(0, 255)
    return _look_up(images, table, (high > low).squeeze(2))


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    # Counted by sorting: adding up into bins is slow on a GPU where it must be deterministic.
    ordered = images.flatten(2).sort(dim=2).values
    values = torch.arange(256, dtype=torch.uint8, device=images.device).expand(*ordered.shape[:2], 256)
    until = torch.searchsorted(ordered, values.contiguous(), right=True)
    counts = until.diff(dim=2, prepend=torch.zeros_like(until[:, :, :1]))
    last = counts.gather(2, ordered[:, :, -1:].long())
    step = torch.div(ordered.shape[2] - last, 255, rounding_mode="floor")
    table = torch.div(
        torch.div(step, 2, rounding_mode="floor") + until - counts, step.clamp(min=1), rounding_mode="floor"
    )
    return _look_up(images, table.clamp_(max=255), (step > 0).squeeze(2))


def _look_up(images: Tensor, table: Tensor, changes: Tensor) -> Tensor:
    """Map pixels by (n, 3, 256) tables; channels where `changes` (n, 3) is false stay as they are."""
    mapped = table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)
    return torch.where(changes[:, :, None, None], mapped, images)


def _grey(images: Tensor) -> Tensor:
    """Return (n, 1, S, S) uint8 luma by ITU-R 601-2, in Pillow's 16-bit fixed point."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(1)


def _blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    begin = start.to(torch.float32)
    step = (images.to(torch.float32) - begin) * factor.to(torch.float32)
    return (begin + step).clamp_(0, 255).to(torch.uint8)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(images), images, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(images)
    total = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64).double()
    mean = _over(total, torch.full_like(total, grey[0].numel()))
    return _blend((mean + 0.5).floor(), images, factor)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros((), dtype=torch.uint8, device=images.device), images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a 3 × 3 mean whose centre weighs five; the border is left as it is."""
    wide = images.to(torch.int32)
    across = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    sums = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * wide[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = torch.div(2 * sums + 13, 26, rounding_mode="floor").to(torch.uint8)
    return _blend(smooth, images, factor)


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flip": _flip,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}


def _warp(images: Tensor, argument: Tensor, interpolation: Interpolation) -> Tensor:
    """Take each output pixel from where its matrix says; `argument` (n, 9) float64 is a matrix and a colour."""
    size = images.shape[-1]
    matrix = argument[:, :6].view(-1, 6, 1, 1).unbind(1)
    x, y, inside = _nearest_places(matrix, size) if interpolation == "nearest" else _places(matrix, size)
    fill = argument[:, 6:9, None, None].to(torch.uint8)
    flat = images.flatten(2)

    def pixels(column: Tensor, row: Tensor) -> Tensor:
        at = (row.clamp(0, size - 1) * size + column.clamp(0, size - 1)).flatten(1)
        return flat.gather(2, at.unsqueeze(1).expand(-1, 3, -1)).view_as(images)

    if interpolation == "nearest":
        return torch.where(inside.unsqueeze(1), pixels(x.long(), y.long()), fill)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    dx, dy = (x - left).unsqueeze(1), (y - top).unsqueeze(1)
    column, row = left.long(), top.long()
    near = (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2)
    between = _line if interpolation == "bilinear" else _cubic
    lines = [between([pixels(column + j, row + i).double() for j in near], dx) for i in near]
    value = between(lines, dy)
    return torch.where(inside.unsqueeze(1), value.clamp_(0, 255).to(torch.uint8), fill)


def _places(matrix: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the source's x and y of each output pixel, (n, S, S) float64, and whether it is inside."""
    across = torch.arange(size, dtype=torch.float64, device=matrix[0].device) + 0.5
    down = across.view(-1, 1)
    a, b, c, d, e, f = matrix
    x, y = a * across + b * down + c, d * across + e * down + f
    return x, y, (x >= 0) & (x < size) & (y >= 0) & (y < size)


def _nearest_places(matrix: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in Pillow's 16.16 fixed point, as whole numbers."""
    across = torch.arange(size, device=matrix[0].device)
    down = across.view(-1, 1)

    def fixed(value: Tensor) -> Tensor:
        return (value * 65536.0 + 0.5).floor().long()

    a, b, c, d, e, f = matrix
    x = (fixed(c + a * 0.5 + b * 0.5) + fixed(b) * down + fixed(a) * across) >> 16
    y = (fixed(f + d * 0.5 + e * 0.5) + fixed(e) * down + fixed(d) * across) >> 16
    return x, y, (x >= 0) & (x < size) & (y >= 0) & (y < size)


def _line(points: Sequence[Tensor], t: Tensor) -> Tensor:
    a, b = points
    return a + (b - a) * t


def _cubic(points: Sequence[Tensor], t: Tensor) -> Tensor:
    """Interpolate between b and c by the cubic whose slopes are c - a and d - b (Keys, 1981, with a = -1)."""
    a, b, c, d = points
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (b - a + d - c)))


def upright(image: Tensor, orientation: int) -> Tensor:
    """Turn a (3, H, W) image as EXIF's orientation, 1 … 8, says; a view where that is enough."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    turned = [dim for dim, which in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in which]
    return image.flip(turned) if turned else image


def shape_upright(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Return (width, height) of an image once it is upright."""
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)
