"""Shared parts of chat, completions, responses and embeddings: sampling, models, streams."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from luthier.errors import UnknownModel
from luthier.inference.inference import (
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    Prompt,
    Score,
    Stream,
    TooLong,
)
from luthier.inference.pool import ModelPool
from luthier.models.decoding.sampling import MOST_TOKENS, Constraint
from luthier.server.http.messages import Fault, parse_digits, refusal_text
from luthier.server.http.streams import GeneratedPieces, StreamedResponse
from luthier.server.identifiers import Invocable, ModelIds
from luthier.server.openai.file_search import FileSearch
from luthier.server.openai.protocol import (
    Body,
    JsonObject,
    StrictBody,
    error_of,
    invalid,
    model_not_found,
    validate,
)
from luthier.server.routing import answering_model, report_failure
from luthier.server.sampling_fields import StructuredOutputs, sampling_of, with_sampling
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.foundation import FoundationModel

BodyT = TypeVar("BodyT", bound=Body)
Answers = Callable[[str, Mapping[str, Any]], JsonObject]
"""Function of an account and a body that returns the response of an endpoint."""
Judge = Callable[[str, str], str]
"""Function of a model name and the name's location in the request. Returns the model id in the
library."""
MOST_STOPS = 4
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
"""Headers of server-sent events."""
FINISH = {"length": "length", "context": "length", "tool_calls": "tool_calls"}
"""OpenAI's finish reasons; all other reasons become ``stop``."""
_CONSTRAINT = {"messages": "response_format", "input": "text.format.schema"}
"""Member with the schema of replies, by the member with the prompt."""
STRUCTURED = "structured_outputs"
"""Member of vLLM for the output format."""
_PROMPTS = ("messages", "prompt", "input")


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _some(value: list[str] | None) -> list[str] | None:
    if value is not None and (len(value) > MOST_STOPS or not all(value)):
        raise ValueError(f"at most {MOST_STOPS} strings are allowed, each of at least 1 character")
    return value


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False


@with_sampling
class SamplingFields(StrictBody):
    """Sampling members of chat and text completions, from OpenAI and vLLM."""

    without_effect = frozenset({"user"})
    model: Annotated[str, Field(min_length=1)]
    logit_bias: dict[str, float] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stops), AfterValidator(_some)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    """Member of vLLM; 0 and -1 sample from all tokens."""
    structured_outputs: StructuredOutputs | None = None

    @property
    def constraint(self) -> Constraint | None:
        """Constraint on replies, or None for free text."""
        return self.structured_outputs.constraint if self.structured_outputs else None

    def check(self) -> None:
        """Reject members that contradict each other."""
        if self.stream_options is not None and not self.stream:
            text = "'stream_options' needs 'stream'."
            raise invalid(text, "stream_options", "invalid_value")

    @property
    def includes_usage(self) -> bool:
        """True if the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def request(self, prompt: Prompt, **further: Any) -> GenerationRequest:
        """Return the request for the engine. Members that the client omits have the engine's
        defaults."""
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            token = parse_digits(key, 9)
            if token is None:
                raise invalid(f"{key!r} is not a token id.", "logit_bias", "invalid_value")
            bias[token] = value
        sampling: dict[str, Any] = {
            **sampling_of(self),
            "temperature": self.temperature,
            "top_p": self.top_p,
            # vLLM's clients send -1 for no limit.
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "n": self.n,
            # OpenAI accepts any integer as seed; the engine's seeds have 63 bits.
            "seed": None if self.seed is None else self.seed % 2**63,
            **(self.constraint.fields if self.constraint else {}),
        }
        return GenerationRequest(
            prompt,
            logit_bias=bias,
            stop=tuple(self.stop or ()),
            **{name: value for name, value in sampling.items() if value is not None},
            **further,
        )


class Inference:
    """Resolves model names of an account, and queries models."""

    def __init__(self, models: ModelIds, pool: ModelPool, documents: FileSearch) -> None:
        self.models, self.pool, self.documents = models, pool, documents

    def base(self, account: str, name: str) -> FoundationModel | CustomModel:
        """Return a base model, or an active model of ``account``, by any name.

        Raises:
            Fault: 404 ``model_not_found``.
        """
        model = self.models.base(account, name)
        if model is None:
            raise model_not_found(name)
        return model

    def target(self, account: str, name: str) -> Invocable:
        """Return the model of ``account`` with the name ``name``.

        Raises:
            Fault: 404 ``model_not_found``.
        """
        model = self.models.target(account, name)
        if model is None:
            raise model_not_found(name)
        return model

    def check(self, account: str, name: str, where: str) -> None:
        """Reject a model that cannot generate text.

        Raises:
            Fault: As in :meth:`target`; 400 for the member ``where``.
        """
        self._check_writes(self.target(account, name).stored_id, name, where)

    def check_constraint(self, constraint: Constraint, where: str) -> None:
        """Reject an unsupported constraint without querying a model.

        Raises:
            Fault: 400 for the member ``where``; 429 or 503 if the server is too busy for the check.
        """
        try:
            self.pool.check_constraint(constraint)
        except InferenceRefused as refused:
            raise invalid(str(refused), where, "invalid_value") from refused
        except InferenceFailed as failed:
            raise Fault.of_inference(failed) from failed

    def judge(self, account: str) -> Judge:
        """Return a function that finds grading models of ``account``."""

        def find(name: str, where: str) -> str:
            model = self.models.target(account, name)
            if model is None:
                text = f"The model `{name}` does not exist."
                raise Fault("Validation", text, parameter=where, reason="model_not_found")
            self._check_writes(model.stored_id, name, where)
            return model.stored_id

        return find

    def _check_writes(self, stored_id: str, name: str, where: str) -> None:
        try:
            writes = self.pool.writes(stored_id)
        except UnknownModel as unknown:
            raise model_not_found(name) from unknown
        if not writes:
            raise invalid(f"The model `{name}` cannot generate text.", where, "invalid_value")

    def submit(
        self,
        target: Invocable,
        name: str,
        build: Callable[[], GenerationRequest],
        member: str = "messages",
        structured: bool = False,
    ) -> Stream:
        """Start generation. Errors about the prompt name ``member``.

        ``structured`` is True if the output format is in vLLM's member.
        """
        with refusals(name, member, structured):
            return self.pool.submit(target.stored_id, build())


def answers(
    inference: Inference, kind: type[BodyT], complete: Callable[[Inference, str, BodyT], JsonObject]
) -> Answers:
    """Return ``complete`` as a function of unparsed bodies, for batches and evals.

    Streaming is off.
    """

    def answer(account: str, body: Mapping[str, Any]) -> JsonObject:
        if "stream" in kind.model_fields:
            body = {**body, "stream": False}
        return complete(inference, account, validate(body, kind))

    return answer


def split_inputs(value: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Return the inputs of a member that accepts a single text or token list, or several."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [value]
    return list(value)  # type: ignore[arg-type]


def completion_head(prefix: str, kind: str, model: str) -> JsonObject:
    """Return the first members of a completion or chunk; the id starts with ``prefix``."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": answering_model(model),
        "system_fingerprint": None,
    }


