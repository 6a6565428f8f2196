"""Text and JSON for both databases.

PostgreSQL rejects U+0000 and unpaired surrogates, and JSON rejects numbers that are not finite.
``luthier.server.http.messages`` rejects such text from clients. Text of the service itself, such as
a message that quotes a row, is made storable.
"""

from __future__ import annotations

import json
import re
from typing import Any

from luthier.formatting import finite_or_none

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
"""JSON escapes of U+0000 and of surrogates."""


def check_storable(text: str) -> None:
    """Raise :class:`ValueError` for text that no database stores."""
    found = _UNSTORABLE.search(text)
    if found is not None:
        what = "the character U+0000" if found[0] == "\0" else "half a surrogate pair"
        raise ValueError(f"the text contains {what}")


def decode_storable(data: bytes) -> str:
    """Decode ``data``; raises :class:`ValueError` with a readable message for text that no database
    stores."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
    check_storable(text)
    return text


def storable(text: str) -> str:
    """Replace characters that no database stores by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


def dump_storable(value: Any) -> str:
    """Return ``value`` as JSON for both databases, with null for numbers that are not finite."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return dump_storable(finite_or_none(value))
    # Rare: json.dumps escaped U+0000 or a surrogate. Valid pairs stay unchanged.
    return json.dumps(storable_value(value)) if _ESCAPED.search(text) else text


def storable_value(value: Any) -> Any:
    """Return ``value`` ready for JSON, with storable strings and keys."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(str(key)): storable_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [storable_value(each) for each in value]
    return value
