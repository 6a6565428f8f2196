"""Parts of a message's content: text and images, in the forms of OpenAI, Bedrock and transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from luthier.data.parsing import quote
from luthier.data.tool_forms import is_cache_point
from luthier.errors import RowRefused
from luthier.types import IMAGE_MARK

PlaceImage = Callable[[object], None]
"""Collects the image of a part: a path, an address or bytes, or ``None`` without any."""


def join_parts(value: object, place: PlaceImage | None = None) -> object:
    """Return the concatenated text of content parts; any other value unchanged.

    Bedrock's cache points are skipped. An image becomes :data:`IMAGE_MARK`.

    Args:
        place: receives the images in order; without ``place``, images are rejected.

    Raises:
        RowRefused: for a part with other content.
    """
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return value
    return "".join(_part_text(part, place) for part in value if not is_cache_point(part))


def _part_text(part: Mapping[str, Any], place: PlaceImage | None) -> str:
    text = part.get("text")
    if isinstance(text, str) and part.get("type", "text") == "text":
        if more := sorted(part.keys() - {"type", "text", "cache_control"}):
            raise RowRefused(
                "message.part",
                f"a content part has the unknown key {quote(more[0])}.",
                "Remove the key; training marks belong to the message.",
            )
        if place is not None and IMAGE_MARK in text:
            raise RowRefused(
                "message.part",
                "the text contains U+FFFC, the character for an image.",
                "Remove the character.",
            )
        return text
    kind = part.get("type") or next(iter(part), "nothing")
    if place is not None and kind in _IMAGE_TYPES:
        place(_image_of(part))
        return IMAGE_MARK
    raise RowRefused(
        "message.part",
        f"the type {quote(str(kind))} of a content part is not supported.",
        "Keep text, and images of user messages, or remove the row.",
    )


_IMAGE_TYPES = ("image_url", "input_image", "image")


def _image_of(part: Mapping[str, Any]) -> object:
    """Return the path, address or bytes of an image part; ``None`` for a part without an image."""
    value = part.get("image_url", part.get("image", part.get("source")))
    if isinstance(value, Mapping) and isinstance(value.get("source"), Mapping):
        value = value["source"]  # Converse: {"image": {"format": "png", "source": {"bytes": …}}}
    if isinstance(value, Mapping) and "s3Location" in value:
        value = value["s3Location"]
    if isinstance(value, Mapping):
        data = value.get("bytes", value.get("data"))
        if isinstance(data, str):  # Converse and Anthropic have base64 in JSON
            return f"data:image;base64,{data}"
        value = data or value.get("url", value.get("uri", value.get("path")))
    return value if value is not None else part.get("url", part.get("path"))
