"""scikit-learn's handwritten digits: 1,797 real images of 8×8 px that come with the package.

Law: a digit's id never changes, and with it its split: `pack` splits by a hash of the id.
Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (CC BY 4.0).
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_CLASSES = 10


def digits() -> Iterator[tuple[str, bytes, int]]:
    """Yield (id, PNG of 8×8 grey pixels, label); the 17 levels 0 … 16 become 0 … 255."""
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    for i, label in enumerate(labels):
        png = io.BytesIO()
        Image.fromarray(pixels[i]).save(png, "PNG")
        yield f"digits-{i:05d}", png.getvalue(), int(label)
