"""Tools, calls and results in prompts, and parsing of generated calls.

A template with tool support gets the tools in its own format. Otherwise, the system text lists the
tools in JSON and requests calls in JSON; calls and results become text in the conversation.
Training and serving use the same functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jiter

from luthier.data.conversations.call_formats import read_bodies
from luthier.data.files.parsing import decode_embedded, parse_embedded
from luthier.types import CALL_CLOSE, CALL_OPEN, Message, Tool, ToolCall

LISTED = """You can call these functions, each described in JSON:

{tools}

To call one, answer with nothing but a JSON object with the members "name", the function's name, and \
"arguments", an object that matches its parameters. Where no function helps, answer in words."""


def supports_tools(template: str) -> bool:
    """Return whether a chat template renders tools."""
    return re.search(r"\btools\b", template) is not None


def uses_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
    """Return whether a conversation has tools, calls or results."""
    return bool(tools) or any(turn.calls or turn.role == "tool" for turn in messages)


def find_unmatched_call(messages: Sequence[Message]) -> tuple[int, list[str]] | None:
    """Return the index of the first turn with unanswered calls, and the ids of these calls.

    A result without a call in the turn before is also returned, with its id. ``None`` without
    either.
    """
    pending, waiting = 0, dict[str, None]()
    for index, message in enumerate(messages):
        if message.role != "tool":
            if waiting:
                break
            pending, waiting = index, {call.id: None for call in message.calls}
        elif message.call_id in waiting:
            del waiting[message.call_id]
        else:
            return index, [message.call_id]
    return (pending, list(waiting)) if waiting else None


def describe_tool(tool: Tool) -> dict[str, Any]:
    """Return a tool in the form of OpenAI and transformers."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


def template_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return turns in the form of transformers.

    Calls get new ids, because some templates accept ids of nine characters only, and a model can
    learn to write a number.
    """
    ids: dict[str, str] = {}
    names: dict[str, str] = {}
    turns, count = [], 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.images:
            turn["content"] = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.parts
            ]
        if message.reasoning:
            # Templates read one of both names.
            turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        if message.calls:
            turn["tool_calls"] = []
            for call in message.calls:
                # Some clients reuse ids in each turn, so the last call with an id counts.
                ids[call.id], names[call.id] = f"call{count:05}", call.name
                count += 1
                function = {"name": call.name, "arguments": dict(call.arguments)}
                turn["tool_calls"].append(
                    {"id": ids[call.id], "type": "function", "function": function}
                )
        if message.role == "tool":
            turn["tool_call_id"] = ids.get(message.call_id, "call00000")
            turn["name"] = names.get(message.call_id, "function")
        turns.append(turn)
    return turns


def calls_as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation in words, for templates without a place for tools."""
    names: dict[str, str] = {}
    parts: list[tuple[Message, list[str]]] = []
    for message in messages:
        content, role = message.reply_text, message.role
        names |= {call.id: call.name for call in message.calls}
        if role == "tool":
            name = names.get(message.call_id, "function")
            role, content = "user", f"Result of {name}: {content}"
        if parts and parts[-1][0].role == role == "user":
            # Join results and the next user text, because many templates require alternating roles.
            before, texts = parts[-1]
            parts[-1] = replace(before, images=(*before.images, *message.images)), [*texts, content]
        else:
            turn = Message(role, reasoning=message.reasoning, images=message.images)
            parts.append((turn, [content]))
    turns = [replace(message, content="\n".join(texts)) for message, texts in parts]
    if tools:
        listed = "\n".join(json.dumps(describe_tool(tool)["function"]) for tool in tools)
        text = LISTED.format(tools=listed)
        if turns[0].role == "system":
            text = f"{turns.pop(0).content}\n\n{text}"
        turns.insert(0, Message("system", text))
    return turns


def missing_from(text: str, message: Message) -> str | None:
    """Return the part of a turn that is missing in the rendered ``text``; ``None`` if complete."""
    for name, part in (("content", message.content), ("reasoning", message.reasoning)):
        if not any(form in text for form in _forms(part.strip())):
            return f"its {name}"
    for call in message.calls:
        if call.name not in text:
            return f'the call of "{call.name}"'
        at = 0
        for value in leaves(call.arguments):
            at = _find_end(text, _forms(value), at)
            if at < 0:
                return f'an argument of the call of "{call.name}"'
    return None


def _find_end(text: str, forms: Sequence[str], at: int) -> int:
    """Return the end of one of ``forms`` in ``text``, near ``at`` if possible; -1 if missing.

    Nearly all templates write arguments in order. A search of the whole text for each argument
    would take quadratic time.
    """
    for start, span in ((at, 200), (at, len(text)), (0, len(text))):
        for form in forms:
            start_of_form = text.find(form, start, start + len(form) + span)
            if start_of_form >= 0:
                return start_of_form + len(form)
    return -1


def leaves(value: Any) -> Iterator[Any]:
    """The names and values in the arguments of a call, in their order."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def _forms(value: Any) -> tuple[str, ...]:
    """Return possible notations of a value: raw, JSON, and JSON inside JSON (escaped twice)."""
    if not isinstance(value, str):
        return json.dumps(value), str(value)
    plain = json.dumps(value, ensure_ascii=False)[1:-1]
    return value, plain, json.dumps(value)[1:-1], json.dumps(plain)[1:-1], repr(value)[1:-1]


