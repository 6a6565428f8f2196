"""Parts of a message's content: text and images, in the forms of OpenAI, Bedrock and transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeGuard

from luthier.data.conversations.tool_forms import is_cache_point
from luthier.data.files.parsing import quote
from luthier.errors import RowRefused
from luthier.types import IMAGE_MARK

IMAGE_WORD = "<image>"
"""Mark of an image in the text of LLaVA, Qwen-VL, LLaMA-Factory and ms-swift."""
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


def place_images(turns: Sequence[object], count: int) -> list[object]:
    """Return the turns with an image part for each ``<image>`` in a user's text, as in LLaVA.

    A line break after ``<image>`` separates mark and text. If no turn has a mark or an image part,
    the ``count`` images stand before the first text of the user.
    """
    placed = [_with_image_parts(turn) for turn in turns]
    asked = next((turn for turn in placed if _is_users(turn)), None)
    if asked is not None and not any(_has_image(turn) for turn in placed):
        content = asked.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        asked["content"] = [{"type": "image"}] * count + parts
    return placed


def _is_users(turn: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(turn, dict) and turn.get("role") == "user"


def _has_image(turn: object) -> bool:
    content = turn.get("content") if _is_users(turn) else None
    parts = content if isinstance(content, list) else []
    return any(
        isinstance(part, dict) and (part.get("type") in _IMAGE_TYPES or "image" in part)
        for part in parts
    )


def _with_image_parts(turn: object) -> object:
    if not _is_users(turn):
        return turn
    content = turn.get("content")
    if not isinstance(content, list):
        return {**turn, "content": _split_marks(content)}
    texts = (part.get("text") if isinstance(part, dict) else None for part in content)
    split = (_split_marks(text) for text in texts)
    parts = [
        each if isinstance(each, list) else [part]
        for part, each in zip(content, split, strict=True)
    ]
    return {**turn, "content": [*chain.from_iterable(parts)]}


def _split_marks(text: object) -> object:
    """Return a text with marks as text and image parts; any other value unchanged."""
    if not isinstance(text, str) or IMAGE_WORD not in text:
        return text
    first, *others = text.split(IMAGE_WORD)
    parts: list[object] = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts.append({"type": "image"})
        if rest := other.removeprefix("\n"):
            parts.append({"type": "text", "text": rest})
    return parts


def _part_text(part: Mapping[str, Any], place: PlaceImage | None) -> str:
    text = part.get("text")
    if isinstance(text, str) and part.get("type", "text") in _TEXT_TYPES:
        unread = {key for key, value in part.items() if value not in ([], None)}
        if more := sorted(unread - {"type", "text", "cache_control"}):
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


_TEXT_TYPES = ("text", "input_text", "output_text")
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
