"""``/chat/completions``: requests, completions, and streams of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from luthier.data.conversations.template_kwargs import TemplateSettings
from luthier.data.conversations.tools import find_unmatched_call
from luthier.data.inputs import Media
from luthier.inference.inference import (
    TURNS,
    Chat,
    Event,
    FinishEvent,
    GenerationRequest,
    GenerationResult,
    ReasoningChunk,
    Score,
    Stream,
    TokenChunk,
    ToolCallEvent,
)
from luthier.models.decoding.sampling import MOST_TOKENS, Constraint
from luthier.server.http.media import read_image_url
from luthier.server.http.routes import MODEL_SLOT
from luthier.server.http.streams import StreamedResponse
from luthier.server.live.streams import joined_chunks
from luthier.server.openai.generation import (
    FINISH,
    Inference,
    SamplingFields,
    chat_logprobs,
    check_only_form,
    completion_head,
    refusals,
    stream_events,
    usage,
)
from luthier.server.openai.operations import OpenAICall, openai_router
from luthier.server.openai.protocol import (
    Body,
    JsonObject,
    Metadata,
    invalid,
    missing,
    validate,
)
from luthier.server.openai.stored import without_large_images
from luthier.server.openai.tools import (
    MOST_TOOLS,
    JsonSchemaFormat,
    ToolChoice,
    ToolSpec,
    arguments,
    call_id,
    check_tools,
    engine_choice,
    engine_tools,
)
from luthier.server.stores.conversations import COMPLETION
from luthier.types import IMAGE_MARK, Message, ToolCall

router = openai_router()
_ROLES: Mapping[str, Any] = {"developer": "system"}


class ImageUrl(Body):
    """Image of a content part in chat completions."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(Body):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | ImageUrl | None = None


class CalledFunction(Body):
    """Name and JSON arguments of a tool call."""

    name: str
    arguments: str


