"""Tools, calls and their results as chat templates write them, and the calls in what a model writes.

A template that has a place for tools gets them as it wants them. For other models the tools are listed
in the system text, in JSON, and the call is asked for as JSON; what was called and what came back
stands in the conversation as text. Training and serving write a conversation by the same functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.types import CALL_CLOSE, CALL_OPEN, Message, Tool, ToolCall

LISTED = """You can call these functions, each described in JSON:

{tools}

To call one, answer with nothing but a JSON object with the members "name", the function's name, and \
"arguments", an object that matches its parameters. Where no function helps, answer in words."""


def takes_tools(template: str) -> bool:
    """Whether a chat template has a place for tools."""
    return re.search(r"\btools\b", template) is not None


def uses_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
    """Whether there is anything that a template needs that place for."""
    return bool(tools) or any(turn.calls or turn.role == "tool" for turn in messages)


def describe_tool(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI and transformers' templates write it."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


def template_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns as transformers' templates read them, without what they do not have.

    Calls are numbered anew: some templates take ids of nine characters only, and a model that is to
    write an id can learn a number.
    """
    ids: dict[str, str] = {}
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        if message.calls:
            for call in message.calls:
                ids[call.id] = f"call{len(ids):05}"
                names[call.id] = call.name
            turn["tool_calls"] = [
                {
                    "id": ids[call.id],
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in message.calls
            ]
        if message.role == "tool":
            turn["tool_call_id"] = ids.get(message.call_id, "call00000")
            turn["name"] = names.get(message.call_id, "function")
        turns.append(turn)
    return turns


def in_words(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation in words, for templates without a place for tools."""
    names = {call.id: call.name for message in messages for call in message.calls}
    parts: list[tuple[Message, list[str]]] = []
    for message in messages:
        content, role = message.reply_text, message.role
        if role == "tool":
            name = names.get(message.call_id, "function")
            role, content = "user", f"Result of {name}: {content}"
        if parts and parts[-1][0].role == role == "user":
            # Results and what is said behind them are one turn: many templates want them to take turns.
            parts[-1][1].append(content)
        else:
            parts.append((Message(role, reasoning=message.reasoning), [content]))
    turns = [replace(message, content="\n".join(texts)) for message, texts in parts]
    if tools:
        listed = "\n".join(json.dumps(describe_tool(tool)["function"]) for tool in tools)
        text = LISTED.format(tools=listed)
        if turns[0].role == "system":
            text = f"{turns.pop(0).content}\n\n{text}"
        turns.insert(0, Message("system", text))
    return turns


def missing_from(text: str, message: Message) -> str | None:
    """What of a turn a template has left out of ``text``, for people; ``None`` where nothing."""
    for name, part in (("content", message.content), ("reasoning", message.reasoning)):
        if not _stands_in(text, part.strip()):
            return f"its {name}"
    for call in message.calls:
        if call.name not in text:
            return f'its call of "{call.name}"'
        if not all(_stands_in(text, value) for value in _leaves(call.arguments)):
            return f'an argument of its call of "{call.name}"'
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _stands_in(text: str, value: Any) -> bool:
    """Whether a value is there as it is, or as JSON writes it; JSON within JSON is escaped twice."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    plain = json.dumps(value, ensure_ascii=False)[1:-1]
    forms = (value, plain, json.dumps(value)[1:-1], json.dumps(plain)[1:-1], repr(value)[1:-1])
    return any(form in text for form in forms)


def parse_calls(text: str, names: set[str] | None = None) -> list[ToolCall]:
    """The calls in ``text``, without ids; none where it is anything but calls.

    ``names`` are the functions that there are, any when not given.
    """
    if CALL_OPEN in text:
        bodies = [part.partition(CALL_CLOSE)[0] for part in text.split(CALL_OPEN)[1:]]
    else:
        bodies = [text]
    calls: list[ToolCall] = []
    for body in bodies:
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return []
        for each in parsed if isinstance(parsed, list) else [parsed]:
            call = _call_in(each, names)
            if call is None:
                return []
            calls.append(call)
    return calls


def _call_in(parsed: Any, names: set[str] | None) -> ToolCall | None:
    if not isinstance(parsed, dict):
        return None
    name, arguments = parsed.get("name"), parsed.get("arguments", parsed.get("parameters"))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall("", name, arguments) if names is None or name in names else None
