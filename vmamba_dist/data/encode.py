"""An RGB image → bytes of an image file, and what a file's header says without its pixels.

Law: the same pixels and settings give the same bytes, with one version of Pillow.
"""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image

from vmamba_dist.data.decode import DecodeError, check_header, decode

Format = Literal["jpg", "png", "webp"]
FORMATS: tuple[Format, ...] = ("jpg", "png", "webp")
_PILLOW: dict[Format, str] = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_SUFFIX: dict[str, Format] = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # MPO begins as a JPEG


def encode(image: Image.Image, format: Format, quality: int = 90) -> bytes:
    """Encode an image; quality is JPEG's and WebP's, 1 … 100, and PNG has none."""
    file = io.BytesIO()
    options = {} if format == "png" else {"quality": quality}
    image.save(file, _PILLOW[format], **options)
    return file.getvalue()


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """Make the longer side max_side px where it is longer, keeping the shape."""
    longer = max(image.size)
    if longer <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def convert(
    data: bytes,
    *,
    check: Literal["header", "decode"],
    max_side: int | None,
    format: Format | None,
    quality: int,
) -> tuple[bytes, Format]:
    """Check a file, and make another of it where it is too large or of another format: (bytes, suffix).

    What need not change stays as it is, byte for byte. A new file is upright RGB as decode() makes it. Raises
    DecodeError.
    """
    kind, width, height = check_header(data)
    suffix = _SUFFIX[kind]
    if (max_side is None or max(width, height) <= max_side) and format is None:
        if check == "decode":
            decode(data)
        return data, suffix
    image = decode(data)
    if max_side is not None:
        image = shrink(image, max_side)
    return encode(image, format or suffix, quality), format or suffix


__all__ = ["FORMATS", "DecodeError", "Format", "convert", "encode", "shrink"]
