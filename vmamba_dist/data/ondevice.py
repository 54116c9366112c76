"""JPEGs decoded and augmented on the device.

Law: a row is a function of its bytes and its draw, never of the batch around it; what the device cannot decode, the
host reads anew and decodes with Pillow, and what that cannot either is replaced as any bad sample.

nvJPEG comes through torchvision; its pixels are within 3 levels of libjpeg's on average. All that follows
gives the bytes that Pillow would give (pixels.py).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.batch import Batch, Encoded
from vmamba_dist.data.pixels import Interpolation, operate, resize_crops, shape_upright, upright
from vmamba_dist.data.reader import Rows

log = logging.getLogger(__name__)

ReadOnHost = Callable[[int, int], tuple[Tensor, Rows]]  # (epoch, position) → image, rows of one


def check_gpu_decoding(device: torch.device) -> None:
    """Refuse data.decoder=gpu on another device. Raises ConfigError."""
    if device.type != "cuda":
        raise ConfigError(
            f"data.decoder=gpu: nvJPEG needs a CUDA device, and this run is on {device.type}; use "
            "data.decoder=torchvision or pil"
        )


def decode_together(jpegs: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Decode JPEGs to (3, H, W) uint8 on the device, as they lie. Raises RuntimeError where any of them fails."""
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in jpegs]
    return decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)  # type: ignore[no-any-return]


def _try_decoding(device: torch.device) -> None:
    """Decode a JPEG. Raises ConfigError where torchvision cannot."""
    small = io.BytesIO()
    Image.new("RGB", (256, 256)).save(small, "JPEG")
    try:
        decode_together([small.getvalue()], device)
    except RuntimeError as error:
        raise ConfigError(
            f"data.decoder=gpu: torchvision cannot use nvJPEG here ({_first_line(error)}); install torchvision's "
            "build for CUDA, or use data.decoder=torchvision or pil"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


class DeviceDecoder:
    """A micro-batch with undecoded rows → the same with all images on the device. A CPU works too, for tests.

    Raises ConfigError where nothing can decode there.
    """

    def __init__(
        self,
        image_size: int,
        interpolation: Interpolation,
        device: torch.device,
        read_on_host: ReadOnHost,
    ) -> None:
        self._size = image_size
        self._interpolation = interpolation
        self._device = device
        self._read_on_host = read_on_host
        self._failed = 0
        _try_decoding(device)

    def __call__(self, batch: Batch) -> Batch:
        decoded = self._decode(batch.encoded)
        rows = sorted(decoded)
        failed = sorted(batch.encoded.keys() - decoded.keys())
        labels, keys, bad = batch.labels.clone(), list(batch.keys), list(batch.bad)
        for row in failed:
            batch.images[row], again = self._read_on_host(batch.epoch, int(batch.positions[row]))
            labels[row], keys[row] = again.labels[0], again.keys[0]
            bad += again.bad
        if len(rows) < len(batch.images):
            images = batch.images.to(self._device, non_blocking=True).contiguous()
        else:
            images = torch.empty(batch.images.shape, dtype=torch.uint8, device=self._device)
        if rows:
            draws = [batch.encoded[row].draw for row in rows]
            made = resize_crops(
                [decoded[row] for row in rows], [draw.crop for draw in draws], self._size, self._interpolation
            )
            made = operate(made, [draw.operations for draw in draws], self._interpolation)
            images.index_copy_(0, torch.tensor(rows).to(self._device), made)
        bad.sort(key=lambda found: found.position)
        return replace(batch, images=images, labels=labels, keys=keys, bad=bad, encoded={})

    def _decode(self, encoded: dict[int, Encoded]) -> dict[int, Tensor]:
        """Decode what can be: all together, and where that fails one by one. Upright; rows that fail are left out."""
        rows = list(encoded)
        try:
            images = decode_together([encoded[row].data for row in rows], self._device) if rows else []
            found = dict(zip(rows, images, strict=True))
        except RuntimeError:
            found = {}
            for row in rows:
                try:
                    found[row] = decode_together([encoded[row].data], self._device)[0]
                except RuntimeError as error:
                    self._note(_first_line(error))
        for row, image in list(found.items()):
            jpeg = encoded[row]
            width, height = shape_upright(image.shape[2], image.shape[1], jpeg.orientation)
            if (width, height) == (jpeg.width, jpeg.height) and image.shape[0] == 3:
                found[row] = upright(image, jpeg.orientation)
            else:
                del found[row]
                self._note(f"{tuple(image.shape)} for an image of {jpeg.width}×{jpeg.height} px")
        return found

    def _note(self, why: str) -> None:
        self._failed += 1
        if self._failed == 1:
            log.info(
                "a JPEG could not be decoded on the device (%s): Pillow decodes it, and others like it", why
            )
