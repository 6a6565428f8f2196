"""``/responses``: an answer as items, at once or as events. Nothing of it is kept."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from luthier.api.openai.asking import Asker, Streamed, chat_logprobs, refusals
from luthier.api.openai.chat import call_id
from luthier.api.openai.errors import error_of
from luthier.api.openai.requests import body, checked
from luthier.api.openai.response_requests import NamedFunction, ResponseRequest
from luthier.api.openai.routing import Operation
from luthier.api.wire import Answer, Call, Caller, Fault
from luthier.serving.inference import Called, End, Event, Piece, Stream
from luthier.types import ToolCall

ACTION = "responses.create"
Told = dict[str, Any]


class Responses:
    """The resource."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker

    def operations(self) -> Iterable[Operation]:
        """What can be done."""
        return (Operation("POST", "responses", ACTION, self.create, long=True),)

    def create(self, call: Call) -> Answer:
        """Answer, at once or as it is written."""
        asked = body(call, ResponseRequest)
        stream = self._begin(call.caller, asked)
        if not asked.stream:
            return Answer.of(_whole(asked, stream))
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        return Answer(200, Streamed(_pieces(asked, stream), [stream]), headers)

    def answer(self, caller: Caller, given: Mapping[str, Any]) -> Told:
        """The answer to a body that came another way; never a stream."""
        asked = checked({**given, "stream": False}, ResponseRequest)
        return _whole(asked, self._begin(caller, asked))

    def _begin(self, caller: Caller, asked: ResponseRequest) -> Stream:
        target = self.asker.target(caller, ACTION, asked.model)
        asked.check()
        return self.asker.submit(target, asked.model, asked.built, "input")


def _whole(asked: ResponseRequest, stream: Stream) -> Told:
    response = _Response(asked, stream.prompt_tokens)
    with refusals(asked.model, "input"):
        for _ in response.events(stream):
            pass
    return response.told()


def _pieces(asked: ResponseRequest, stream: Stream) -> Iterator[bytes]:
    """The events as they are sent; a failure is the last one."""
    response = _Response(asked, stream.prompt_tokens)
    try:
        try:
            with refusals(asked.model, "input"):
                for told in response.events(stream):
                    yield _sent(told)
        except Fault as fault:
            yield _sent(response.failed(fault))
    finally:
        stream.close()


def _sent(told: Mapping[str, Any]) -> bytes:
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    return f"event: {told['type']}\ndata: {text}\n\n".encode()


class _Response:
    """One response: what is known of it so far, and the events that tell how it comes about."""

    def __init__(self, asked: ResponseRequest, prompt_tokens: int) -> None:
        self._asked, self._prompt_tokens = asked, prompt_tokens
        self._id, self._created = f"resp_{secrets.token_hex(24)}", int(time.time())
        self._status, self._number = "in_progress", 0
        self._end: End | None = None
        self._error: Told | None = None
        self._items: list[Told] = []

    def events(self, stream: Iterable[Event]) -> Iterator[Told]:
        """Every event, in the order of the specification."""
        yield self._event("response.created", response=self.told())
        yield self._event("response.in_progress", response=self.told())
        for event in stream:
            if isinstance(event, Piece):
                yield from self._piece(event)
            elif isinstance(event, Called):
                yield from self._finish("completed")
                yield from self._called(event.call)
            else:
                self._end = event
        cut = self._end is not None and self._end.reason in ("length", "context")
        self._status = "incomplete" if cut else "completed"
        if not self._items:
            yield from self._open()
        yield from self._finish(self._status)
        yield self._event(f"response.{self._status}", response=self.told())

    def failed(self, fault: Fault) -> Told:
        """The event for ``fault``, behind which nothing follows."""
        self._status = "failed"
        told = error_of(fault)
        self._error = {"code": told["code"] or "server_error", "message": told["message"]}
        return self._event("response.failed", response=self.told())

    def told(self) -> Told:
        """The response as an object."""
        asked, ended = self._asked, self._status not in ("in_progress", "failed")
        reason = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        form = asked.text.format if asked.text else None
        choice = asked.tool_choice or "auto"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "background": False,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "error": self._error,
            "incomplete_details": reason,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "model": asked.model,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": _without_none(form) if form else {"type": "text"}},
            "tool_choice": _without_none(choice) if isinstance(choice, NamedFunction) else choice,
            "tools": [_tool(tool) for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }

    def _usage(self) -> Told:
        written = self._end.tokens if self._end else 0
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + written,
        }

    def _event(self, kind: str, **members: Any) -> Told:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    @property
    def _message(self) -> Told | None:
        """The message that is being written."""
        last = self._items[-1] if self._items else None
        return last if last and last["type"] == "message" else None

    def _open(self) -> Iterator[Told]:
        """Begin a message."""
        item: Told = {"type": "message", "id": f"msg_{secrets.token_hex(24)}", "role": "assistant"}
        item |= {"status": "in_progress", "content": []}
        self._items.append(item)
        index = len(self._items) - 1
        yield self._event("response.output_item.added", output_index=index, item={**item})
        part: Told = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        item["content"] = [part]
        where = self._where(item, content_index=0)
        yield self._event("response.content_part.added", **where, part={**part, "logprobs": []})

    def _piece(self, piece: Piece) -> Iterator[Told]:
        if self._message is None:
            yield from self._open()
        message = self._message
        assert message is not None
        part = message["content"][0]
        scores = chat_logprobs(piece.scores)["content"] if self._asked.wants_logprobs else []
        part["text"] += piece.text
        part["logprobs"] += scores
        where = self._where(message, content_index=0)
        yield self._event("response.output_text.delta", **where, delta=piece.text, logprobs=scores)

    def _finish(self, status: str) -> Iterator[Told]:
        """End the message that is being written, if one is."""
        message = self._message
        if message is None or message["status"] != "in_progress":
            return
        message["status"] = status
        (part,) = message["content"]
        where = self._where(message, content_index=0)
        yield self._event(
            "response.output_text.done", **where, text=part["text"], logprobs=part["logprobs"]
        )
        yield self._event("response.content_part.done", **where, part=part)
        yield self._event(
            "response.output_item.done", output_index=where["output_index"], item=message
        )

    def _called(self, call: ToolCall) -> Iterator[Told]:
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        item: Told = {"type": "function_call", "id": f"fc_{secrets.token_hex(24)}"}
        item |= {"call_id": call_id(call), "name": call.name}
        self._items.append({**item, "arguments": arguments, "status": "completed"})
        index = len(self._items) - 1
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        where = self._where(item)
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **where, delta=arguments)
        yield self._event(f"{kind}.done", **where, name=call.name, arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=self._items[-1])

    def _where(self, item: Told, **further: int) -> Told:
        return {"item_id": item["id"], "output_index": len(self._items) - 1, **further}


def _tool(tool: Any) -> Told:
    # Clients read all members, given or not.
    return {"description": None, "strict": True, **_without_none(tool)}


def _without_none(given: Any) -> Told:
    found: Told = given.model_dump(by_alias=True, exclude_none=True)
    return found
