"""Conversations as Converse writes them, checked as AWS does, and as the engine reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from luthier.api.bedrock.bodies import Body
from luthier.api.wire import Fault
from luthier.serving.inference import TURNS, Chat
from luthier.types import Message, Tool, ToolCall

Identifier = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]


class _Union(Body):
    """Exactly one of its members is set."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def member(self, at: str) -> tuple[str, Any]:
        """Name and value of the one that is set."""
        given = {name: value for name, value in self if value is not None}
        given |= {k: v for k, v in (self.model_extra or {}).items() if v is not None}
        if len(given) != 1:
            raise Fault(
                "Validation",
                f"1 validation error detected: Value at '{at}' failed to satisfy constraint: "
                "exactly one of the members of a union is set",
            )
        return next(iter(given.items()))


class GuardText(Body):
    """A text that guardrails look at."""

    text: str


class GuardContent(Body):
    """What guardrails look at."""

    text: GuardText


class ToolUse(Body):
    """A call that the assistant asked for."""

    toolUseId: Identifier
    name: Identifier
    input: dict[str, Any]


class ResultContent(_Union):
    """A part of what a tool gave back."""

    text: str | None = None
    json_: Any = Field(default=None, alias="json")

    def told(self, at: str) -> str:
        """The same as text."""
        name, value = self.member(at)
        if name not in ("text", "json_"):
            raise _unsupported(name)
        return value if name == "text" else json.dumps(value, ensure_ascii=False)


class ToolResult(Body):
    """What a tool gave back."""

    toolUseId: Identifier
    content: Annotated[list[ResultContent], Field(max_length=TURNS)]
    status: Literal["success", "error"] | None = None


class Block(_Union):
    """A part of a message."""

    text: str | None = None
    toolUse: ToolUse | None = None
    toolResult: ToolResult | None = None
    guardContent: GuardContent | None = None
    cachePoint: Any = None


class ConversationMessage(Body):
    """A turn of the user or the assistant."""

    role: Literal["user", "assistant"]
    content: Annotated[list[Block], Field(max_length=TURNS)]


class SystemBlock(_Union):
    """A part of the system text."""

    text: Annotated[str, Field(min_length=1)] | None = None
    guardContent: GuardContent | None = None
    cachePoint: Any = None


class InputSchema(Body):
    """JSON schema of a tool's arguments."""

    json_: dict[str, Any] = Field(alias="json")


class ToolSpec(Body):
    """A function that may be called."""

    name: Identifier
    description: Annotated[str, Field(min_length=1)] | None = None
    inputSchema: InputSchema
    strict: bool | None = None


class ToolItem(_Union):
    """A tool."""

    toolSpec: ToolSpec | None = None
    cachePoint: Any = None


class NamedTool(Body):
    """The one tool that has to be called."""

    name: Identifier


class ToolChoice(_Union):
    """Whether and what has to be called."""

    auto: dict[str, Any] | None = None
    any: dict[str, Any] | None = None
    tool: NamedTool | None = None


class ToolConfig(Body):
    """Tools, and the choice between them."""

    tools: Annotated[list[ToolItem], Field(min_length=1, max_length=TURNS)]
    toolChoice: ToolChoice | None = None


class Conversation(Body):
    """What is said, and with which tools."""

    messages: Annotated[list[ConversationMessage], Field(min_length=1, max_length=TURNS)]
    system: Annotated[list[SystemBlock], Field(max_length=TURNS)] = Field(default_factory=list)
    toolConfig: ToolConfig | None = None

    def chat(self) -> Chat:
        """The conversation for the engine.

        Raises:
            Fault: Validation, where turns do not follow each other as they should.
        """
        _check_order(self.messages)
        turns = [Message("system", text)] if (text := self._system()) else []
        for index, message in enumerate(self.messages):
            turns += _turns(message, f"messages.{index}")
        _check_calls(turns, self.toolConfig is not None)
        tools, choice = self._tools()
        return Chat(tuple(turns), tools, choice)

    def _system(self) -> str:
        texts = []
        for index, block in enumerate(self.system):
            name, value = block.member(f"system.{index}")
            if name in ("text", "guardContent"):
                texts.append(value if name == "text" else value.text.text)
            elif name != "cachePoint":
                raise _unsupported(name)
        return "\n".join(texts)

    def _tools(self) -> tuple[tuple[Tool, ...], str]:
        if self.toolConfig is None:
            return (), "auto"
        specs = [
            (item.member(f"toolConfig.tools.{i}"), item.toolSpec)
            for i, item in enumerate(self.toolConfig.tools)
        ]
        if strange := [name for (name, _), _ in specs if name not in ("toolSpec", "cachePoint")]:
            raise _unsupported(strange[0])
        tools = tuple(
            Tool(spec.name, spec.description or "", spec.inputSchema.json_)
            for _, spec in specs
            if spec is not None
        )
        names = [tool.name for tool in tools]
        if twice := {name for name, count in Counter(names).items() if count > 1}:
            raise Fault("Validation", f"The tool {min(twice)} is defined more than once.")
        if self.toolConfig.toolChoice is None:
            return tools, "auto"
        kind, value = self.toolConfig.toolChoice.member("toolConfig.toolChoice")
        if kind == "tool" and value.name not in names:
            raise Fault(
                "Validation", f"The tool {value.name} of toolChoice is not among toolConfig.tools."
            )
        chosen = {"auto": "auto", "any": "required"}.get(kind)
        if chosen is None and kind != "tool":
            raise _unsupported(kind)
        return tools, chosen or f"name:{value.name}"


