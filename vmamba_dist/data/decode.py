"""Bytes of an image → an RGB image.

Law: whatever bytes come in, the answer is an RGB image or DecodeError; nothing of the file is run, and no
more than MAX_PIXELS are ever unpacked.

What comes out: the orientation of EXIF is applied. Greyscale is repeated over three channels, 16-bit
greyscale scaled to 8 first; of 16-bit colour the upper byte is taken. A palette is looked up; CMYK and YCbCr are
converted as Pillow does, without colour profiles. Alpha, and a palette's or PNG's transparent colour, lie over white.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vmamba_dist.data.sources import stable

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's other readers are never asked: some start programs
MAX_PIXELS = 89_478_485  # 256 MiB of RGB, Pillow's own line

_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DecodeError(ValueError):
    """The bytes are not an image that can be used."""


@contextmanager
def _readable() -> Iterator[None]:
    """Turn whatever a damaged file ends in inside Pillow into DecodeError.

    Pillow's warnings, of EXIF that it passes over for example, say nothing: the image is as good without.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("undecodable image: no JPEG, PNG or WebP") from error
    except _PILLOW_ERRORS as error:  # a damaged file ends in any of these inside Pillow
        raise DecodeError(f"undecodable image: {type(error).__name__}: {stable(error)}") from error


def decode(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP to RGB. Raises DecodeError."""
    return load(look(data))


@_readable()
def look(data: bytes) -> Image.Image:
    """Read an image's header and leave its pixels. Raises DecodeError, for too many pixels too."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image)
    return image


def check_header(data: bytes) -> tuple[str, int, int]:
    """Read what a file's header says: (format, width, height). Raises DecodeError where decode() is sure to."""
    with look(data) as image:
        return str(image.format), image.width, image.height


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(f"{image.width}×{image.height} px is more than {MAX_PIXELS} px")


@_readable()
def load(image: Image.Image) -> Image.Image:
    """Read the pixels of what look() returned, upright and RGB. Raises DecodeError."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


@_readable()
def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 … 8; 1 is upright, and what stands for none. Raises DecodeError."""
    if not ("exif" in image.info or "xmp" in image.info):
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def is_plain_jpeg(image: Image.Image) -> bool:
    """Tell whether every JPEG decoder makes the same of it: greyscale, or colour stored as YCbCr, 8 bits."""
    return image.format == "JPEG" and image.mode in ("L", "RGB") and image.info.get("adobe_transform") != 0


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")
