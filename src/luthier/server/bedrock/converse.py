"""Converse and ConverseStream: conversion of conversations and replies.

Botocore's service model validates the structure of requests (``luthier.server.bedrock.shapes``).
This module validates the rules that no shape expresses: the order of turns and unsupported content.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field

from luthier.data.conversations.template_kwargs import TemplateSettings
from luthier.data.conversations.tools import find_unmatched_call
from luthier.data.inputs import Media
from luthier.inference.inference import (
    Chat,
    GenerationRequest,
    GenerationResult,
    ReasoningChunk,
    Stream,
    TokenChunk,
    ToolCallEvent,
)
from luthier.models.decoding.sampling import Constraint
from luthier.server.bedrock.bodies import NativeBody, parse_native
from luthier.server.bedrock.eventstream import event
from luthier.server.http.media import read_media
from luthier.server.http.messages import Fault
from luthier.server.sampling_fields import StructuredOutputs, sampling_of, with_sampling
from luthier.types import IMAGE_MARK, Message, Tool, ToolCall

TEMPERATURE, TOP_P = 0.5, 0.9
"""Defaults of temperature and top-p, equal to Llama's on Bedrock."""
STOP_REASONS: Mapping[str, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_calls": "tool_use",
    "context": "model_context_window_exceeded",
}
_FRAGMENT = 64
"""Characters of a tool call's arguments per event."""


@with_sampling
class AdditionalFields(NativeBody):
    """Fields of ``additionalModelRequestFields``, which only some models support."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    chat_template_kwargs: TemplateSettings | None = None
    structured_outputs: StructuredOutputs | None = None


def generation_request(members: Mapping[str, Any]) -> GenerationRequest:
    """Return the generation request for ``members``, the validated members of Converse.

    Raises:
        Fault: Validation.
    """
    # Ignored, a guardrail would be a promise that the reply does not keep.
    if "guardrailConfig" in members:
        raise Fault("Validation", "guardrailConfig is not supported by this server.")
    if members.get("promptVariables"):
        raise Fault("Validation", "promptVariables are not supported by this server.")
    config = members.get("inferenceConfig", {})
    text_format = members.get("outputConfig", {}).get("textFormat")
    name = "additionalModelRequestFields"
    fields = _object(members.get(name, {}), name)
    additional = parse_native(AdditionalFields, fields)
    constraint = additional.structured_outputs.constraint if additional.structured_outputs else None
    if text_format:
        if constraint is not None:
            text = "Send either outputConfig.textFormat or structured_outputs, not both."
            raise Fault("Validation", text)
        schema = _parse_schema(text_format["structure"]["jsonSchema"]["schema"])
        constraint = Constraint("schema", schema)
    return GenerationRequest(
        replace(parse_chat(members), template_kwargs=additional.chat_template_kwargs or {}),
        max_tokens=config.get("maxTokens"),
        temperature=config.get("temperature", TEMPERATURE),
        top_p=config.get("topP", TOP_P),
        stop=tuple(config.get("stopSequences", ())),
        **(constraint.fields if constraint else {}),
        seed=additional.seed,
        **sampling_of(additional),
    )


def parse_chat(members: Mapping[str, Any]) -> Chat:
    """Return the conversation of ``messages``, ``system`` and ``toolConfig``.

    Raises:
        Fault: Validation for a wrong order of turns, roles or tool calls.
    """
    messages = members.get("messages")
    if not messages:
        raise Fault(
            "Validation",
            "1 validation error detected: Value at 'messages' failed to satisfy constraint: Member "
            "must have length greater than or equal to 1",
        )
    _check_order(messages)
    system = [_block_text(block) for block in members.get("system", ())]
    text = "\n".join(each for each in system if each is not None)
    turns = [Message("system", text)] if text else []
    for index, message in enumerate(messages):
        turns += _turns(message, f"messages.{index}")
    _check_calls(turns, "toolConfig" in members)
    tools, choice = _tools(members["toolConfig"]) if "toolConfig" in members else ((), "auto")
    return Chat(tuple(turns), tools, choice)


def _block_text(block: Mapping[str, Any]) -> str | None:
    """Return the text of a block, or ``None`` for a cache point. Other blocks are not supported."""
    ((name, value),) = block.items()
    if name == "guardContent":
        ((name, value),) = value.items()
        value = value["text"] if name == "text" else value
    if name not in ("text", "cachePoint"):
        raise _unsupported_field(name)
    return value if name == "text" else None


def _tools(config: Mapping[str, Any]) -> tuple[tuple[Tool, ...], str]:
    """Return the tools and the tool choice in the engine's form."""
    tools = []
    for index, item in enumerate(config["tools"]):
        ((name, spec),) = item.items()
        if name == "toolSpec":
            ((_, schema),) = spec["inputSchema"].items()
            schema = _object(schema, f"toolConfig.tools.{index}.toolSpec.inputSchema.json")
            tools.append(Tool(spec["name"], spec.get("description", ""), schema))
        elif name != "cachePoint":
            raise _unsupported_field(name)
    names = [tool.name for tool in tools]
    if twice := {name for name, count in Counter(names).items() if count > 1}:
        raise Fault("Validation", f"The tool {min(twice)} is defined more than once.")
    ((kind, value),) = config.get("toolChoice", {"auto": {}}).items()
    if kind != "tool":
        return tuple(tools), {"auto": "auto", "any": "required"}[kind]
    if value["name"] not in names:
        text = f"The tool {value['name']} of toolChoice is missing in toolConfig.tools."
        raise Fault("Validation", text)
    return tuple(tools), f"name:{value['name']}"


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles:
        raise Fault("Validation", "This model doesn't support messages of the role system.")
    if roles[0] != "user":
        raise Fault(
            "Validation",
            "A conversation must start with a user message. Try again with a conversation that "
            "starts with a user message.",
        )
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


