"""Answers of tools for agents: text for the model, and structured content for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mcp.types import CallToolResult, TextContent

WAIT_SECONDS = 4.0
"""Longest wait for a result; clients end a call after a minute."""
_MOST_TEXT = 5_000
"""Bytes of the text of an answer."""
_MOST_RESULT = 2_000
"""Bytes of the structured content; the whole result is stored elsewhere."""
_MOST_VALUE = 600
"""Bytes of an entry of the structured content."""


def answer(text: str, values: dict[str, Any], is_error: bool = False) -> CallToolResult:
    """Return the answer of a tool in at most 8 kB."""
    encoded = text.encode()
    if len(encoded) > _MOST_TEXT:
        text = encoded[:_MOST_TEXT].decode(errors="ignore") + "\n[cut]"
    return CallToolResult(
        content=[TextContent(type="text", text=text)], structured_content=values, is_error=is_error
    )


def short_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a result that are short enough for an answer."""
    found, size = dict[str, Any](), 0
    for name, value in result.items():
        size_of_value = len(json.dumps(value).encode())
        if size_of_value <= _MOST_VALUE and size + size_of_value <= _MOST_RESULT:
            found[name] = value
            size += size_of_value
    return found