def parse_calls(
    text: str, tools: Sequence[Tool] = (), declared_only: bool = False
) -> list[ToolCall]:
    """Return the calls of :func:`split_calls`."""
    return split_calls(text, tools, declared_only)[0]


def split_calls(
    text: str, tools: Sequence[Tool] = (), declared_only: bool = False
) -> tuple[list[ToolCall], str]:
    """Return the calls in a generated text, without ids, and the text next to the calls.

    Calls are JSON, or between tags also XML of GLM 4.5 and Qwen3-Coder, with types from the schemas
    of ``tools``, or in a notation of ``luthier.data.conversations.call_formats``. With
    ``declared_only``, functions outside of ``tools`` are not calls. A text with an invalid call has
    no calls.
    """
    parameters = {tool.name: tool.parameters for tool in tools}
    try:
        bodies, rest = [parse_embedded(text)], ""
    except ValueError:
        bodies, rest = _marked_bodies(text, parameters)
    calls = _calls_in(bodies, parameters if declared_only else None)
    return calls, rest if calls else text


def split_cut_calls(text: str, tools: Sequence[Tool]) -> tuple[list[ToolCall], str, bool]:
    """Return the complete calls of a text that the token limit truncated, the text next to the
    calls, and whether a call is cut.

    A text without complete or cut calls is plain text.
    """
    parameters = {tool.name: tool.parameters for tool in tools}
    bodies, cut_off = _cut_bodies(text, parameters)
    rest = ""
    if not (bodies or cut_off):
        bodies, rest = _marked_bodies(text, parameters, cut=True)
        if bodies and bodies[-1] is None:
            bodies.pop()
            cut_off = True
    calls = _calls_in(bodies, parameters)
    if calls or (cut_off and not bodies):
        return calls, rest, cut_off
    return [], text, False


def _marked_bodies(
    text: str, parameters: Mapping[str, Mapping[str, Any]], cut: bool = False
) -> tuple[list[Any], str]:
    if CALL_OPEN in text:
        return _tagged_bodies(text, parameters, cut)
    return read_bodies(text)


def _cut_bodies(text: str, names: Iterable[str]) -> tuple[list[Any], bool]:
    """Return the complete JSON objects of a truncated text, and whether an object is cut.

    Returns nothing if the remaining text cannot start another call.
    """
    bodies: list[Any] = []
    at = _skip_white_space(text, 0)
    listed = text.startswith("[", at)
    at += listed
    try:
        while True:
            body, end = decode_embedded(text, at)
            bodies.append(body)
            at = _skip_white_space(text, end)
            if not (listed and text.startswith(",", at)):
                break
            at += 1
    except ValueError:
        pass  # end of the text, or a cut object
    rest = text[at:].strip()
    if rest == ("]" if listed else ""):
        return bodies, False
    may_follow = _may_begin_call(rest, names) if rest else bool(bodies)
    return (bodies, True) if may_follow else ([], False)


_CALL_KEYS = ("name", "arguments", "parameters", "id", "type")
_FIRST_KEY = re.compile(r'\{\s*(?:"(\w*)"?\s*:?\s*)?')


def _may_begin_call(text: str, names: Iterable[str]) -> bool:
    """Return whether ``text`` is a prefix of a JSON object that calls one of ``names``."""
    if matched := _FIRST_KEY.fullmatch(text):
        return any(key.startswith(matched[1] or "") for key in _CALL_KEYS)
    try:
        partial = jiter.from_json(text.encode(), partial_mode="trailing-strings")
    except ValueError:
        return False
    if not isinstance(partial, dict) or not partial.keys() <= {*_CALL_KEYS}:
        return False
    name = partial.get("name", "")
    return isinstance(name, str) and any(each.startswith(name) for each in names)


