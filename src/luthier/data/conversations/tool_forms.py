"""Tools, tool calls, results and reasoning of agent logs, converted to one form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from luthier.data.conversations.tools import leaves
from luthier.data.files.parsing import json_kind, parse_embedded, parse_python, quote
from luthier.errors import RowRefused
from luthier.types import Tool, ToolCall

MOST_TOOLS = 128
"""Most tools of a row, as in OpenAI's API."""
MOST_ARGUMENTS = 10_000
"""Most names and values in a call's arguments; each is searched in the rendered text."""
_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "tuple": "array", "set": "array", "dict": "object",
}  # fmt: skip
"""JSON Schema types by the names of Python's types."""
_CALL_ROLES = ("tool_call", "function_call")
_RESULT_ROLES = ("function", "observation")
_TOOL_ROLES = frozenset(("tool", *_CALL_ROLES, *_RESULT_ROLES))
_HERMES_SYSTEM = re.compile(
    r"\s*You are a function calling AI model\..*?<tools>\s*(\[.*?\])\s*</tools>", re.S
)
"""System prompt of NousResearch's Hermes, with the tools in JSON."""
_HERMES_RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.S)
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
"""Keys of the reasoning of a turn or of a row's reply."""
_TURN_KEYS = frozenset(("tool_calls", "function_call", *REASONING_KEYS))


def read_tools(value: object) -> tuple[Tool, ...]:
    """Return the tools of a row: OpenAI's list, functions, Bedrock's ``toolConfig``, or JSON text.

    Raises:
        RowRefused: for any other value, two tools of one name, or more than 128 tools.
    """
    if isinstance(value, str):
        try:
            value = parse_embedded(value) if value.strip() else []
        except ValueError as error:
            raise _refusal("tools.type", f"the tools are not valid JSON: {error}") from None
    if isinstance(value, Mapping) and isinstance(value.get("tools"), list):
        value = value["tools"]
    if isinstance(value, list):
        # A cache point is an instruction to Bedrock, and no tool.
        value = [each for each in value if not is_cache_point(each)]
    else:
        raise _refusal("tools.type", f"the tools must be an array, but are {type(value).__name__}")
    if len(value) > MOST_TOOLS:
        raise _refusal("tools.type", f"the row has {len(value):,} tools; the limit is {MOST_TOOLS}")
    tools = tuple(_read_tool(each, number) for number, each in enumerate(value, 1))
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise _refusal("tools.type", f'two tools have the name "{tool.name}"')
        names.add(tool.name)
    return tools


def _read_tool(item: object, number: int) -> Tool:
    if isinstance(item, Mapping):
        spec = item.get("function", item.get("toolSpec", item))
        if isinstance(spec, Mapping):
            schema = spec.get("parameters", spec.get("inputSchema", spec.get("input_schema")))
            if isinstance(schema, Mapping) and isinstance(schema.get("json"), Mapping):
                schema = schema["json"]
            name, description = spec.get("name"), spec.get("description") or ""
            schema = {"type": "object"} if schema is None else _as_schema(schema)
            if (
                isinstance(name, str)
                and name.strip()
                and isinstance(description, str)
                and isinstance(schema, Mapping)
            ):
                return Tool(name, description, schema)
    raise _refusal("tools.type", f"tool {number} has no name, or an invalid description or schema")


def _as_schema(parameters: object) -> object:
    """Return parameters in JSON Schema; xLAM lists them by name, with Python's types."""
    if not isinstance(parameters, Mapping) or not parameters:
        return parameters
    if not all(isinstance(each, Mapping) and "type" in each for each in parameters.values()):
        return parameters
    required, properties = [], {}
    for name, each in parameters.items():
        kind, _, more = str(each["type"]).partition(",")
        plain = kind.strip().lower().partition("[")[0]
        properties[name] = {**each, "type": _TYPES.get(plain, plain)}
        if "optional" not in more and "default" not in each:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _refusal(rule: str, text: str) -> RowRefused:
    fix = (
        'Write "tools": [{"type": "function", "function": {"name": "...", "description": "...", '
        '"parameters": {...}}}], or ignore the column with `data.columns.tools=`.'
    )
    return RowRefused(rule, f"{text[0].upper()}{text[1:]}.", fix)


def unify_turns(items: Sequence[object]) -> list[object]:
    """Convert turns with calls, results and reasoning to OpenAI's form.

    Accepted are OpenAI's form (arguments as JSON text or object, the older ``function_call``),
    content blocks of Bedrock's Converse and of Anthropic (``toolUse``, ``tool_use``,
    ``toolResult``, ``reasoningContent``, ``thinking``), tagged text of Hermes (``<tool_call>``,
    ``<tool_response>``), and separate turns of LLaMA-Factory and ShareGPT (``tool_call`` or
    ``function_call``, then ``tool``, ``function`` or ``observation``). A call after an assistant's
    text joins that turn. Other items stay unchanged.

    Calls become :class:`~luthier.types.ToolCall`, with generated ids if missing. A result without
    an id belongs to the next call without a result, with equal function name if the result has a
    name.

    Raises:
        RowRefused: for a call without a name, arguments that are not a JSON object, reasoning that
            is not text, or a result without a call.
    """
    items = [*chain.from_iterable(map(_without_tags, items))]
    # Most conversations have no tools, and stay the same objects.
    if not any(_is_agents(item) for item in items):
        return items
    turns: list[object] = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            turns.append(item)
            continue
        for turn in _split_blocks(dict(item), number):
            _join_turn(turns, _with_calls(turn, number))
    return _link_results(turns)


