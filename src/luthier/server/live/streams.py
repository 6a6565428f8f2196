"""Streamed responses as the body that the operation without a stream returns."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from botocore.eventstream import EventStreamBuffer

Body = dict[str, Any]
STREAMS = ("text/event-stream", "application/vnd.amazon.eventstream")
"""Content types of streams."""


def response_body(content_type: str, data: bytes) -> Any:
    """Return the body of a response. The pieces of a stream are joined; an image is None."""
    kind = content_type.partition(";")[0]
    if kind == "application/json":
        return json.loads(data)
    if kind == "text/event-stream":
        lines = data.split(b"\n")
        return _join([json.loads(line[6:]) for line in lines if line.startswith(b"data: {")])
    if kind == "application/vnd.amazon.eventstream":
        return _joined_frames(data)
    return None


def _join(events: Sequence[Body]) -> Body:
    """Join the events of the OpenAI API, or the chunks of InvokeModel."""
    if not events:
        return {}
    if str(events[0].get("type", "")).startswith("response."):
        return _joined_response(events)
    if "generation" in events[0]:
        return {**events[-1], "generation": "".join(each["generation"] for each in events)}
    if "choices" not in events[0]:
        return _joined_converse((kind, value) for each in events for kind, value in each.items())
    return joined_chunks(events)


def joined_chunks(events: Sequence[Body]) -> Body:
    """Return the completion of the chunks of a stream."""
    joined: Body = {}
    choices: dict[int, Body] = {}
    for event in events:
        joined |= {name: value for name, value in event.items() if value is not None}
        for part in event.get("choices", ()):
            choice = choices.setdefault(part["index"], {"index": part["index"]})
            choice["finish_reason"] = part["finish_reason"] or choice.get("finish_reason")
            if "delta" in part:
                _add_delta(choice.setdefault("message", {}), part["delta"])
            else:
                choice["text"] = choice.get("text", "") + part["text"]
    joined["choices"] = [choices[index] for index in sorted(choices)]
    joined["object"] = joined["object"].removesuffix(".chunk")
    return joined


def _add_delta(message: Body, delta: Mapping[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            calls = message.setdefault(name, [])
            for call in value:
                if call["index"] == len(calls):
                    calls.append({**call, "function": dict(call["function"])})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        elif name in ("content", "reasoning_content"):
            message[name] = message.get(name, "") + value
        else:
            message[name] = value


def _joined_response(events: Sequence[Body]) -> Body:
    response: Body = [each["response"] for each in events if "response" in each][-1]
    if response["status"] == "in_progress":  # the client disconnected
        text = "".join(
            each["delta"] for each in events if each["type"] == "response.output_text.delta"
        )
        part = {"type": "output_text", "text": text}
        response["output"] = [{"type": "message", "role": "assistant", "content": [part]}]
    return response


def _joined_frames(data: bytes) -> Body:
    buffer = EventStreamBuffer()
    buffer.add_data(data)
    chunks: list[Body] = []
    for frame in buffer:
        kind = frame.headers.get(":event-type") or frame.headers.get(":exception-type")
        value = json.loads(frame.payload)
        if kind == "chunk":
            chunks.append(json.loads(base64.b64decode(value["bytes"])))
        else:
            chunks.append({kind: value})
    return _join(chunks)


def _joined_converse(events: Iterable[tuple[str, Any]]) -> Body:
    blocks: dict[int, Body] = {}
    body: Body = {}
    for kind, value in events:
        if kind == "contentBlockStart":
            blocks[value["contentBlockIndex"]] = {
                "toolUse": {**value["start"]["toolUse"], "input": ""}
            }
        elif kind == "contentBlockDelta":
            ((name, part),) = value["delta"].items()
            block = blocks.setdefault(value["contentBlockIndex"], {})
            if name == "toolUse":
                block[name]["input"] += part["input"]
            elif name == "reasoningContent":
                thought = block.setdefault(name, {"reasoningText": {"text": ""}})
                thought["reasoningText"]["text"] += part["text"]
            else:
                block[name] = block.get(name, "") + part
        elif kind in ("messageStop", "metadata"):
            body |= value
        elif kind != "messageStart" and kind != "contentBlockStop":
            body[kind] = value
    for block in blocks.values():
        if "toolUse" in block:
            with suppress(ValueError):  # the stream broke inside the input
                block["toolUse"]["input"] = json.loads(block["toolUse"]["input"])
    content = [blocks[index] for index in sorted(blocks)]
    return {"output": {"message": {"role": "assistant", "content": content}}, **body}