def _calls_in(bodies: Sequence[Any], allowed: Container[str] | None) -> list[ToolCall]:
    """Return the calls of parsed ``bodies``; empty if any body is not a call or not ``allowed``."""
    calls: list[ToolCall] = []
    for parsed in bodies:
        for each in parsed if isinstance(parsed, list) else [parsed]:
            call = _call_in(each)
            if call is None or (allowed is not None and call.name not in allowed):
                return []
            calls.append(call)
    return calls


def _tagged_bodies(
    text: str, parameters: Mapping[str, Mapping[str, Any]], cut: bool
) -> tuple[list[Any], str]:
    """Return the parsed body after each opening tag, and the text outside of the tags.

    The last item is ``None`` for an invalid body. A JSON body ends by its own syntax, because its
    strings may contain the tags. An XML body ends at the closing tag, which is required for ``cut``
    text.
    """
    bodies: list[Any] = []
    at = text.find(CALL_OPEN)
    rest = text[:at]
    while at >= 0:
        start = _skip_white_space(text, at + len(CALL_OPEN))
        try:
            body, at = decode_embedded(text, start)
            at = _skip_white_space(text, at)
            closed = CALL_CLOSE if text.startswith(CALL_CLOSE, at) else ""
            if at < len(text) and not closed and not text.startswith(CALL_OPEN, at):
                body = None
        except ValueError:
            end = text.find(CALL_OPEN, start)
            part, closed, _ = text[start : end if end >= 0 else len(text)].partition(CALL_CLOSE)
            body = _read_xml(part.strip(), parameters) if closed or not cut else None
            at = start + len(part)
        bodies.append(body)
        if body is None:
            break
        at += len(closed)
        following = text.find(CALL_OPEN, at)
        rest += text[at : following if following >= 0 else len(text)]
        at = following
    return bodies, rest


def _skip_white_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _call_in(parsed: Any) -> ToolCall | None:
    if not isinstance(parsed, dict):
        return None
    name, arguments = parsed.get("name"), parsed.get("arguments", parsed.get("parameters"))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall("", name, arguments)


def _read_xml(body: str, parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Parse a call in the XML of GLM 4.5 or Qwen3-Coder; ``None`` for other text.

    String splitting instead of a pattern: the time of a pattern could be quadratic in the length of
    generated text.
    """
    in_lines = body.startswith("<function=") and body.endswith("</function>")
    if in_lines:
        name, *parts = body[len("<function=") : -len("</function>")].split("<parameter=")
        middle, opening, closing = ">", "", "</parameter>"
        name = name.strip().removesuffix(">")
    else:
        name, *parts = body.split("<arg_key>")
        middle, opening, closing = "</arg_key>", "<arg_value>", "</arg_value>"
    name = name.strip()
    if not re.fullmatch(r"[\w.-]+", name):
        return None
    properties = parameters.get(name, {}).get("properties")
    arguments = {}
    for part in parts:
        key, separator, value = part.rstrip().partition(middle)
        value = value.lstrip() if opening else value
        if not separator or not value.startswith(opening) or not value.endswith(closing):
            return None
        value = value[len(opening) : -len(closing)]
        if in_lines:  # Qwen3-Coder writes each value on separate lines
            value = value.removeprefix("\n").removesuffix("\n")
        schema = properties.get(key.strip()) if isinstance(properties, Mapping) else None
        arguments[key.strip()] = _read_value(value, schema)
    return {"name": name, "arguments": arguments}


def _read_value(text: str, schema: Any) -> Any:
    """Parse an argument by its schema: JSON, unless the schema requires a string."""
    kinds = _types_in(schema)
    if "null" in kinds and text in ("null", "None"):
        return None
    if "string" in kinds:
        return text
    try:
        return parse_embedded(text)
    except ValueError:
        # Qwen3-Coder writes Python literals, like Jinja.
        return {"True": True, "False": False, "None": None}.get(text, text)


def _types_in(schema: Any) -> list[Any]:
    """Return all types that a schema allows; empty if the schema has none."""
    if not isinstance(schema, Mapping):
        return []
    several = [schema.get(name) for name in ("anyOf", "oneOf")]
    types: list[Any] = []
    for each in (schema, *(each for some in several if isinstance(some, list) for each in some)):
        if isinstance(each, Mapping):
            kind, values = each.get("type"), each.get("enum")
            types += kind if isinstance(kind, list) else [kind]
            if isinstance(values, list) and any(isinstance(value, str) for value in values):
                types.append("string")
    return types
