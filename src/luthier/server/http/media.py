"""Images and audio in requests."""

from __future__ import annotations

import base64
import binascii

from luthier.data.inputs import Media, MediaKind
from luthier.server.http.messages import Fault


def read_media(text: str, kind: MediaKind, parameter: str) -> Media:
    """Return an image or audio file from base64 or a ``data:`` URL."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Fault(
                "Validation", f"{parameter}: the data: URL is not base64.", parameter=parameter
            )
        if not head.startswith(f"data:{kind}/"):
            raise Fault(
                "Validation",
                f"{parameter}: the data: URL has the type {head[5:64]}, not {kind}.",
                parameter=parameter,
            )
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise Fault("Validation", f"{parameter} is not base64.", parameter=parameter) from None
    return Media(kind, parameter, data=data)


def read_image_url(url: str, parameter: str) -> Media:
    """Return the image of a ``data:`` URL in a message. Remote URLs are rejected."""
    if not url.startswith("data:"):
        text = f"{parameter}: the server fetches no remote images. Send the image as a data: URL."
        raise Fault("Validation", text, parameter=parameter)
    return read_media(url, "image", parameter)
