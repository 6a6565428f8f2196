"""``/responses``: a response as output items, or as a stream of events.

Responses are stored unless the client sends ``store: false``, and ``previous_response_id`` continues a
stored conversation. The tool ``file_search`` searches for the last user message, together with the
message before if the last is short. The API rejects members that would change the response and are not
supported: stored prompts, ``/v1/conversations``, background work, and other tools that run on the
server.
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from luthier.data.conversations.citations import DECLINED
from luthier.data.inputs import Media
from luthier.documents.answers import PASSAGES, Citations, search_text, submit_passages
from luthier.inference.inference import (
    TURNS,
    Chat,
    FinishEvent,
    GenerationRequest,
    ReasoningChunk,
    Stream,
    TokenChunk,
    ToolCallEvent,
)
from luthier.models.decoding.sampling import MOST_TOKENS, Constraint
from luthier.server.http.messages import Fault
from luthier.server.http.routes import MODEL_SLOT
from luthier.server.http.streams import GeneratedPieces, StreamedResponse
from luthier.server.openai.chat import ContentPart, join_parts
from luthier.server.openai.file_search import FileSearchTool, FoundInFile
from luthier.server.openai.generation import (
    STREAM_HEADERS,
    Inference,
    chat_logprobs,
    check_only_form,
    refusals,
)
from luthier.server.openai.operations import OpenAICall, openai_router
from luthier.server.openai.protocol import (
    Body,
    JsonObject,
    Metadata,
    StrictBody,
    error_of,
    invalid,
    missing,
)
from luthier.server.openai.stored import with_ids, without_large_images
from luthier.server.openai.tools import (
    MOST_TOOLS,
    FunctionTool,
    HostedTool,
    JsonSchemaFormat,
    NamedFunction,
    arguments,
    call_id,
    check_tools,
    engine_choice,
    engine_tools,
)
from luthier.server.routing import answering_model, report_failure
from luthier.server.sampling_fields import StructuredOutputs
from luthier.server.stores.conversations import RESPONSE
from luthier.types import Message, ToolCall

router = openai_router()
Keep = Callable[[JsonObject], bool]
LOGPROBS, RESULTS = "message.output_text.logprobs", "file_search_call.results"
_TEXTS = ("input_text", "output_text", "reasoning_text", "text")


class InputItem(Body):
    """An input item: a message, a function call, a function result or reasoning."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[ContentPart], Field(max_length=TURNS)] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[ContentPart], Field(max_length=TURNS)] | None = None


class OutputFormat(JsonSchemaFormat):
    """Output format of the text."""

    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Body):
    """Options of the output text."""

    format: OutputFormat | None = None


ResponseTool = Annotated[FunctionTool | FileSearchTool, Field(discriminator="type")]