def take_hermes_tools(turns: list[Any]) -> tuple[list[Any], str | None]:
    """Return turns without the system prompt of Hermes, and the tools in the prompt.

    The chat template of a model writes the tools and how to call a tool.
    """
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    content = first.get("content") if first.get("role") == "system" else None
    found = _HERMES_SYSTEM.match(content) if isinstance(content, str) else None
    return (turns, None) if found is None else (turns[1:], found[1])


def _without_tags(item: object) -> list[object]:
    """Return a turn with the calls and results of Hermes, tagged in the text, as turns of OpenAI's.

    A turn stays text if a tagged call does not parse, or if text follows the calls.
    """
    content = item.get("content") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or not isinstance(content, str):
        return [item]
    if item.get("role") == "tool" and "<tool_response>" in content:
        results = _HERMES_RESULT.findall(content)
        return [{**item, "content": each.strip()} for each in results] or [item]
    if item.get("role") != "assistant" or "<tool_call>" not in content:
        return [item]
    calls = []
    text, _, tagged = content.partition("<tool_call>")
    for each in tagged.split("<tool_call>"):
        call, end, after = each.partition("</tool_call>")
        try:
            value = _parse_call(call)
        except ValueError:
            return [item]
        # Text behind a call would be lost, because a turn has its text before its calls.
        if not end or after.strip() or not isinstance(value, Mapping):
            return [item]
        calls.append({"function": value})
    return [{**item, "content": text.rstrip(), "tool_calls": calls}]


def _parse_call(text: str) -> object:
    with suppress(ValueError):
        return parse_embedded(text)
    return parse_python(text)


def _is_agents(item: object) -> bool:
    """Return whether a turn has tool calls, results or reasoning."""
    if not isinstance(item, Mapping):
        return False
    content = item.get("content")
    return (
        (isinstance(item.get("role"), str) and item["role"] in _TOOL_ROLES)
        or not _TURN_KEYS.isdisjoint(item)
        or (isinstance(content, list) and any(_is_tool_block(block) for block in content))
    )


