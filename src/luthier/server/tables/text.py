"""Text and JSON as both databases keep them.

PostgreSQL has no U+0000, no halves of surrogate pairs, and in JSON no numbers that are not finite.

What clients send is refused where it comes in (``luthier.server.http.messages``); what the service
itself writes down, such as a message that quotes a row, is made storable.
"""

from __future__ import annotations

import json
import re
from typing import Any

from luthier.escaping import finite_or_none

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
"""In JSON: U+0000, and what could be half of a pair."""


def check_storable(text: str) -> None:
    """Raise :class:`ValueError` for text that no database keeps."""
    found = _UNSTORABLE.search(text)
    if found is not None:
        what = "the character U+0000" if found[0] == "\0" else "half a surrogate pair"
        raise ValueError(f"it holds {what}")


def decode_storable(data: bytes) -> str:
    """The text of ``data``; raises :class:`ValueError`, in words, for what is none that can be kept."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    check_storable(text)
    return text


def storable(text: str) -> str:
    """``text`` with U+FFFD in place of what no database keeps."""
    return _UNSTORABLE.sub("\ufffd", text)


def dump_storable(value: Any) -> str:
    """``value`` as JSON that both databases take: what is no finite number is null."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return dump_storable(finite_or_none(value))
    # Nearly no value needs the second look, and pairs that are whole pass it unchanged.
    return json.dumps(storable_value(value)) if _ESCAPED.search(text) else text


def storable_value(value: Any) -> Any:
    """``value`` ready for JSON, with all its texts and keys :func:`storable`."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(str(key)): storable_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [storable_value(each) for each in value]
    return value
