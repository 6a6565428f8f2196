"""Chat requests: messages, tools and formats as clients send them, and as the engine takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.api.openai.asking import Sampling
from luthier.api.openai.errors import invalid
from luthier.api.openai.requests import Body
from luthier.api.wire import JSON_DEPTH
from luthier.graders.json_schema import depth_of
from luthier.serving.inference import MOST_TOKENS, TURNS, Chat, Request
from luthier.types import Message, Tool, ToolCall

MOST_TOOLS = 128
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
_ROLES: Mapping[str, Any] = {"developer": "system"}


class Part(Body):
    """A part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Body):
    """A call that an assistant asked for."""

    name: str
    arguments: str


class AskedCall(Body):
    """The same with its id."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=TURNS)] | None = None
    tool_calls: Annotated[list[AskedCall], Field(max_length=TURNS)] | None = None
    tool_call_id: str | None = None

    def turn(self, where: str) -> Message:
        """The same for the engine."""
        content = self._text(where)
        if content is None and not (self.role == "assistant" and self.tool_calls):
            raise invalid(
                f"Invalid value for '{where}.content': it must be text.", f"{where}.content"
            )
        if self.role == "tool" and not self.tool_call_id:
            name = f"{where}.tool_call_id"
            raise invalid(f"Missing required parameter: '{name}'.", name)
        calls = tuple(
            ToolCall(
                call.id,
                call.function.name,
                arguments(call.function.arguments, f"{where}.tool_calls[{i}].function.arguments"),
            )
            for i, call in enumerate(self.tool_calls or ())
        )
        role = _ROLES.get(self.role, self.role)
        return Message(role, content or "", calls=calls, call_id=self.tool_call_id or "")

    def _text(self, where: str) -> str | None:
        if not isinstance(self.content, list):
            return self.content
        return joined(self.content, ("text",), f"{where}.content")


class Function(Body):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """A name."""

    name: str


class ToolChoice(Body):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: Named


class JsonSchema(Body):
    """A schema that answers match."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of answers."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    """The body of a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=TURNS)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    def check(self) -> None:
        """Refuse what does not belong together."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise invalid("'tool_choice' needs 'tools'.", "tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            text = f"There is no tool '{self.tool_choice.function.name}' to choose."
            raise invalid(text, "tool_choice.function.name")
        if len(set(names)) != len(names):
            raise invalid("Two tools have the same name.", "tools")
        form = self.response_format
        if form is not None and form.type == "json_schema" and form.json_schema is None:
            name = "response_format.json_schema"
            raise invalid(f"Missing required parameter: '{name}'.", name)

    def built(self) -> Request:
        """The request for the engine."""
        turns = tuple(
            message.turn(f"messages[{index}]") for index, message in enumerate(self.messages)
        )
        tools = tuple(
            Tool(each.function.name, each.function.description or "", _parameters(each.function))
            for each in self.tools or ()
        )
        choice: str
        if isinstance(self.tool_choice, ToolChoice):
            choice = f"name:{self.tool_choice.function.name}"
        else:
            choice = self.tool_choice or "auto"
        tokens = self.max_completion_tokens or self.max_tokens
        return self.request(
            Chat(turns, tools, choice),
            max_tokens=tokens,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            schema=self._schema(),
        )

    def _schema(self) -> Mapping[str, Any] | bool | None:
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.json_schema is None or form.type == "json_object":
            return True
        return form.json_schema.json_schema or True


def _parameters(function: Function) -> Mapping[str, Any]:
    return function.parameters or {"type": "object", "properties": {}}


def joined(parts: Sequence[Part], kinds: Sequence[str], where: str) -> str:
    """The text of ``parts``, which are refusals or of one of ``kinds``."""
    texts = []
    for index, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*kinds, "refusal") or text is None:
            name = f"{where}[{index}].type"
            raise invalid(f"This model reads text alone, and no '{part.type}'.", name)
        texts.append(text)
    return "".join(texts)


def arguments(text: str | None, where: str) -> Mapping[str, Any]:
    """The arguments of a call, which clients send as text; raises :class:`Fault` for no JSON object."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or depth_of(found) > JSON_DEPTH:
        raise invalid("The arguments of a call are a JSON object.", where)
    return found
