"""Bodies of ``/responses``: items, tools and formats as clients send and as the engine takes them.

Each request stands for itself: what was said before is sent along as items. Refused are members that
would change the answer and mean nothing here: earlier responses by id, stored prompts and
conversations, work in the background, tools that the server would have to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.api.openai.conversations import MOST_TOOLS, NAME, Part, arguments, joined
from luthier.api.openai.errors import invalid
from luthier.api.openai.requests import Body, Metadata
from luthier.serving.inference import MOST_TOKENS, TURNS, Chat, Request
from luthier.types import Message, Tool, ToolCall

LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text")
_ELSEWHERE = {
    "previous_response_id": "Responses are not kept here: send the earlier items in 'input'",
    "conversation": "Conversations are not kept here: send the earlier items in 'input'",
    "prompt": "Prompts are not kept here: send the text in 'instructions' and 'input'",
    "background": "Responses are written while you wait: use /v1/batches for work in the background",
}


class Item(Body):
    """One item: a message, a call, or what came of one."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[Part], Field(max_length=TURNS)] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[Part], Field(max_length=TURNS)] | None = None


class FunctionTool(Body):
    """A function that may be called."""

    type: str
    name: Annotated[str, Field(pattern=NAME)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Body):
    """The one tool that has to be called."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=NAME)] | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Text(Body):
    """How the text is written."""

    format: TextFormat | None = None


class ResponseRequest(Body):
    """The body of a response."""

    model: Annotated[str, Field(min_length=1)]
    input: str | Annotated[list[Item], Field(min_length=1, max_length=TURNS)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    metadata: Metadata = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token is told with its probability."""
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Refuse what means nothing here, and what does not belong together."""
        for name, text in _ELSEWHERE.items():
            if getattr(self, name):
                raise invalid(f"{text}.", name, "unsupported_parameter")
        for index, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                where = f"tools[{index}].type"
                raise invalid(f"Tools are functions of yours, and no '{tool.type}'.", where)
            if tool.name is None:
                where = f"tools[{index}].name"
                raise invalid(f"Missing required parameter: '{where}'.", where)
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise invalid("Two tools have the same name.", "tools")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise invalid("'tool_choice' needs 'tools'.", "tool_choice")
        if isinstance(self.tool_choice, NamedFunction) and self.tool_choice.name not in names:
            raise invalid(
                f"There is no tool '{self.tool_choice.name}' to choose.", "tool_choice.name"
            )
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise invalid(f"'top_logprobs' needs 'include' to name {LOGPROBS}.", "top_logprobs")
        form = self.text.format if self.text else None
        if form is not None and form.type == "json_schema" and form.json_schema is None:
            where = "text.format.schema"
            raise invalid(f"Missing required parameter: '{where}'.", where)

    def built(self) -> Request:
        """The request for the engine."""
        tools = tuple(
            Tool(each.name or "", each.description or "", each.parameters or _ANYTHING)
            for each in self.tools or ()
        )
        choice = self.tool_choice or "auto"
        named = f"name:{choice.name}" if isinstance(choice, NamedFunction) else choice
        given: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        return Request(
            Chat(self._turns(), tools, named),
            max_tokens=self.max_output_tokens,
            top_logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            schema=self._schema(),
            **{name: value for name, value in given.items() if value is not None},
        )

    def _turns(self) -> tuple[Message, ...]:
        turns = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return (*turns, Message("user", self.input))
        for index, item in enumerate(self.input):
            _add(turns, item, f"input[{index}]")
        return tuple(turns)

    def _schema(self) -> Mapping[str, Any] | bool | None:
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        return form.json_schema or True


_ANYTHING: Mapping[str, Any] = {"type": "object", "properties": {}}


def _add(turns: list[Message], item: Item, where: str) -> None:
    """Put ``item`` behind ``turns``; calls belong to the turn of the assistant before them."""
    if item.type == "message":
        role = _required(item.role, f"{where}.role")
        content = _text(_required(item.content, f"{where}.content"), f"{where}.content")
        turns.append(Message("system" if role == "developer" else role, content))
    elif item.type == "function_call":
        call = ToolCall(
            _required(item.call_id, f"{where}.call_id"),
            _required(item.name, f"{where}.name"),
            arguments(item.arguments, f"{where}.arguments"),
        )
        if not turns or turns[-1].role != "assistant":
            turns.append(Message("assistant"))
        turns[-1] = replace(turns[-1], calls=(*turns[-1].calls, call))
    elif item.type == "function_call_output":
        call_id = _required(item.call_id, f"{where}.call_id")
        if not any(call.id == call_id for turn in turns for call in turn.calls):
            text = f"No tool call found for function call output with call_id {call_id}."
            raise invalid(text, "input")
        output = _text(_required(item.output, f"{where}.output"), f"{where}.output")
        turns.append(Message("tool", output, call_id=call_id))
    elif item.type != "reasoning":  # of a model that thinks aloud elsewhere; nothing to go on from
        raise invalid(f"Items of the type '{item.type}' are not taken.", f"{where}.type")


def _required(value: Any, where: str) -> Any:
    if value is None:
        text = f"Missing required parameter: '{where}'."
        raise invalid(text, where, "missing_required_parameter")
    return value


def _text(content: str | list[Part], where: str) -> str:
    return content if isinstance(content, str) else joined(content, _TEXTS, where)