class AskedCall(Body):
    """A tool call of an assistant message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=TURNS)] | None = None
    tool_calls: Annotated[list[AskedCall], Field(max_length=TURNS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """Reasoning of an earlier reply, as DeepSeek and vLLM name the member. Chat templates may drop
    the reasoning."""
    reasoning: str | None = None
    """Reasoning of an earlier reply, as newer versions of vLLM name the member."""

    def turn(self, where: str) -> Message:
        """Return the engine's message; ``where`` is the message's location in the request."""
        images: list[Media] = []
        content, reasoning = self._text(where, images), ""
        if self.role == "assistant":
            # DeepSeek and older versions of vLLM send the first member, newer versions of vLLM the
            # second.
            reasoning = self.reasoning_content or self.reasoning or ""
        # Clients send `content: null` for a turn that consists of tool calls alone.
        if content is None and not (self.role == "assistant" and (self.tool_calls or reasoning)):
            raise invalid(f"'{where}.content' is not text.", f"{where}.content", "invalid_type")
        if self.role == "tool" and not self.tool_call_id:
            raise missing(f"{where}.tool_call_id")
        calls = tuple(
            ToolCall(
                call.id,
                call.function.name,
                arguments(call.function.arguments, f"{where}.tool_calls[{i}].function.arguments"),
            )
            for i, call in enumerate(self.tool_calls or ())
        )
        role = _ROLES.get(self.role, self.role)
        call_id = self.tool_call_id or ""
        return Message(
            role,
            content or "",
            calls=calls,
            call_id=call_id,
            reasoning=reasoning,
            images=tuple(images),
        )

    def _text(self, where: str, images: list[Media]) -> str | None:
        if not isinstance(self.content, list):
            return self.content
        kinds = ("text", "image_url") if self.role == "user" else ("text",)
        return join_parts(self.content, kinds, f"{where}.content", images)


class ResponseFormat(Body):
    """Output format of replies."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatRequest(SamplingFields):
    """Body of a chat completion."""

    without_effect = SamplingFields.without_effect | {
        "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
        "reasoning_effort", "safety_identifier", "service_tier", "verbosity",
    }  # fmt: skip
    unsupported: ClassVar[Mapping[str, str]] = {
        "functions": "Use 'tools' instead",
        "function_call": "Use 'tools' and 'tool_choice' instead",
        "audio": "Models here generate text only",
        "web_search_options": "The server has no web search. Add the information to the messages",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=TURNS)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: Metadata = None
    store: bool | None = None
    chat_template_kwargs: TemplateSettings | None = None
    """Variables of the chat template, such as ``enable_thinking``. An extension of vLLM."""

    def check(self) -> None:
        """Reject members that contradict each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs'.", "top_logprobs")
        check_tools([tool.function for tool in self.tools or ()], self.tool_choice)
        form = self.response_format
        if form is not None and form.type == "json_schema" and form.json_schema is None:
            raise missing("response_format.json_schema")
        if form is not None and form.type != "text":
            check_only_form(self.structured_outputs, "response_format")

    def generation_request(self) -> GenerationRequest:
        """Return the request for the engine."""
        turns = tuple(
            message.turn(f"messages[{index}]") for index, message in enumerate(self.messages)
        )
        _check_calls(turns)
        tokens = self.max_completion_tokens or self.max_tokens
        return self.request(
            Chat(
                turns,
                engine_tools(tool.function for tool in self.tools or ()),
                engine_choice(self.tool_choice),
                self.chat_template_kwargs or {},
            ),
            max_tokens=tokens,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    @property
    def constraint(self) -> Constraint | None:
        """Constraint on replies, or None for free text."""
        form = self.response_format
        if form is None or form.type == "text":
            return super().constraint
        if form.json_schema is None or form.type == "json_object":
            return Constraint("schema", True)
        return Constraint("schema", form.json_schema.json_schema or True)


def _check_calls(turns: Sequence[Message]) -> None:
    """Reject a tool call without a result, and a result without a call."""
    if (unmatched := find_unmatched_call(turns)) is None:
        return
    index, ids = unmatched
    if turns[index].role == "tool":
        text = f"The preceding assistant message has no tool call '{ids[0]}'."
        raise invalid(text, f"messages[{index}].tool_call_id", "invalid_value")
    text = (
        "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
        f"'tool_call_id'. These have no response: {', '.join(ids)}."
    )
    raise invalid(text, f"messages[{index}].tool_calls", "invalid_value")


def join_parts(
    parts: Sequence[ContentPart], kinds: Sequence[str], where: str, images: list[Media]
) -> str:
    """Join the text of ``parts``, with a mark for each image, which is added to ``images``.

    Parts of a type outside of ``kinds`` and ``refusal`` are rejected.
    """
    texts = []
    for index, part in enumerate(parts):
        url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
        text = part.refusal if part.type == "refusal" else part.text
        if part.type in ("image_url", "input_image") and url is not None:
            text = IMAGE_MARK
        if part.type not in (*kinds, "refusal") or text is None:
            name = f"{where}[{index}].type"
            raise invalid(f"Messages support text and images, not '{part.type}'.", name)
        if text is IMAGE_MARK and url is not None:
            images.append(read_image_url(url, f"{where}[{index}].image_url"))
        texts.append(text)
    joined = "".join(texts)
    # The template finds the images by their marks: a mark in the client's own text would shift all
    # images behind it.
    if images and joined.count(IMAGE_MARK) != len(images):
        raise invalid("The text next to an image contains U+FFFC. Remove the character.", where)
    return joined


@router.post(
    "/chat/completions",
    name="chat.completions.create",
    dependencies=[MODEL_SLOT],
    response_model=JsonObject,
)
def create(call: OpenAICall, body: ChatRequest) -> JsonObject | StreamedResponse:
    """Generate the next message of a conversation."""
    inference, account = call.context.inference, call.account
    if not body.stream:
        completion = complete(inference, account, body)
        if body.store:
            _keep(call, body, completion)
        return completion
    stream = _begin(inference, account, body)
    chunks = _Chunks(body).of(stream, stream)
    if body.store:
        chunks = _store_at_end(call, body, chunks)
    return stream_events(chunks, [stream], body.model)


def _keep(call: OpenAICall, body: ChatRequest, completion: JsonObject) -> None:
    messages = [each.model_dump(exclude_none=True) for each in body.messages]
    given = {"messages": without_large_images(messages)}
    # OpenAI's reply has no `metadata`, but the stored completion has.
    stored = {**completion, "metadata": body.metadata or {}}
    call.context.conversations.put(call.account, COMPLETION, stored, given)


def _store_at_end(
    call: OpenAICall, body: ChatRequest, chunks: Iterator[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Yield ``chunks``, then store the completion."""
    sent: list[JsonObject] = []
    for chunk in chunks:
        sent.append(dict(chunk))
        yield chunk
    _keep(call, body, joined_chunks(sent))


def complete(inference: Inference, account: str, body: ChatRequest) -> JsonObject:
    """Return a whole completion."""
    return _completion(body, _begin(inference, account, body))


def _begin(inference: Inference, account: str, body: ChatRequest) -> Stream:
    target = inference.target(account, body.model)
    body.check()
    structured = body.structured_outputs is not None
    return inference.submit(target, body.model, body.generation_request, structured=structured)


