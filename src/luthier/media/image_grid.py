"""Images as PNG files, alone or in a grid."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from luthier import __version__
from luthier.errors import RowRefused
from luthier.pages import png_address

if TYPE_CHECKING:
    from luthier.data.inputs import Media
    from luthier.media.decoding import Pixels

GAP = 2
"""Pixels between the images of a grid."""
THUMBNAIL = 96
"""Longest side of a thumbnail, in pixels."""


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


def encode_png(pixels: Pixels, model: str | None = None) -> bytes:
    """Encode an image ``[H, W, 3]`` as a PNG file.

    The metadata of an image that ``model`` made say so, in the keywords of the PNG specification.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    stream, info = io.BytesIO(), PngInfo()
    if model is not None:
        info.add_text("Title", "synthetic image")
        info.add_text("Source", model)
        info.add_text("Software", f"luthier {__version__}")
    Image.fromarray(pixels).save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def thumbnail(media: Media) -> str:
    """Return a small picture of an image as a ``data:`` address; empty for an unreadable file."""
    from PIL import Image

    from luthier.media.decoding import read_pixels

    try:
        picture = Image.fromarray(read_pixels(media))
    except RowRefused:
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return png_address(encode_png(np.asarray(picture)))