def _turns(message: Mapping[str, Any], at: str) -> list[Message]:
    """Return a message as turns. Tool results precede the text of the same message."""
    role = message["role"]
    # Cache points have no effect: the prefix cache is automatic.
    if all("cachePoint" in block for block in message["content"]):
        raise Fault(
            "Validation",
            f"The content field in the Message object at {at} is empty. Add a ContentBlock object "
            "to the content field and try again.",
        )
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    images: list[Media] = []
    for index, block in enumerate(message["content"]):
        location = f"{at}.content.{index}"
        ((name, value),) = block.items()
        if name == "toolUse" and role == "assistant":
            arguments = _object(value["input"], f"{location}.toolUse.input")
            calls.append(ToolCall(value["toolUseId"], value["name"], arguments))
        elif name == "toolResult" and role == "user":
            parts = [_result(part) for part in value["content"]]
            results.append(Message("tool", "\n".join(parts), call_id=value["toolUseId"]))
        elif name == "reasoningContent" and role == "assistant":
            ((kind, thought),) = value.items()
            if kind != "reasoningText":  # encrypted by another service
                raise _unsupported_field(kind)
            thoughts.append(thought["text"])
        elif name in ("toolUse", "toolResult", "reasoningContent"):
            text = f"The {role} role cannot have the {name} block at {location}."
            raise Fault("Validation", text)
        elif name == "image" and role == "user":
            ((kind, source),) = value["source"].items()
            if kind != "bytes":
                raise _unsupported_field(kind)
            images.append(read_media(source, "image", location))
            texts.append(IMAGE_MARK)
        elif (block_text := _block_text(block)) is not None:
            texts.append(_text(block_text, location))
    # A message of results alone adds no user turn: an empty turn would be a question without text.
    if texts or calls or not results:
        reasoning = "\n".join(thoughts)
        turn = Message(role, "\n".join(texts), calls=tuple(calls), reasoning=reasoning)
        if images:  # without lines between: the template decides about white space around images
            turn = replace(turn, content="".join(texts), images=tuple(images))
            if turn.content.count(IMAGE_MARK) != len(images):
                text = f"The text at {at} contains U+FFFC. Remove the character."
                raise Fault("Validation", text)
        results.append(turn)
    return results


def _result(part: Mapping[str, Any]) -> str:
    """Return a part of a tool result as text."""
    ((name, value),) = part.items()
    if name not in ("text", "json"):
        raise _unsupported_field(name)
    return value if name == "text" else json.dumps(value, ensure_ascii=False)


def _object(value: Any, at: str) -> dict[str, Any]:
    """Return ``value`` if it is an object: the service model allows any JSON."""
    if not isinstance(value, dict):
        raise Fault("Validation", f"'{at}' must be a JSON object.")
    return value


def _text(text: str, at: str) -> str:
    if not text.strip():
        raise Fault(
            "Validation",
            f"The text field in the ContentBlock object at {at} is blank. Add text to the text "
            "field, and try again.",
        )
    return text


