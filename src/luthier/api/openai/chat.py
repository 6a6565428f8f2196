"""``/chat/completions``."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from luthier.api.openai.asking import (
    FINISH,
    Asker,
    chat_logprobs,
    events_of,
    refusals,
    usage,
)
from luthier.api.openai.conversations import ChatRequest
from luthier.api.openai.requests import body, checked
from luthier.api.openai.routing import Operation
from luthier.api.wire import Answer, Call, Caller
from luthier.serving.inference import Called, End, Event, Piece, Request, Stream, Whole
from luthier.types import ToolCall

ACTION = "chat.completions.create"


class Chats:
    """The resource."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker

    def operations(self) -> Iterable[Operation]:
        """What can be done."""
        return (Operation("POST", "chat/completions", ACTION, self.create, long=True),)

    def create(self, call: Call) -> Answer:
        """Continue a conversation, at once or as it is written."""
        asked = body(call, ChatRequest)
        stream = self._begin(call.caller, asked)
        if asked.stream:
            return events_of(_Chunks(asked).of(stream, stream.prompt_tokens), [stream], asked.model)
        return Answer.of(_completion(asked, stream))

    def answer(self, caller: Caller, given: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a body that came another way; never a stream."""
        asked = checked({**given, "stream": False}, ChatRequest)
        return _completion(asked, self._begin(caller, asked))

    def _begin(self, caller: Caller, asked: ChatRequest) -> Stream:
        target = self.asker.target(caller, ACTION, asked.model)
        asked.check()
        return self.asker.submit(target, asked.model, asked.built)


class InvokedChat:
    """A body of chat completions that came through Bedrock's InvokeModel, which names the model."""

    def __init__(self, model_id: str, given: Mapping[str, Any]) -> None:
        """Check ``given``; :class:`Fault` for what is wrong in it."""
        self._asked = checked({**given, "model": model_id, "stream": False}, ChatRequest)
        self._asked.check()

    def request(self) -> Request:
        """The request for the engine."""
        return self._asked.built()

    def answer(self, stream: Stream) -> tuple[dict[str, Any], int]:
        """The whole completion, and how many tokens were written."""
        found = _completion(self._asked, stream)
        return found, found["usage"]["completion_tokens"]

    def chunks(self, stream: Stream) -> Iterator[tuple[dict[str, Any], int]]:
        """Its chunks, each with the tokens that are known to be written."""
        ended = [0]
        for chunk in _Chunks(self._asked).of(_counting(stream, ended), stream.prompt_tokens):
            yield dict(chunk), ended[0]


def _counting(stream: Stream, ended: list[int]) -> Iterator[Event]:
    """The events of ``stream``; the tokens of answers that have ended are added up in ``ended``."""
    for each in stream:
        if isinstance(each, End):
            ended[0] += each.tokens
        yield each


def _completion(asked: ChatRequest, stream: Stream) -> dict[str, Any]:
    with refusals(asked.model):
        answers = stream.whole()
    tokens = sum(each.tokens for each in answers)
    return {
        **_head("chat.completion", asked.model),
        "choices": [_choice(index, each, asked) for index, each in enumerate(answers)],
        "usage": usage(stream.prompt_tokens, tokens),
    }


def _choice(index: int, answer: Whole, asked: ChatRequest) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text if answer.text or not answer.calls else None,
        "refusal": None,
        "annotations": [],
    }
    if answer.calls:
        message["tool_calls"] = [_call(each) for each in answer.calls]
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(answer.scores) if asked.logprobs else None,
        "finish_reason": FINISH.get(answer.reason, "stop"),
    }


def _head(kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call_id(call), "type": "function", "function": function}


def call_id(call: ToolCall) -> str:
    """The id of a call, as this API begins them."""
    return "call_" + call.id.removeprefix("tooluse_")


class _Chunks:
    """An answer as chunks."""

    def __init__(self, asked: ChatRequest) -> None:
        self._asked = asked
        self._head = _head("chat.completion.chunk", asked.model)
        self._calls: dict[int, int] = {}

    def of(self, stream: Iterable[Event], prompt_tokens: int = 0) -> Iterator[Mapping[str, Any]]:
        """All chunks of all answers, each answer's in its order."""
        written = 0
        for index in range(self._asked.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        for event in stream:
            if isinstance(event, Piece):
                scores = chat_logprobs(event.scores) if self._asked.logprobs else None
                yield self._chunk(event.index, {"content": event.text}, scores)
            elif isinstance(event, Called):
                yield from self._called(event)
            elif isinstance(event, End):
                written += event.tokens
                reason = FINISH.get(event.reason, "stop")
                yield self._chunk(event.index, {}, finish=reason)
        if self._asked.wants_usage:
            yield {**self._head, "choices": [], "usage": usage(prompt_tokens, written)}

    def _called(self, event: Called) -> Iterator[Mapping[str, Any]]:
        """A call: its name first, then its arguments."""
        number = self._calls.get(event.index, 0)
        self._calls[event.index] = number + 1
        whole = _call(event.call)
        arguments = whole["function"]["arguments"]
        begun = {**whole, "index": number, "function": {"name": event.call.name, "arguments": ""}}
        yield self._chunk(event.index, {"tool_calls": [begun]})
        rest = {"index": number, "function": {"arguments": arguments}}
        yield self._chunk(event.index, {"tool_calls": [rest]})

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        scores: Mapping[str, Any] | None = None,
        finish: str | None = None,
    ) -> Mapping[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        further = {"usage": None} if self._asked.wants_usage else {}
        return {**self._head, "choices": [choice], **further}
