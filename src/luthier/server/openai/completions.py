"""``/completions``: text completions without a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from luthier.inference.inference import (
    FinishEvent,
    GenerationRequest,
    Prompt,
    Score,
    Stream,
    TokenChunk,
)
from luthier.models.sampling import MOST_TOKENS
from luthier.server.http.routes import MODEL_TURN
from luthier.server.http.streams import StreamedResponse
from luthier.server.identifiers import Invocable
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

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Reject unsupported members, and members that contradict each other."""
        super().check()
        if self.suffix:
            raise invalid("These models do not fill gaps: 'suffix' is not taken.", "suffix")
        if self.best_of not in (None, self.n or 1):
            raise invalid("'best_of' must be 'n': all answers that are drawn are given.", "best_of")
        if self.echo and self.logprobs is not None:
            text = "'echo' with 'logprobs' is not taken: tokens of the prompt are not scored."
            raise invalid(text, "logprobs")
        if not self.prompts or not all(len(each) for each in self.prompts):
            raise invalid("The prompt is empty.", "prompt", "invalid_value")
        if len(self.prompts) > MOST_PROMPTS:
            raise invalid(f"At most {MOST_PROMPTS} prompts are taken.", "prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Prompts as text or token ids."""
        return split_inputs(self.prompt)

    def generation_request(self, prompt: Prompt) -> GenerationRequest:
        """Return the request for the engine."""
        tokens = self.max_tokens or DEFAULT_TOKENS
        return self.request(prompt, max_tokens=tokens, top_logprobs=self.logprobs)


@router.post(
    "/completions",
    name="completions.create",
    dependencies=[MODEL_TURN],
    response_model=JsonObject,
)
def create(call: OpenAICall, body: CompletionRequest) -> JsonObject | StreamedResponse:
    """Complete the prompts."""
    inference, account = call.context.inference, call.account
    if not body.stream:
        return complete(inference, account, body)
    streams, echoes = _begin(inference, account, body)
    return stream_events(_chunks(body, streams, echoes), streams, body.model)


def complete(inference: Inference, account: str, asked: CompletionRequest) -> JsonObject:
    """Return a whole completion."""
    streams, echoes = _begin(inference, account, asked)
    choices: list[JsonObject] = []
    written = 0
    with refusals(asked.model, "prompt"):
        for stream, echo in zip(streams, echoes, strict=True):
            for answer in stream.whole():
                written += answer.tokens
                scores = _logprobs(answer.scores, 0) if asked.logprobs is not None else None
                reason = FINISH.get(answer.reason, "stop")
                choices.append(_choice(len(choices), echo + answer.text, scores, reason))
    head = completion_head(*_HEAD, asked.model)
    return {**head, "choices": choices, "usage": usage(streams, written)}


def _begin(
    inference: Inference, account: str, asked: CompletionRequest
) -> tuple[list[Stream], list[str]]:
    """Return a stream and an echo for each prompt."""
    target = inference.target(account, asked.model)
    asked.check()
    echoes = [_echo(inference, target, asked, prompt) for prompt in asked.prompts]
    streams: list[Stream] = []
    try:
        for prompt in asked.prompts:
            request = partial(asked.generation_request, prompt)
            streams.append(
                inference.submit(target, asked.model, request, "prompt", structured=True)
            )
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return streams, echoes


def _echo(
    inference: Inference, target: Invocable, asked: CompletionRequest, prompt: str | list[int]
) -> str:
    if not asked.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    with refusals(asked.model, "prompt"):
        return token_text(b"".join(inference.pool.token_bytes(target.stored_id, prompt)))


def _chunks(
    parameters: CompletionRequest, streams: Sequence[Stream], echoes: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    head, n = completion_head(*_HEAD, parameters.model), parameters.n or 1
    further = {"usage": None} if parameters.wants_usage else {}
    written = 0
    for number, (stream, echo) in enumerate(zip(streams, echoes, strict=True)):
        offsets = [0] * n
        for index in range(n if echo else 0):
            yield {**head, "choices": [_choice(number * n + index, echo, None, None)], **further}
        for event in stream:
            if isinstance(event, TokenChunk):
                scores = None
                if parameters.logprobs is not None:
                    scores = _logprobs(event.scores, offsets[event.index])
                    offsets[event.index] += sum(map(_length, event.scores))
                choice = _choice(number * n + event.index, event.text, scores, None)
            elif isinstance(event, FinishEvent):
                written += event.tokens
                reason = FINISH.get(event.reason, "stop")
                choice = _choice(number * n + event.index, "", None, reason)
            else:
                continue
            yield {**head, "choices": [choice], **further}
    if parameters.wants_usage:
        yield {**head, "choices": [], "usage": usage(streams, written)}


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