def check_only_form(structured: StructuredOutputs | None, member: str) -> None:
    """Reject requests with two output formats: vLLM's member and OpenAI's ``member``."""
    if structured is not None:
        text = f"A reply has one form: send '{member}' or '{STRUCTURED}'."
        raise invalid(text, STRUCTURED, "invalid_value")


@contextmanager
def refusals(model: str, member: str = "messages", structured: bool = False) -> Iterator[None]:
    """Raise refusals of the engine as faults; arguments as in :meth:`Inference.submit`."""
    try:
        yield
    except TooLong as refused:
        raise invalid(str(refused), member, "context_length_exceeded") from refused
    except InferenceRefused as refused:
        parameter = refused.parameter
        if parameter in _PROMPTS:
            parameter = member
        elif parameter in ("schema", "regex", "grammar"):
            parameter = STRUCTURED if structured else _CONSTRAINT.get(member, parameter)
        raise invalid(refusal_text(refused, model), parameter, "invalid_value") from refused
    except UnknownModel as refused:
        raise model_not_found(model) from refused
    except InferenceFailed as failed:
        raise Fault.of_inference(failed) from failed


def stream_events(
    chunks: Iterator[Mapping[str, Any]], streams: Sequence[Stream], model: str
) -> StreamedResponse:
    """Return chunks as server-sent events, then ``[DONE]``; a failure is the last event."""

    def pieces() -> Iterator[bytes]:
        try:
            with refusals(model):
                for chunk in chunks:
                    yield event(chunk)
            yield b"data: [DONE]\n\n"
        except Fault as fault:
            report_failure()
            yield event({"error": error_of(fault)})
        finally:
            for stream in streams:
                stream.close()

    return StreamedResponse(GeneratedPieces(pieces(), streams), STREAM_HEADERS)


def event(value: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def usage(streams: Iterable[Stream], completion: int, reasoning: int = 0) -> JsonObject:
    """Return the token usage of ended ``streams``."""
    streams = [*streams]
    prompt = sum(stream.prompt_tokens for stream in streams)
    cached = sum(stream.cached() for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def token_text(token: bytes) -> str:
    """Return a token as text, with replacement characters for incomplete UTF-8."""
    return token.decode("utf-8", "replace")


def chat_logprobs(scores: Sequence[Score]) -> list[JsonObject]:
    """Return log probabilities in the format of chat completions."""
    return [
        {
            **_token(score.text, score.logprob),
            "top_logprobs": [_token(text, value) for text, value in score.top],
        }
        for score in scores
    ]


def _token(text: bytes, logprob: float) -> JsonObject:
    return {"token": token_text(text), "logprob": logprob, "bytes": list(text)}
