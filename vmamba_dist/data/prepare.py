"""From a sample's bytes to what the stream hands over: an image of S × S px, or a JPEG left to the GPU.

Law: whatever the decoder, the same draws are applied, and bytes that Pillow cannot use are refused. What a decoder
does not claim, Pillow decodes: PNG, WebP, and JPEGs that are neither greyscale nor YCbCr.

    pil          Pillow alone
    torchvision  torchvision's JPEG decoder gives the same pixels as Pillow, in less time; its resizing differs by one
                 level in a few of a thousand pixels. A JPEG whose crop is at least twice the square is decoded
                 smaller, to 1/2, 1/4 or 1/8, which libjpeg does through Pillow's draft mode and torchvision does not
    gpu          the bytes and the draws go to ondevice.DeviceDecoder
"""

from __future__ import annotations

import logging
import mmap
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vmamba_dist.config.schema import AugmentConfig
from vmamba_dist.data.augment import RESAMPLE, TrainTransform
from vmamba_dist.data.batch import Encoded
from vmamba_dist.data.decode import DecodeError, decode, is_plain_jpeg, load, look, orientation
from vmamba_dist.data.draws import Draw
from vmamba_dist.data.pixels import shape_upright, upright

log = logging.getLogger(__name__)

Decoder = Literal["pil", "torchvision", "gpu"]
END_OF_IMAGE = b"\xff\xd9"

# torchvision ≥ 0.29 says at each call that its decoders will move to TorchCodec; until they have, they are here.
warnings.filterwarnings(
    "ignore",
    message="The image decoding and encoding capabilities of TorchVision",
    category=DeprecationWarning,
)


Prepare = Callable[[bytes, int], Tensor | Encoded]  # (image's bytes, seed) → (3, S, S) uint8 | Encoded


class TrainPreparation:
    """Prepares training samples with one of the decoders. Raises DecodeError for bytes that are no image."""

    def __init__(self, augment: AugmentConfig, image_size: int, decoder: Decoder = "pil") -> None:
        self._transform = TrainTransform(augment, image_size)
        self._size = image_size
        self._how = InterpolationMode(augment.interpolation)
        self._resample = RESAMPLE[augment.interpolation]
        self._decoder = decoder
        self._said = mmap.mmap(-1, 1)  # shared with forks, so that a rank's workers together say it once

    def __call__(self, data: bytes, seed: int) -> Tensor | Encoded:
        if self._decoder == "pil":
            return self._transform(decode(data), seed)
        image = look(data)
        if not is_plain_jpeg(image):
            self._say(image)
            return self._transform(load(image), seed)
        turn = orientation(image)
        width, height = shape_upright(*image.size, turn)
        draw = self._transform.draw(width, height, seed)
        if self._decoder == "torchvision":
            return self._by_torchvision(data, image, turn, draw)
        if not data.rstrip(b"\0").endswith(END_OF_IMAGE):
            return self._transform.apply(load(image), draw)  # Pillow judges what may be cut short
        return Encoded(data, width, height, turn, draw)

    def _by_torchvision(self, data: bytes, image: Image.Image, turn: int, draw: Draw) -> Tensor:
        top, left, height, width = draw.crop
        factor = next((f for f in (8, 4, 2) if min(height, width) >= f * self._size), 1)
        if factor > 1:
            full_width, full_height = shape_upright(*image.size, turn)
            image.draft("RGB", (image.width // factor, image.height // factor))
            small = load(image)
            # A small pixel is factor × factor large ones. The last ones reach beyond the image as it is stored, and
            # where that is turned round, they come first.
            left += small.width * factor - full_width if turn in (2, 3, 6, 7) else 0
            top += small.height * factor - full_height if turn in (3, 4, 7, 8) else 0
            right, bottom = (
                min((left + width) / factor, small.width),
                min((top + height) / factor, small.height),
            )
            resized = small.resize(
                (self._size, self._size), self._resample, box=(left / factor, top / factor, right, bottom)
            )
            return self._transform.finish(resized, draw.operations)
        pixels = upright(decode_by_torchvision(data), turn)
        pixels = pixels[:, top : top + height, left : left + width]
        # Channels last, as Pillow will want the result: another layout would have to be turned round, at full size.
        pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        made: Tensor = F.resize(pixels, [self._size, self._size], self._how, antialias=True)
        if not draw.operations:
            return made
        return self._transform.finish(Image.fromarray(made.permute(1, 2, 0).numpy()), draw.operations)

    def _say(self, image: Image.Image) -> None:
        if not self._said[0]:
            self._said[0] = 1
            log.info(
                "data.decoder=%s decodes JPEGs in grey or YCbCr; others, like a %s in mode %s, Pillow does",
                *(self._decoder, image.format, image.mode),
            )


def decode_by_torchvision(data: bytes) -> Tensor:
    """Decode a plain JPEG to (3, H, W) uint8, as it lies. Raises DecodeError."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise DecodeError(f"undecodable image: {str(error).partition(chr(10))[0]}") from error