class InvokedChat:
    """A chat completion sent through Bedrock's InvokeModel. The URL contains the model, not the
    body."""

    def __init__(self, model_id: str, body: Mapping[str, Any]) -> None:
        """Check ``body``.

        Raises:
            Fault: If a member is invalid.
        """
        self._parameters = validate({**body, "model": model_id, "stream": False}, ChatRequest)
        self._parameters.check()

    def request(self) -> GenerationRequest:
        """Return the request for the engine."""
        return self._parameters.generation_request()

    def response(self, stream: Stream) -> tuple[JsonObject, int]:
        """Return the completion and the number of generated tokens."""
        found = _completion(self._parameters, stream)
        return found, found["usage"]["completion_tokens"]

    def chunks(self, stream: Stream) -> Iterator[tuple[JsonObject, int]]:
        """Yield each chunk with the number of tokens in completed replies."""
        ended = [0]
        for chunk in _Chunks(self._parameters).of(_add_up_tokens(stream, ended), stream):
            yield dict(chunk), ended[0]


def _add_up_tokens(stream: Stream, ended: list[int]) -> Iterator[Event]:
    """Yield the events of ``stream``, and add the tokens of ended replies to ``ended[0]``."""
    for each in stream:
        if isinstance(each, FinishEvent):
            ended[0] += each.tokens
        yield each


def _completion(parameters: ChatRequest, stream: Stream) -> JsonObject:
    with refusals(parameters.model):
        answers = stream.results()
    tokens = sum(each.tokens for each in answers)
    return {
        **completion_head("chatcmpl", "chat.completion", parameters.model),
        "choices": [_choice(index, each, parameters) for index, each in enumerate(answers)],
        "usage": usage([stream], tokens, sum(each.reasoning_tokens for each in answers)),
    }


def _choice(index: int, answer: GenerationResult, parameters: ChatRequest) -> JsonObject:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text if answer.text or not answer.calls else None,
        "refusal": None,
        "annotations": [],
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_call(each) for each in answer.calls]
    scores = _logprobs(answer.scores, answer.reasoning_scores) if parameters.logprobs else None
    return {
        "index": index,
        "message": message,
        "logprobs": scores,
        "finish_reason": FINISH.get(answer.reason, "stop"),
    }


def _logprobs(scores: Sequence[Score], reasoning: Sequence[Score] = ()) -> JsonObject:
    """Return log probabilities. The name of the member for reasoning tokens is DeepSeek's."""
    logprobs: dict[str, Any] = {"content": chat_logprobs(scores), "refusal": None}
    if reasoning:
        logprobs["reasoning_content"] = chat_logprobs(reasoning)
    return logprobs


def _call(call: ToolCall) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": call_id(call), "type": "function", "function": function}


class _Chunks:
    """Converter of engine events to the chunks of a stream."""

    def __init__(self, parameters: ChatRequest) -> None:
        self._parameters = parameters
        self._head = completion_head("chatcmpl", "chat.completion.chunk", parameters.model)
        self._calls: dict[int, int] = {}

    def of(self, events: Iterable[Event], stream: Stream) -> Iterator[Mapping[str, Any]]:
        """Yield the chunks for ``events`` of ``stream``. The chunks of several replies may
        alternate."""
        written = reasoning = 0
        for index in range(self._parameters.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        for event in events:
            if isinstance(event, TokenChunk):
                scores = _logprobs(event.scores) if self._parameters.logprobs else None
                yield self._chunk(event.index, {"content": event.text}, scores)
            elif isinstance(event, ReasoningChunk):
                scores = _logprobs((), event.scores) if self._parameters.logprobs else None
                yield self._chunk(event.index, {"reasoning_content": event.text}, scores)
            elif isinstance(event, ToolCallEvent):
                yield from self._call_chunks(event)
            elif isinstance(event, FinishEvent):
                written += event.tokens
                reasoning += event.reasoning_tokens
                reason = FINISH.get(event.reason, "stop")
                yield self._chunk(event.index, {}, finish=reason)
        if self._parameters.includes_usage:
            yield {**self._head, "choices": [], "usage": usage([stream], written, reasoning)}

    def _call_chunks(self, event: ToolCallEvent) -> Iterator[Mapping[str, Any]]:
        """Yield a tool call as two chunks: first the name, then the arguments."""
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
        usage_member = {"usage": None} if self._parameters.includes_usage else {}
        return {**self._head, "choices": [choice], **usage_member}
