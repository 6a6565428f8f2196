"""Tools and JSON schemas of chat completions and responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.data.files.parsing import parse_embedded
from luthier.graders.json_schema import depth_of
from luthier.server.http.messages import JSON_DEPTH
from luthier.server.openai.protocol import Body, invalid
from luthier.types import Tool, ToolCall

MOST_TOOLS = 128
"""Maximum number of tools of a request."""
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class Function(Body):
    """A function that a model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Function):
    """A tool in requests for responses."""

    type: Literal["function"]


class ToolSpec(Body):
    """A tool in requests for chat completions."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """A name."""

    name: str


class NamedFunction(Named):
    """Function that a response must call."""

    type: Literal["function"]


class HostedTool(Body):
    """Tool of the server that a response must use."""

    type: Literal["file_search"]


class ToolChoice(Body):
    """Function that a chat completion must call."""

    type: Literal["function"]
    function: Named


Choice = Literal["none", "auto", "required"] | ToolChoice | NamedFunction | None


class JsonSchemaFormat(Body):
    """A JSON schema for replies."""

    name: FunctionName | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


def check_tools(tools: Sequence[Function], choice: Choice) -> None:
    """Reject duplicate tool names, and a choice of an unknown tool.

    Raises:
        Fault: 400.
    """
    names = [tool.name for tool in tools]
    if choice not in (None, "none", "auto") and not names:
        raise invalid("'tool_choice' needs 'tools'.", "tool_choice")
    named, where = None, "tool_choice.name"
    if isinstance(choice, ToolChoice):
        named, where = choice.function.name, "tool_choice.function.name"
    elif isinstance(choice, NamedFunction):
        named = choice.name
    if named is not None and named not in names:
        raise invalid(f"There is no tool '{named}'.", where)
    if len(set(names)) != len(names):
        raise invalid("Two tools have the same name.", "tools")


def engine_tools(tools: Iterable[Function]) -> tuple[Tool, ...]:
    """Return ``tools`` in the engine's form."""
    return tuple(
        Tool(tool.name, tool.description or "", tool.parameters or _NO_PARAMETERS) for tool in tools
    )


def engine_choice(choice: Choice) -> str:
    """Return ``choice`` in the engine's form."""
    if isinstance(choice, ToolChoice):
        return f"name:{choice.function.name}"
    return f"name:{choice.name}" if isinstance(choice, NamedFunction) else choice or "auto"


def arguments(text: str | None, where: str) -> Mapping[str, Any]:
    """Parse the JSON arguments of a call.

    Raises:
        Fault: 400 if ``text`` is not a JSON object.
    """
    try:
        members = parse_embedded(text or "{}")
    except ValueError:
        members = None
    if not isinstance(members, dict) or depth_of(members) > JSON_DEPTH:
        raise invalid("The arguments are not a JSON object.", where)
    return members


def call_id(call: ToolCall) -> str:
    """Return the id of a call with OpenAI's prefix ``call_``."""
    return "call_" + call.id.removeprefix("tooluse_")
