"""Images as PNG files, alone or in a grid."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from luthier.media.decoding import Pixels

GAP = 2
"""Pixels between the images of a grid."""


def grid(images: Sequence[Pixels], columns: int | None = None) -> Pixels:
    """Return images of one size in a grid on white; by default, about as many rows as columns."""
    height, width, _ = images[0].shape
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    size = rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3
    whole = np.full(size, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        whole[top : top + height, left : left + width] = image
    return whole


def encode_png(pixels: Pixels) -> bytes:
    """Encode an image ``[H, W, 3]`` as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