class ResponseRequest(StrictBody):
    """Body of a request for a response."""

    without_effect = frozenset(
        {
            "context_management", "max_tool_calls", "prompt_cache_key", "prompt_cache_retention",
            "reasoning", "safety_identifier", "service_tier", "stream_options",
        }
    )  # fmt: skip
    unsupported: ClassVar[Mapping[str, str]] = {
        "conversation": "The server has no /v1/conversations. Use 'previous_response_id'",
        "prompt": "The server stores no prompts. Send the text in 'instructions' and 'input'",
        "background": "The server has no background responses. Use /v1/batches",
    }

    model: Annotated[str, Field(min_length=1)]
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=TURNS)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | HostedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    metadata: Metadata = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None

    @property
    def includes_logprobs(self) -> bool:
        """True if the client requests log probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def functions(self) -> list[FunctionTool]:
        """Functions for the model."""
        return [tool for tool in self.tools or () if isinstance(tool, FunctionTool)]

    @property
    def file_search(self) -> FileSearchTool | None:
        """The tool that searches for the last user message, unless the client turned it off."""
        if self.tool_choice == "none" or isinstance(self.tool_choice, NamedFunction):
            return None
        return next((each for each in self.tools or () if isinstance(each, FileSearchTool)), None)

    def check(self) -> None:
        """Reject unsupported members, and members that contradict each other."""
        if len(self.tools or ()) > len(self.functions) + 1:
            raise invalid("Send one tool 'file_search' with all 'vector_store_ids'.", "tools")
        # A tool that the server ignored would be a reply without the documents.
        if isinstance(self.tool_choice, HostedTool) and self.file_search is None:
            raise invalid("There is no tool 'file_search'.", "tool_choice.type")
        check_tools(self.functions, self._function_choice)
        if self.top_logprobs is not None and not self.includes_logprobs:
            raise invalid(f"'top_logprobs' needs '{LOGPROBS}' in 'include'.", "top_logprobs")
        form = self.text.format if self.text else None
        if form is not None and form.type == "json_schema" and form.json_schema is None:
            raise missing("text.format.schema")
        if form is not None and form.type != "text":
            check_only_form(self.structured_outputs, "text.format")

    @property
    def _function_choice(self) -> Literal["none", "auto", "required"] | NamedFunction | None:
        """The choice of functions: a search meets the requirement of a tool."""
        # Otherwise the grammar would force a call of a function after each search.
        if self.file_search is not None and self.tool_choice == "required":
            return "auto"
        return None if isinstance(self.tool_choice, HostedTool) else self.tool_choice

    def generation_request(self, turns: Sequence[Message] | None = None) -> GenerationRequest:
        """Return the request for the engine; ``turns`` replace the input."""
        sampling: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        return GenerationRequest(
            Chat(
                tuple(turns or self.turns()),
                engine_tools(self.functions),
                engine_choice(self._function_choice),
            ),
            max_tokens=self.max_output_tokens,
            top_logprobs=(self.top_logprobs or 0) if self.includes_logprobs else None,
            **(self._constraint.fields if self._constraint else {}),
            **{name: value for name, value in sampling.items() if value is not None},
        )

    def turns(self) -> tuple[Message, ...]:
        """Return instructions and input as turns."""
        turns = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return (*turns, Message("user", self.input))
        for index, item in enumerate(self.input):
            _add(turns, item, f"input[{index}]")
        answered = {turn.call_id for turn in turns if turn.role == "tool"}
        for call in (call for turn in turns for call in turn.calls):
            if call.id not in answered:
                raise invalid(f"No tool output found for function call {call.id}.", "input")
        return tuple(turns)

    @property
    def is_plain(self) -> bool:
        """True for a reply in free text."""
        return self._constraint is None

    @property
    def _constraint(self) -> Constraint | None:
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return self.structured_outputs.constraint if self.structured_outputs else None
        return Constraint("schema", form.json_schema or True)


def _add(turns: list[Message], item: InputItem, where: str) -> None:
    """Append ``item`` to ``turns``. A function call becomes part of the preceding assistant turn."""
    if item.type == "message":
        role = _require(item.role, f"{where}.role")
        images: list[Media] = []
        value = _require(item.content, f"{where}.content")
        kinds = (*_TEXTS, "input_image") if role == "user" else _TEXTS
        content = _text(value, f"{where}.content", kinds, images)
        before = turns[-1] if turns else None
        # The API sends reasoning and answer of one turn as two items.
        if (
            role == "assistant"
            and before
            and before.reasoning
            and not (before.content or before.calls)
        ):
            turns[-1] = replace(before, content=content)
        else:
            role = "system" if role == "developer" else role
            turns.append(Message(role, content, images=tuple(images)))
    elif item.type == "function_call":
        call = ToolCall(
            _require(item.call_id, f"{where}.call_id"),
            _require(item.name, f"{where}.name"),
            arguments(item.arguments, f"{where}.arguments"),
        )
        if not turns or turns[-1].role != "assistant":
            turns.append(Message("assistant"))
        turns[-1] = replace(turns[-1], calls=(*turns[-1].calls, call))
    elif item.type == "function_call_output":
        call_id = _require(item.call_id, f"{where}.call_id")
        if not any(call.id == call_id for turn in turns for call in turn.calls):
            text = f"No tool call found for function call output with call_id {call_id}."
            raise invalid(text, "input")
        output = _text(_require(item.output, f"{where}.output"), f"{where}.output")
        turns.append(Message("tool", output, call_id=call_id))
    elif item.type == "reasoning":
        # Reasoning of OpenAI's models is encrypted or a summary, and cannot be used here.
        if reasoning := _text(item.content or "", f"{where}.content"):
            turns.append(Message("assistant", reasoning=reasoning))
    elif item.type != "file_search_call":  # the message that follows has the result
        raise invalid(f"Items of the type '{item.type}' are not supported.", f"{where}.type")


def _require(value: Any, where: str) -> Any:
    if value is None:
        raise missing(where)
    return value


def _text(
    content: str | list[ContentPart],
    where: str,
    kinds: Sequence[str] = _TEXTS,
    images: list[Media] | None = None,
) -> str:
    if isinstance(content, str):
        return content
    return join_parts(content, kinds, where, [] if images is None else images)


@router.post(
    "/responses", name="responses.create", dependencies=[MODEL_SLOT], response_model=JsonObject
)
def create(call: OpenAICall, body: ResponseRequest) -> JsonObject | StreamedResponse:
    """Generate a response, as an object or a stream of events."""
    body, items = _with_earlier(call, body)
    keep: Keep | None = None
    if body.store is not False:
        store, given = call.context.conversations, {"items": items}
        keep = partial(store.put, call.account, RESPONSE, given=given)
    response = _Response(body, *_begin(call.context.inference, call.account, body), keep)
    if not body.stream:
        return response.complete()
    pieces = GeneratedPieces(response.pieces(), [response.stream])
    return StreamedResponse(pieces, STREAM_HEADERS)


def complete(inference: Inference, account: str, body: ResponseRequest) -> JsonObject:
    """Return a whole response that is not stored, for batches."""
    if body.previous_response_id is not None:
        text = (
            "Lines of batches cannot continue a stored response. Send the earlier items in 'input'."
        )
        raise invalid(text, "previous_response_id", "unsupported_parameter")
    return _Response(body, *_begin(inference, account, body)).complete()


def _with_earlier(
    call: OpenAICall, body: ResponseRequest
) -> tuple[ResponseRequest, list[JsonObject]]:
    """Return the request with the turns of ``previous_response_id``, and all items with ids.

    The instructions of earlier responses are not used again, as in OpenAI's API.
    """
    own: list[JsonObject] = [{"type": "message", "role": "user", "content": body.input}]
    if not isinstance(body.input, str):
        own = [each.model_dump(exclude_none=True) for each in body.input]
    items = with_ids(without_large_images(own))
    if body.previous_response_id is None:
        return body, items
    row = call.context.conversations.get(call.account, RESPONSE, body.previous_response_id)
    if row is None:
        text = f"Previous response with id '{body.previous_response_id}' not found."
        raise invalid(text, "previous_response_id", "previous_response_not_found")
    # Passages of a search are not part of the conversation.
    replies = [each for each in row.body["output"] if each["type"] != "file_search_call"]
    earlier = [*row.given["items"], *replies]
    if len(earlier) + len(own) > TURNS:
        text = f"The conversation has more than {TURNS:,} items."
        raise invalid(text, "previous_response_id")
    turns = [InputItem.model_validate(each) for each in (*earlier, *own)]
    return body.model_copy(update={"input": turns}), [*earlier, *items]


@dataclass(frozen=True)
class _Search:
    """Search of the tool ``file_search``."""

    query: str
    found: Sequence[FoundInFile]
    """Passages in the prompt, in the order of their numbers."""


def _begin(
    inference: Inference, account: str, body: ResponseRequest
) -> tuple[Stream, _Search | None]:
    """Search, if the request has the tool, then start the reply."""
    target = inference.target(account, body.model)
    body.check()

    def submit(turns: Sequence[Message] | None = None) -> Stream:
        structured = body.structured_outputs is not None
        build = partial(body.generation_request, turns)
        return inference.submit(target, body.model, build, "input", structured=structured)

    tool = body.file_search
    if tool is None:
        return submit(), None
    # Before the search, which takes longer than to refuse a model that cannot write.
    inference.check(account, body.model, "model")
    turns = body.turns()
    query = search_text(turns)
    if not query:
        raise invalid("The tool 'file_search' needs a user message with text.", "input")
    found, may_answer = inference.documents.search(
        account, tool.vector_store_ids, [query], tool, tool.max_num_results or PASSAGES
    )
    if not (found and may_answer):
        if body.functions:  # the question may be about one of them
            return submit(), _Search(query, [])
        if body.is_plain:
            return _decline(), _Search(query, [])
    passages = [each.found.passage.content for each in found]
    stream, count = submit_passages(turns, passages, submit, _is_too_long)
    return stream, _Search(query, found[:count])


def _is_too_long(error: Exception) -> bool:
    return isinstance(error, Fault) and error.details.get("reason") == "context_length_exceeded"


def _decline() -> Stream:
    """Return the reply to a question that the documents do not answer."""
    events: SimpleQueue[Any] = SimpleQueue()
    events.put(TokenChunk(0, DECLINED))
    events.put(FinishEvent(0, "stop", 0))
    return Stream(events, 0, 1)


def _encode_event(event: Mapping[str, Any]) -> bytes:
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {text}\n\n".encode()


class _Response:
    """State of a response during generation, and the events of the stream."""

    def __init__(
        self,
        parameters: ResponseRequest,
        stream: Stream,
        search: _Search | None,
        keep: Keep | None = None,
    ) -> None:
        """``keep`` stores the response, and returns False if the response was not stored."""
        self.stream = stream
        self._parameters, self._search, self._keep = parameters, search, keep
        self._stored = keep is not None
        self._citations: Citations | None = None
        self._id, self._created = f"resp_{secrets.token_hex(24)}", int(time.time())
        self._status, self._number = "in_progress", 0
        self._end: FinishEvent | None = None
        self._error: JsonObject | None = None
        self._items: list[JsonObject] = []

    def complete(self) -> JsonObject:
        """Return the whole response."""
        with refusals(self._parameters.model, "input"):
            for _ in self.events():
                pass
        return self.to_dict()

    def pieces(self) -> Iterator[bytes]:
        """Yield server-sent events. An error becomes the last event."""
        try:
            try:
                with refusals(self._parameters.model, "input"):
                    for event in self.events():
                        yield _encode_event(event)
            except Fault as fault:
                report_failure()
                yield _encode_event(self.fail(fault))
        finally:
            self.stream.close()

    def events(self) -> Iterator[JsonObject]:
        """Yield all events, in the order of OpenAI's specification."""
        yield self._event("response.created", response=self.to_dict())
        yield self._event("response.in_progress", response=self.to_dict())
        if self._search is not None:
            yield from self._add_search(self._search)
        for event in self.stream:
            if isinstance(event, ReasoningChunk):
                if event.text:
                    yield from self._reasoning_piece(event.text)
            elif isinstance(event, TokenChunk):
                yield from self._piece(event)
            elif isinstance(event, ToolCallEvent):
                yield from self._finish("completed")
                yield from self._add_call(event.call)
            else:
                self._end = event
        cut = self._end is not None and self._end.reason in ("length", "context")
        self._status = "incomplete" if cut else "completed"
        # OpenAI's client takes the text from a message item, also for an empty reply.
        if not self._items or self._items[-1]["type"] == "file_search_call":
            yield from self._open("message")
        yield from self._finish(self._status)
        # The client may continue the conversation as soon as the last event arrives.
        self._stored = self._keep is not None and self._keep(self.to_dict())
        yield self._event(f"response.{self._status}", response=self.to_dict())

    def fail(self, fault: Fault) -> JsonObject:
        """Return the event for ``fault``, the last event of the stream."""
        self._status = "failed"
        error = error_of(fault)
        self._error = {"code": error["code"] or "server_error", "message": error["message"]}
        return self._event("response.failed", response=self.to_dict())

    def to_dict(self) -> JsonObject:
        """Return the response as OpenAI's object."""
        parameters, ended = self._parameters, self._status not in ("in_progress", "failed")
        reason = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        form = parameters.text.format if parameters.text else None
        choice = parameters.tool_choice or "auto"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "background": False,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "error": self._error,
            "incomplete_details": reason,
            "instructions": parameters.instructions,
            "max_output_tokens": parameters.max_output_tokens,
            "max_tool_calls": None,
            "model": answering_model(parameters.model),
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": parameters.parallel_tool_calls is not False,
            "previous_response_id": parameters.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self._stored,
            "temperature": 1.0 if parameters.temperature is None else parameters.temperature,
            "text": {"format": _without_none(form) if form else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else _without_none(choice),
            # OpenAI's client requires both members.
            "tools": [
                {
                    **({"description": None, "strict": True} if tool.type == "function" else {}),
                    **_without_none(tool),
                }
                for tool in parameters.tools or ()
            ],
            "top_logprobs": parameters.top_logprobs or 0,
            "top_p": 1.0 if parameters.top_p is None else parameters.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": parameters.user,
            "metadata": parameters.metadata or {},
        }

    def _usage(self) -> JsonObject:
        read, written = self.stream.prompt_tokens, self._end.tokens if self._end else 0
        return {
            "input_tokens": read,
            "input_tokens_details": {
                "cached_tokens": self.stream.cached(),
                "cache_write_tokens": 0,
            },
            "output_tokens": written,
            "output_tokens_details": {
                "reasoning_tokens": self._end.reasoning_tokens if self._end else 0
            },
            "total_tokens": read + written,
        }

    def _event(self, kind: str, **members: Any) -> JsonObject:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    @property
    def _open_item(self) -> JsonObject | None:
        """Message or reasoning item that is being generated, or None."""
        last = self._items[-1] if self._items else None
        return last if last and last.get("status") == "in_progress" else None

    def _open(self, kind: Literal["message", "reasoning"]) -> Iterator[JsonObject]:
        """Start a message or reasoning item."""
        item: JsonObject
        if kind == "reasoning":
            item = {"type": kind, "id": f"rs_{secrets.token_hex(24)}", "summary": []}
            part: JsonObject = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": kind, "id": f"msg_{secrets.token_hex(24)}", "role": "assistant"}
            part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
            if self._search and self._parameters.is_plain:  # in JSON, [1] is a list
                self._citations = Citations(len(self._search.found))
        item |= {"status": "in_progress", "content": []}
        self._items.append(item)
        index = len(self._items) - 1
        yield self._event("response.output_item.added", output_index=index, item={**item})
        where = self._where(item, content_index=0)
        yield self._event("response.content_part.added", **where, part=copy.deepcopy(part))
        item["content"] = [part]

    def _reasoning_piece(self, text: str) -> Iterator[JsonObject]:
        if self._open_item is None:
            yield from self._open("reasoning")
        item = self._items[-1]
        item["content"][0]["text"] += text
        where = self._where(item, content_index=0)
        yield self._event("response.reasoning_text.delta", **where, delta=text)

    def _piece(self, piece: TokenChunk) -> Iterator[JsonObject]:
        if self._open_item is None or self._open_item["type"] == "reasoning":
            yield from self._finish("completed")
            yield from self._open("message")
        scores = chat_logprobs(piece.scores) if self._parameters.includes_logprobs else []
        yield from self._text(piece.text, scores)

    def _text(
        self, text: str, scores: list[JsonObject], last: bool = False
    ) -> Iterator[JsonObject]:
        """Add text to the message, with an annotation for each citation."""
        message = self._items[-1]
        part = message["content"][0]
        cited: list[tuple[int, int]] = []
        if self._citations is not None:
            text, cited = self._citations.add(text, last)
        part["text"] += text
        part["logprobs"] += scores
        where = self._where(message, content_index=0)
        if text or scores:
            yield self._event("response.output_text.delta", **where, delta=text, logprobs=scores)
        for position, number in cited:
            assert self._search is not None
            file = self._search.found[number - 1].file
            annotation = {
                "type": "file_citation",
                "file_id": file.file_id,
                "filename": file.filename,
                "index": position,
            }
            place = len(part["annotations"])
            part["annotations"].append(annotation)
            yield self._event(
                "response.output_text.annotation.added",
                **where,
                annotation_index=place,
                annotation=annotation,
            )

    def _finish(self, status: str) -> Iterator[JsonObject]:
        """End the open item, if any."""
        item = self._open_item
        if item is None:
            return
        if self._citations is not None and item["type"] == "message":
            yield from self._text("", [], last=True)
        item["status"] = status
        (part,) = item["content"]
        where = self._where(item, content_index=0)
        if item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", **where, text=part["text"])
        else:
            yield self._event(
                "response.output_text.done", **where, text=part["text"], logprobs=part["logprobs"]
            )
        yield self._event("response.content_part.done", **where, part=part)
        yield self._event(
            "response.output_item.done", output_index=where["output_index"], item=item
        )

    def _add_search(self, search: _Search) -> Iterator[JsonObject]:
        item: JsonObject = {"type": "file_search_call", "id": f"fs_{secrets.token_hex(24)}"}
        item |= {"queries": [search.query], "results": None}
        self._items.append({**item, "status": "in_progress"})
        index = len(self._items) - 1
        yield self._event(
            "response.output_item.added", output_index=index, item=dict(self._items[-1])
        )
        # The search is over when the stream starts. Clients show its progress by these events.
        for state in ("in_progress", "searching", "completed"):
            yield self._event(f"response.file_search_call.{state}", **self._where(item))
        if RESULTS in (self._parameters.include or ()):
            item["results"] = [{**each.to_dict(), "text": each.text} for each in search.found]
        self._items[-1] = {**item, "status": "completed"}
        yield self._event("response.output_item.done", output_index=index, item=self._items[-1])

    def _add_call(self, call: ToolCall) -> Iterator[JsonObject]:
        arguments = call.arguments_json
        item: JsonObject = {"type": "function_call", "id": f"fc_{secrets.token_hex(24)}"}
        item |= {"call_id": call_id(call), "name": call.name}
        self._items.append({**item, "arguments": arguments, "status": "completed"})
        index = len(self._items) - 1
        # A call is complete as soon as it is recognized, but clients build arguments from the
        # deltas.
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        where = self._where(item)
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **where, delta=arguments)
        yield self._event(f"{kind}.done", **where, name=call.name, arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=self._items[-1])

    def _where(self, item: JsonObject, **further: int) -> JsonObject:
        return {"item_id": item["id"], "output_index": len(self._items) - 1, **further}


def _without_none(model: Any) -> JsonObject:
    members: JsonObject = model.model_dump(by_alias=True, exclude_none=True)
    return members