def _check_order(messages: Sequence[ConversationMessage]) -> None:
    if messages[0].role != "user":
        raise Fault(
            "Validation",
            "A conversation must start with a user message. Try again with a conversation that "
            "starts with a user message.",
        )
    roles = [message.role for message in messages]
    if any(one == next_ for one, next_ in pairwise(roles)):
        raise Fault(
            "Validation",
            "A conversation must alternate between user and assistant roles. Make sure the "
            "conversation alternates between user and assistant roles and try again.",
        )
    if roles[-1] != "user":
        raise Fault(
            "Validation",
            "A conversation must end with a user message. Try again with a conversation that ends "
            "with a user message.",
        )


def _turns(message: ConversationMessage, at: str) -> list[Message]:
    """A message as turns: what tools gave back stands before what is said beside it."""
    if not message.content:
        raise Fault(
            "Validation",
            f"The content field in the Message object at {at} is empty. Add a ContentBlock object "
            "to the content field and try again.",
        )
    texts: list[str] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for index, block in enumerate(message.content):
        where = f"{at}.content.{index}"
        name, value = block.member(where)
        if name in ("text", "guardContent"):
            texts.append(_text(value if name == "text" else value.text.text, where))
        elif name == "toolUse" and message.role == "assistant":
            calls.append(ToolCall(value.toolUseId, value.name, value.input))
        elif name == "toolResult" and message.role == "user":
            parts = [part.told(f"{where}.toolResult.content") for part in value.content]
            results.append(Message("tool", "\n".join(parts), call_id=value.toolUseId))
        elif name in ("toolUse", "toolResult"):
            raise Fault(
                "Validation",
                f"The {message.role} role cannot have the {name} block at {where}.",
            )
        elif name != "cachePoint":
            raise _unsupported(name)
    if texts or calls or not results:
        results.append(Message(message.role, "\n".join(texts), calls=tuple(calls)))
    return results


def _text(text: str, at: str) -> str:
    if not text.strip():
        raise Fault(
            "Validation",
            f"The text field in the ContentBlock object at {at} is blank. Add text to the text "
            "field, and try again.",
        )
    return text


def _check_calls(turns: Sequence[Message], tools: bool) -> None:
    """Every call is answered in the next turn, and nothing else is."""
    if not tools and any(turn.calls or turn.role == "tool" for turn in turns):
        raise Fault(
            "Validation",
            "The toolConfig field must be defined when using toolUse and toolResult content blocks.",
        )
    open_calls: set[str] = set()
    for turn in turns:
        if turn.role == "tool":
            if turn.call_id not in open_calls:
                raise Fault(
                    "Validation",
                    f"The toolResult block {turn.call_id} answers no toolUse block of the previous "
                    "turn.",
                )
            open_calls.discard(turn.call_id)
        elif open_calls:
            raise Fault(
                "Validation",
                f"Expected toolResult blocks for the following Ids: {', '.join(sorted(open_calls))}",
            )
        else:
            open_calls = {call.id for call in turn.calls}


def _unsupported(name: str) -> Fault:
    return Fault(
        "Validation",
        f"This model doesn't support the {name} field. Remove {name} and try again.",
    )


def schema_of(text: str) -> Mapping[str, Any]:
    """The JSON schema in ``text``."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Fault(
            "Validation", "outputConfig.textFormat.structure.jsonSchema.schema is no JSON object."
        )
    return found
