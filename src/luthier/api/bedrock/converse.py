"""Converse and ConverseStream: what they take, and what they answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.api.bedrock.bodies import Body, NativeBody, parsed_native
from luthier.api.bedrock.conversations import Conversation, schema_of
from luthier.api.bedrock.eventstream import event
from luthier.api.wire import Fault
from luthier.serving.inference import (
    MOST_PENALTY,
    MOST_TOKENS,
    Called,
    End,
    Piece,
    Request,
    Stream,
    Whole,
)
from luthier.types import ToolCall

TEMPERATURE, TOP_P = 0.5, 0.9
"""Where a request names none: what Llama has on Bedrock."""
STOP_REASONS: Mapping[str, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_calls": "tool_use",
    "context": "model_context_window_exceeded",
}
_FRAGMENT = 64
"""Characters of a call's arguments in one event."""


class InferenceConfig(Body):
    """How the answer is drawn."""

    maxTokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    topP: Annotated[float, Field(ge=0, le=1)] | None = None
    stopSequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=2500)] = (
        Field(default_factory=list)
    )


class Further(NativeBody):
    """Members that only some models have: ``additionalModelRequestFields``."""

    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MOST_PENALTY)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class JsonSchemaDefinition(Body):
    """A schema that the answer matches."""

    schema_: str = Field(alias="schema")
    name: str | None = None
    description: str | None = None


class Structure(Body):
    """Where the schema stands."""

    jsonSchema: JsonSchemaDefinition


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    structure: Structure


class OutputConfig(Body):
    """The form of the answer."""

    textFormat: TextFormat | None = None


class PerformanceConfig(Body):
    """Latency that is wished for."""

    latency: Literal["standard", "optimized"] = "standard"


class ServiceTier(Body):
    """Priority that is wished for; all are treated alike."""

    type: Literal["priority", "default", "flex", "reserved"]


Metadata = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=256)], Annotated[str, Field(max_length=256)]
    ],
    Field(min_length=1, max_length=16),
]
Pointer = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^/")]


class ConverseBody(Conversation):
    """The body of both operations."""

    inferenceConfig: InferenceConfig = Field(default_factory=InferenceConfig)
    additionalModelRequestFields: dict[str, Any] = Field(default_factory=dict)
    additionalModelResponseFieldPaths: Annotated[list[Pointer], Field(max_length=10)] = Field(
        default_factory=list
    )
    outputConfig: OutputConfig = Field(default_factory=OutputConfig)
    guardrailConfig: dict[str, Any] | None = None
    promptVariables: dict[str, Any] | None = None
    requestMetadata: Metadata | None = None
    performanceConfig: PerformanceConfig | None = None
    serviceTier: ServiceTier | None = None

    def request(self) -> Request:
        """The request for the engine.

        Raises:
            Fault: Validation.
        """
        if self.guardrailConfig is not None:
            raise Fault("Validation", "guardrailConfig is not supported by this server.")
        if self.promptVariables:
            raise Fault("Validation", "promptVariables are for prompts of Prompt management only.")
        config, form = self.inferenceConfig, self.outputConfig.textFormat
        further = parsed_native(Further, self.additionalModelRequestFields)
        return Request(
            self.chat(),
            max_tokens=config.maxTokens,
            temperature=TEMPERATURE if config.temperature is None else config.temperature,
            top_p=TOP_P if config.topP is None else config.topP,
            stop=tuple(config.stopSequences),
            schema=schema_of(form.structure.jsonSchema.schema_) if form else None,
            **further.model_dump(exclude_none=True),
        )


def usage(read: int, written: int) -> dict[str, int]:
    """Tokens, as Converse counts them."""
    return {"inputTokens": read, "outputTokens": written, "totalTokens": read + written}


def message_of(answer: Whole) -> dict[str, Any]:
    """An answer as a message."""
    content: list[dict[str, Any]] = [{"text": answer.text}] if answer.text else []
    content += [{"toolUse": {**_use(call), "input": dict(call.arguments)}} for call in answer.calls]
    return {"role": "assistant", "content": content or [{"text": ""}]}


def answer_of(body: ConverseBody, stream: Stream, latency: Callable[[], int]) -> dict[str, Any]:
    """The answer of Converse, once it is whole; ``latency()`` gives milliseconds."""
    (answer,) = stream.whole()
    found = {
        "output": {"message": message_of(answer)},
        "stopReason": STOP_REASONS[answer.reason],
        "usage": usage(stream.prompt_tokens, answer.tokens),
        "metrics": {"latencyMs": latency()},
    }
    fields = _pointed(body.additionalModelResponseFieldPaths, stream, answer)
    return {**found, "additionalModelResponseFields": fields} if fields else found


def events_of(body: ConverseBody, stream: Stream, latency: Callable[[], int]) -> Iterator[bytes]:
    """The events of ConverseStream on the wire."""
    for kind, value in named_events(body.additionalModelResponseFieldPaths, stream):
        if kind == "metadata":
            value = {**value, "metrics": {"latencyMs": latency()}}
        yield event(kind, value)


def named_events(paths: list[str], stream: Stream) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of an answer, without the time it took; ``paths`` as the request has them."""
    answer, index, opened = Whole(), 0, False
    yield "messageStart", {"role": "assistant"}
    for each in stream:
        answer.take(each)
        if isinstance(each, Piece) and each.text:
            opened = True
            yield "contentBlockDelta", {"delta": {"text": each.text}, "contentBlockIndex": index}
        elif isinstance(each, Called):
            if opened:
                yield "contentBlockStop", {"contentBlockIndex": index}
                index, opened = index + 1, False
            yield from _call_events(each.call, index)
            index += 1
        elif isinstance(each, End):
            if not opened and not answer.calls:
                opened = True
                yield "contentBlockDelta", {"delta": {"text": ""}, "contentBlockIndex": index}
            if opened:
                yield "contentBlockStop", {"contentBlockIndex": index}
    stop: dict[str, Any] = {"stopReason": STOP_REASONS[answer.reason]}
    fields = _pointed(paths, stream, answer)
    if fields:
        stop["additionalModelResponseFields"] = fields
    yield "messageStop", stop
    yield "metadata", {"usage": usage(stream.prompt_tokens, answer.tokens)}


def _call_events(call: ToolCall, index: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "contentBlockStart", {"start": {"toolUse": _use(call)}, "contentBlockIndex": index}
    text = json.dumps(dict(call.arguments), ensure_ascii=False)
    for first in range(0, len(text), _FRAGMENT):
        delta = {"toolUse": {"input": text[first : first + _FRAGMENT]}}
        yield "contentBlockDelta", {"delta": delta, "contentBlockIndex": index}
    yield "contentBlockStop", {"contentBlockIndex": index}


def _use(call: ToolCall) -> dict[str, str]:
    return {"toolUseId": call.id, "name": call.name}


def _pointed(paths: list[str], stream: Stream, answer: Whole) -> dict[str, Any]:
    """The members of the model's own answer that were asked for; unknown ones are left out."""
    native = {
        "generation": answer.text,
        "prompt_token_count": stream.prompt_tokens,
        "generation_token_count": answer.tokens,
        "stop_reason": "length" if answer.reason in ("length", "context") else "stop",
        "stop_sequence": answer.stop,
    }
    names = [path.removeprefix("/") for path in paths]
    return {name: native[name] for name in names if name in native}
