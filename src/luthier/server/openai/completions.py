"""``/completions``: text completions without a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Field

from luthier.inference.inference import (
    FinishEvent,
    GenerationRequest,
    Prompt,
    Score,
    Stream,
    TokenChunk,
)
from luthier.models.decoding.sampling import MOST_TOKENS
from luthier.server.http.routes import MODEL_SLOT
from luthier.server.http.streams import StreamedResponse
from luthier.server.openai.generation import (
    FINISH,
    Inference,
    SamplingFields,
    completion_head,
    refusals,
    split_inputs,
    stream_events,
    token_text,
    usage,
)
from luthier.server.openai.operations import OpenAICall, openai_router
from luthier.server.openai.protocol import JsonObject, invalid

router = openai_router()
MOST_PROMPTS = 128
DEFAULT_TOKENS = 16
_HEAD = ("cmpl", "text_completion")


class CompletionRequest(SamplingFields):
    """Body of a text completion."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "best_of": "The server returns all replies. Use 'n'",
        "suffix": "Models here cannot fill gaps",
    }

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    def check(self) -> None:
        """Reject empty prompts, too many prompts, and an echo that the server cannot return."""
        super().check()
        if self.echo and self.logprobs is not None:
            raise invalid("'echo' does not return log probabilities of the prompt.", "logprobs")
        if self.echo and not all(isinstance(each, str) for each in self.prompts):
            raise invalid("'echo' needs prompts as text, not as tokens.", "echo")
        if not self.prompts or not all(len(each) for each in self.prompts):
            raise invalid("The prompt is empty.", "prompt", "invalid_value")
        if len(self.prompts) > MOST_PROMPTS:
            raise invalid(f"A request has at most {MOST_PROMPTS} prompts.", "prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Prompts as text or token ids."""
        return split_inputs(self.prompt)

    @property
    def echoes(self) -> list[str]:
        """Text before each reply: the prompts with ``echo``, otherwise empty."""
        return [str(each) if self.echo else "" for each in self.prompts]

    def generation_request(self, prompt: Prompt) -> GenerationRequest:
        """Return the request for the engine."""
        tokens = self.max_tokens or DEFAULT_TOKENS
        return self.request(prompt, max_tokens=tokens, top_logprobs=self.logprobs)


@router.post(
    "/completions",
    name="completions.create",
    dependencies=[MODEL_SLOT],
    response_model=JsonObject,
)
def create(call: OpenAICall, body: CompletionRequest) -> JsonObject | StreamedResponse:
    """Complete the prompts."""
    inference, account = call.context.inference, call.account
    if not body.stream:
        return complete(inference, account, body)
    streams = _begin(inference, account, body)
    return stream_events(_chunks(body, streams), streams, body.model)


def complete(inference: Inference, account: str, body: CompletionRequest) -> JsonObject:
    """Return a whole completion."""
    streams = _begin(inference, account, body)
    choices: list[JsonObject] = []
    tokens = 0
    with refusals(body.model, "prompt"):
        for stream, echo in zip(streams, body.echoes, strict=True):
            for result in stream.results():
                tokens += result.tokens
                scores = _logprobs(result.scores, 0) if body.logprobs is not None else None
                reason = FINISH.get(result.reason, "stop")
                choices.append(_choice(len(choices), echo + result.text, scores, reason))
    head = completion_head(*_HEAD, body.model)
    return {**head, "choices": choices, "usage": usage(streams, tokens)}


def _begin(inference: Inference, account: str, body: CompletionRequest) -> list[Stream]:
    """Return a stream for each prompt."""
    target = inference.target(account, body.model)
    body.check()
    streams: list[Stream] = []
    try:
        for prompt in body.prompts:
            request = partial(body.generation_request, prompt)
            streams.append(inference.submit(target, body.model, request, "prompt", structured=True))
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return streams


def _chunks(body: CompletionRequest, streams: Sequence[Stream]) -> Iterator[Mapping[str, Any]]:
    head, n = completion_head(*_HEAD, body.model), body.n or 1
    usage_member = {"usage": None} if body.includes_usage else {}
    tokens = 0
    for number, (stream, echo) in enumerate(zip(streams, body.echoes, strict=True)):
        offsets = [0] * n
        for index in range(n if echo else 0):
            choice = _choice(number * n + index, echo, None, None)
            yield {**head, "choices": [choice], **usage_member}
        for event in stream:
            if isinstance(event, TokenChunk):
                scores = None
                if body.logprobs is not None:
                    scores = _logprobs(event.scores, offsets[event.index])
                    offsets[event.index] += sum(map(_length, event.scores))
                choice = _choice(number * n + event.index, event.text, scores, None)
            elif isinstance(event, FinishEvent):
                tokens += event.tokens
                reason = FINISH.get(event.reason, "stop")
                choice = _choice(number * n + event.index, "", None, reason)
            else:
                continue
            yield {**head, "choices": [choice], **usage_member}
    if body.includes_usage:
        yield {**head, "choices": [], "usage": usage(streams, tokens)}


def _choice(
    index: int, text: str, scores: Mapping[str, Any] | None, reason: str | None
) -> JsonObject:
    return {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}


def _logprobs(scores: Sequence[Score], offset: int) -> JsonObject:
    """Return log probabilities in the format of text completions; text offsets start at ``offset``."""
    offsets, tops = [], []
    for score in scores:
        offsets.append(offset)
        offset += _length(score)
        # OpenAI lists the sampled token, even if other tokens are more likely.
        top = {_token(text): value for text, value in score.top}
        tops.append(top | {_token(score.text): score.logprob})
    return {
        "tokens": [_token(score.text) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _length(score: Score) -> int:
    """Return the length of a token in characters; an incomplete UTF-8 sequence counts as 1."""
    return len(token_text(score.text))


def _token(text: bytes) -> str:
    """Return the text of a token, or escaped bytes for incomplete UTF-8, so that keys stay unique."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