def _split_blocks(turn: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """A turn of content blocks as turns of OpenAI's: results of tools become turns of their own."""
    blocks = turn.get("content")
    if not isinstance(blocks, list) or not any(_is_tool_block(block) for block in blocks):
        return [turn]
    results: list[dict[str, Any]] = []
    texts: list[object] = []
    for block in blocks:
        if is_cache_point(block):
            continue
        if not _is_tool_block(block):
            texts.append(block)
            continue
        kind = block.get("type")
        if "toolUse" in block or kind == "tool_use":
            use = block.get("toolUse", block)
            use = use if isinstance(use, Mapping) else {}
            function = {"name": use.get("name"), "arguments": use.get("input")}
            call = {"id": use.get("toolUseId", use.get("id")), "function": function}
            calls = turn.get("tool_calls")
            turn["tool_calls"] = [*(calls if isinstance(calls, list) else ()), call]
        elif "toolResult" in block or kind == "tool_result":
            result = block.get("toolResult", block)
            result = result if isinstance(result, Mapping) else {}
            call_id = result.get("toolUseId", result.get("tool_use_id"))
            content = _result_text(result.get("content"))
            results.append({"role": "tool", "tool_call_id": call_id, "content": content})
        else:
            inner = block.get("reasoningContent", block)
            inner = inner.get("reasoningText", inner) if isinstance(inner, Mapping) else {}
            reasoning = (
                inner.get("text", inner.get("thinking")) if isinstance(inner, Mapping) else ""
            )
            _check_thought(reasoning, number)
            turn["reasoning_content"] = f"{turn.get('reasoning_content') or ''}{reasoning or ''}"
    # Converse and Anthropic send results within a user turn. The template needs them as turns
    # before the user's text.
    if texts or turn.get("tool_calls") or not results:
        turn["content"] = texts or ""
        return [*results, turn]
    return results


def is_cache_point(block: object) -> bool:
    """Return whether a content block is Bedrock's mark for prompt caching."""
    return isinstance(block, Mapping) and block.keys() == {"cachePoint"}


def _is_tool_block(block: object) -> bool:
    return isinstance(block, Mapping) and (
        bool(block.keys() & {"toolUse", "toolResult", "reasoningContent"})
        or block.get("type") in ("tool_use", "tool_result", "thinking")
    )


def _result_text(content: object) -> object:
    if isinstance(content, list):
        parts = [
            each["text"]
            if isinstance(each, Mapping) and isinstance(each.get("text"), str)
            else json.dumps(each.get("json", each) if isinstance(each, Mapping) else each)
            for each in content
        ]
        return "\n".join(parts)
    return content


def _with_calls(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a turn with calls in ``tool_calls`` and reasoning in ``reasoning_content``."""
    role, content = turn.get("role"), turn.get("content")
    calls = turn.pop("tool_calls", None) or []
    old = turn.pop("function_call", None)
    if role in _CALL_ROLES:
        calls, turn = [content], {**turn, "role": "assistant", "content": ""}
        try:
            calls = parse_embedded(content) if isinstance(content, str) else calls
        except ValueError as error:
            raise _bad_call(number, f"is not valid JSON: {error}") from None
        calls = calls if isinstance(calls, list) else [calls]
    elif role in _RESULT_ROLES:
        turn["role"] = "tool"
    if not isinstance(calls, list):
        raise _bad_call(number, "must be in an array")
    if old:
        calls = [*calls, old]
    reasoning = turn.pop("reasoning", None) or turn.pop("thinking", None)
    if reasoning and not turn.get("reasoning_content"):
        turn["reasoning_content"] = reasoning
    _check_thought(turn.get("reasoning_content"), number)
    if calls:
        turn["tool_calls"] = [_read_call(each, number) for each in calls]
        turn["content"] = turn.get("content") or ""
    return turn


def _read_call(item: object, number: int) -> ToolCall:
    spec = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or not isinstance(spec, Mapping):
        raise _bad_call(number, "is not an object")
    name, arguments = spec.get("name"), spec.get("arguments", spec.get("parameters"))
    if not isinstance(name, str) or not name.strip():
        raise _bad_call(number, "has no name")
    if isinstance(arguments, str):
        try:
            arguments = parse_embedded(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise _bad_call(number, f'of "{name}" has invalid JSON arguments: {error}') from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise _bad_call(number, f'of "{name}" has arguments that are not an object')
    try:
        # Each value is searched in the rendered turn, so a huge call would take minutes.
        size = sum(1 for _ in islice(leaves(arguments), MOST_ARGUMENTS + 1))
    except RecursionError:
        raise _bad_call(number, f'of "{name}" has arguments nested too deeply') from None
    if size > MOST_ARGUMENTS:
        raise _bad_call(number, f'of "{name}" has more than {MOST_ARGUMENTS:,} names and values')
    return ToolCall(str(item.get("id") or ""), name, arguments)


def _bad_call(number: int, what: str) -> RowRefused:
    return RowRefused(
        "message.tool_calls",
        f"A tool call of message {number} {what}.",
        'Write {"type": "function", "function": {"name": "...", "arguments": "{...}"}}.',
    )


def _check_thought(reasoning: object, number: int) -> None:
    if reasoning is not None and not isinstance(reasoning, str):
        raise RowRefused(
            "field.type",
            f"The reasoning of message {number} must be a string, but is {json_kind(reasoning)}.",
            "Write the reasoning as one string, or remove the row.",
        )


def _join_turn(turns: list[object], turn: dict[str, Any]) -> None:
    last = turns[-1] if turns else None
    joined = ("role", "content", "tool_calls")
    if (
        isinstance(last, dict)
        and last.get("role") == turn.get("role") == "assistant"
        and turn.get("tool_calls")
        and not turn.get("content")
        # Other keys of the call's turn, such as a mark or reasoning, would be lost.
        and all(last.get(key) == turn[key] for key in turn if key not in joined)
    ):
        last["tool_calls"] = [*last.get("tool_calls", ()), *turn["tool_calls"]]
    else:
        turns.append(turn)


def _link_results(turns: list[object]) -> list[object]:
    """Add missing call ids to calls and results.

    A result without an id belongs to the next call, or the next call of the named function.
    """
    waiting: list[ToolCall] = []
    ids: set[str] = set()
    count = 0
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            continue
        if turn.get("tool_calls"):
            calls = []
            for call in turn["tool_calls"]:
                # Nine characters: templates of Mistral refuse other lengths.
                calls.append(call if call.id else replace(call, id=f"call{count:05}"))
                count += 1
            turn["tool_calls"] = calls
            waiting = list(calls)
            ids |= {call.id for call in calls}
        elif (
            turn.get("role") == "tool" and ids
        ):  # without any call, the order check reports the turn
            call_id, name = str(turn.get("tool_call_id") or ""), turn.get("name")
            if call_id and call_id not in ids:
                raise _unmatched_result(number, f"the id {quote(call_id)}")
            if not call_id and isinstance(name, str) and name:
                call_id = next((call.id for call in waiting if call.name == name), "")
                if not call_id:
                    raise _unmatched_result(number, f"the name {quote(name)}")
            elif not call_id and waiting:
                call_id = waiting[0].id
            if call_id:
                turn["tool_call_id"] = call_id
            answered = next((at for at, call in enumerate(waiting) if call.id == call_id), None)
            if answered is not None:
                del waiting[answered]
    return turns


def _unmatched_result(number: int, what: str) -> RowRefused:
    return RowRefused(
        "message.order",
        f"Message {number} is a tool result with {what}, but no call before matches.",
        "Correct the result's id or name, or remove the row.",
    )
