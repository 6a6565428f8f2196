"""Parts that ``luthier mcp`` and ``/mcp`` share: the server of the protocol, and answers of tools.

The text of an answer is for the model, the structured content for programs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import Field

import luthier

WAIT_SECONDS = 4.0
"""Longest wait for a result; clients end a call after a minute."""
_MOST_TEXT = 5_000
"""Bytes of the text of an answer."""
_MOST_RESULT = 2_000
"""Bytes of the structured content; the whole result is stored elsewhere."""
_MOST_VALUE = 600
"""Bytes of an entry of the structured content."""

Columns = Annotated[
    dict[str, str] | None,
    Field(description='Column of a key, such as {"label": "intent"}, if inspect asks for it.'),
]
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_WRITES = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)


def tool_server(
    instructions: str, reading: Sequence[Callable[..., Any]], writing: Sequence[Callable[..., Any]]
) -> MCPServer:
    """Return a server with tools that only read, and tools that write."""
    server = MCPServer(
        "luthier", instructions=instructions, version=luthier.__version__, log_level="WARNING"
    )
    for tools, hints in ((reading, _READS), (writing, _WRITES)):
        for tool in tools:
            server.add_tool(tool, annotations=hints)
    return server


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