def _check_calls(turns: Sequence[Message], tools: bool) -> None:
    """Check that the next turn answers each tool call and nothing else."""
    # AWS refuses this, too: the template would not declare the tools that the turns name.
    if not tools and any(turn.calls or turn.role == "tool" for turn in turns):
        raise Fault(
            "Validation",
            "The toolConfig field must be defined when using toolUse and toolResult content blocks.",
        )
    if (unmatched := find_unmatched_call(turns)) is None:
        return
    index, ids = unmatched
    if turns[index].role == "tool":
        text = f"The toolResult block {ids[0]} has no toolUse block in the previous turn."
        raise Fault("Validation", text)
    text = f"Expected toolResult blocks for the following Ids: {', '.join(sorted(ids))}"
    raise Fault("Validation", text)


def _unsupported_field(name: str) -> Fault:
    return Fault(
        "Validation",
        f"This model doesn't support the {name} field. Remove {name} and try again.",
    )


def _parse_schema(text: str) -> Mapping[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    return _object(schema, "outputConfig.textFormat.structure.jsonSchema.schema")


def usage(input_tokens: int, output_tokens: int) -> dict[str, int]:
    """Return token counts in Converse's form."""
    return {
        "inputTokens": input_tokens,
        "outputTokens": output_tokens,
        "totalTokens": input_tokens + output_tokens,
    }


def render_message(reply: GenerationResult) -> dict[str, Any]:
    """Return a reply as a message."""
    content: list[dict[str, Any]] = []
    if reply.reasoning:
        content.append({"reasoningContent": {"reasoningText": {"text": reply.reasoning}}})
    if reply.text:
        content.append({"text": reply.text})
    content += [{"toolUse": {**_use(call), "input": dict(call.arguments)}} for call in reply.calls]
    # Clients read the first block without a check.
    return {"role": "assistant", "content": content or [{"text": ""}]}


def render_reply(
    stream: Stream, reply: GenerationResult, paths: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the members of a complete reply, shared by Converse and Amazon's form of InvokeModel.

    ``paths`` are the ``additionalModelResponseFieldPaths`` of the request.
    """
    return {
        "output": {"message": render_message(reply)},
        "stopReason": STOP_REASONS[reply.reason],
        "usage": usage(stream.prompt_tokens, reply.tokens),
        **_additional_fields(paths, reply),
    }


def _additional_fields(paths: Sequence[str], reply: GenerationResult) -> dict[str, Any]:
    """Return ``additionalModelResponseFields``, if a path names a field of this server."""
    fields = {"/generation": reply.text, "/stop_sequence": reply.stop}
    chosen = {path[1:]: fields[path] for path in paths if path in fields}
    return {"additionalModelResponseFields": chosen} if chosen else {}


def encode_events(
    stream: Stream, latency: Callable[[], int], paths: Sequence[str] = ()
) -> Iterator[bytes]:
    """Yield the encoded events of ConverseStream. ``latency()`` returns milliseconds."""
    for kind, value in named_events(stream, paths):
        if kind == "metadata":
            value = {**value, "metrics": {"latencyMs": latency()}}
        yield event(kind, value)


def named_events(stream: Stream, paths: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a reply by name, without latency."""
    reply, index = GenerationResult(), 0
    open_block: type[TokenChunk | ReasoningChunk] | None = None
    yield "messageStart", {"role": "assistant"}
    for each in stream:
        reply.add(each)
        if open_block is not None and not isinstance(each, open_block):
            yield "contentBlockStop", {"contentBlockIndex": index}
            index, open_block = index + 1, None
        if isinstance(each, TokenChunk | ReasoningChunk):
            if each.text:
                open_block, text = type(each), {"text": each.text}
                delta = text if open_block is TokenChunk else {"reasoningContent": text}
                yield "contentBlockDelta", {"delta": delta, "contentBlockIndex": index}
        elif isinstance(each, ToolCallEvent):
            yield from _call_events(each.call, index)
            index += 1
        elif not index:  # an empty reply
            yield "contentBlockDelta", {"delta": {"text": ""}, "contentBlockIndex": index}
            yield "contentBlockStop", {"contentBlockIndex": index}
    stop_reason = STOP_REASONS[reply.reason]
    yield "messageStop", {"stopReason": stop_reason, **_additional_fields(paths, reply)}
    yield "metadata", {"usage": usage(stream.prompt_tokens, reply.tokens)}


def _call_events(call: ToolCall, index: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "contentBlockStart", {"start": {"toolUse": _use(call)}, "contentBlockIndex": index}
    text = call.arguments_json
    for first in range(0, len(text), _FRAGMENT):
        delta = {"toolUse": {"input": text[first : first + _FRAGMENT]}}
        yield "contentBlockDelta", {"delta": delta, "contentBlockIndex": index}
    yield "contentBlockStop", {"contentBlockIndex": index}


def _use(call: ToolCall) -> dict[str, str]:
    return {"toolUseId": call.id, "name": call.name}
