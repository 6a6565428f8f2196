"""Requests for generated text and images, events and streams of replies, and token metering.

The module imports no heavy library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Annotated, Any, Literal

from luthier.errors import Location, LuthierError, RefusedInput
from luthier.models.decoding.sampling import FieldLimits, Sampling
from luthier.types import Message, TemplateKwargs, Tool, ToolCall

STOPS = 2500
"""Maximum stop sequences per request."""
TURNS = 10_000
"""Maximum messages per conversation, and parts per message."""
BIASES = 1024
"""Maximum tokens in ``logit_bias``."""
CHOICES = 128
"""Maximum replies per request."""
TOP_LOGPROBS = 20
"""Maximum likely tokens reported next to each token."""


class InferenceRefused(RefusedInput):
    """An invalid request; ``parameter`` is the invalid field."""

    def __init__(self, message: str, parameter: str | None = None, rule: str = "") -> None:
        super().__init__(message, rule=rule, location=Location(field=parameter or ""))
        self.parameter = parameter


class TooLong(InferenceRefused):
    """The prompt leaves no room in the model's context."""


class PredictionsOnly(InferenceRefused):
    """A request that a prediction model does not support. Each API adds the supported request."""

    reads: str = "text"
    """Kind of the model's inputs: text, image, audio or window."""


class InferenceFailed(LuthierError):
    """A failed request. ``code`` is Bedrock's error name without "Exception": ``Throttling``,
    ``ModelNotReady``, ``ModelError``, ``ModelTimeout``, ``ServiceUnavailable``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, rule=code)
        self.code = code

    @staticmethod
    def busy(seconds: float) -> InferenceFailed:
        """Return the error of a request that waited ``seconds`` for the model."""
        text = f"The model is busy: the request has waited {seconds:g} seconds. Try again soon."
        return InferenceFailed("Throttling", text)


@dataclass(frozen=True)
class Chat:
    """A conversation to be continued in the model's own template."""

    turns: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    """``auto``, ``none``, ``required`` (any tool), or ``name:`` and the name of a tool."""
    template_kwargs: TemplateKwargs = field(default_factory=dict, hash=False)
    """Variables of the chat template, which override the variables of training."""


Prompt = Chat | str | Sequence[int]
"""Conversation, plain text or token ids."""


@dataclass(frozen=True)
class GenerationRequest(Sampling):
    """A prompt with sampling settings; without ``max_tokens`` a reply may fill the context."""

    prompt: Prompt
    temperature: Annotated[float, FieldLimits(0, 2, "")] = field(default=1.0, kw_only=True)
    """Divisor of the logits; 0 selects the most likely token."""
    seed: int | None = field(default=None, kw_only=True)
    """Seed of the draws; a random seed when ``None``."""
    n: Annotated[int, FieldLimits(1, CHOICES, "")] = field(default=1, kw_only=True)
    """Number of replies, each with a separate seed."""
    top_logprobs: Annotated[int | None, FieldLimits(0, TOP_LOGPROBS, "")] = field(
        default=None, kw_only=True
    )
    """Number of likely tokens reported next to each token; ``None`` reports no log-probability."""

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        super().__post_init__()
        if len(self.logit_bias) > BIASES:
            raise InferenceRefused(
                f"`logit_bias` must have at most {BIASES:,} tokens", "logit_bias"
            )
        for value in self.logit_bias.values():
            _in("logit_bias", value, -100, 100)
        if len(self.stop) > STOPS:
            raise InferenceRefused(f"`stop` must have at most {STOPS} texts", "stop")

    @staticmethod
    def refusal(message: str, field: str) -> Exception:
        """Return the error for a wrong value of ``field``."""
        return InferenceRefused(message, field)


@dataclass(frozen=True)
class ImageRequest:
    """A request for generated images."""

    count: int = 1
    label: str = ""
    """Class name, or a prompt for a model trained with captions. Empty: each class in turn, or no
    condition for an unconditional model."""
    seed: int | None = None
    """Random seed; ``None`` draws a seed. Equal seeds give equal images."""
    size: tuple[int, int] | None = None
    """Required height and width in pixels; a model generates images of one size."""
    steps: int | None = None
    """Number of denoising steps of a diffusion model."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance of a diffusion model."""
    negative_prompt: str = ""
    """Negative prompt for a diffusion model trained with captions."""

    def __post_init__(self) -> None:
        """Check the range of the seed."""
        _in("seed", self.seed or 0, 0, 2**63 - 1)


def _in(name: str, value: float, low: float, high: float) -> None:
    # The negated comparison also rejects NaN.
    if not low <= value <= high:
        raise InferenceRefused(f"`{name}` must be between {low} and {high}", name)


@dataclass(frozen=True)
class Score:
    """A generated token with its log-probability."""

    text: bytes
    """Bytes of the token; a character may have several tokens."""
    logprob: float
    """Log-probability before temperature, penalties and constraints."""
    top: tuple[tuple[bytes, float], ...] = ()
    """Most likely tokens at the same position, with log-probabilities."""


@dataclass(frozen=True)
class TokenChunk:
    """The next characters of a reply."""

    index: int
    """Index of the reply."""
    text: str
    scores: tuple[Score, ...] = ()
    """Requested scores of the tokens with their first character in ``text``."""


@dataclass(frozen=True)
class ReasoningChunk:
    """The next characters of the reasoning before a reply."""

    index: int
    text: str
    scores: tuple[Score, ...] = ()
    """Requested scores of the tokens, including the tokens of the reasoning marks."""


@dataclass(frozen=True)
class ToolCallEvent:
    """A call of a tool, whole."""

    index: int
    call: ToolCall


Reason = Literal["stop", "length", "stop_sequence", "tool_calls", "context"]
"""End of a reply: stop token, ``max_tokens``, stop sequence, tool calls, or end of the context."""


@dataclass(frozen=True)
class FinishEvent:
    """The end of a reply."""

    index: int
    reason: Reason
    tokens: int
    """Number of generated tokens without the stop token and the tokens of a stop sequence."""
    stop: str | None = None
    """Stop sequence that ended the reply."""
    reasoning_tokens: int = 0
    """Number of tokens of the reasoning and the reasoning marks."""


Event = TokenChunk | ReasoningChunk | ToolCallEvent | FinishEvent


@dataclass
class GenerationResult:
    """A complete reply."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    reason: Reason = "stop"
    tokens: int = 0
    stop: str | None = None
    reasoning: str = ""
    reasoning_scores: list[Score] = field(default_factory=list)
    reasoning_tokens: int = 0

    def add(self, event: Event) -> None:
        """Append ``event`` to the reply."""
        match event:
            case TokenChunk():
                self.text += event.text
                self.scores += event.scores
            case ReasoningChunk():
                self.reasoning += event.text
                self.reasoning_scores += event.scores
            case ToolCallEvent():
                self.calls.append(event.call)
            case FinishEvent():
                self.reason, self.tokens, self.stop = event.reason, event.tokens, event.stop
                self.reasoning_tokens = event.reasoning_tokens


ENDED: Any = object()
"""Marker after the last event of a closed stream."""


Meter = Callable[[str, int, int], None]
"""Function of a model id, the number of input tokens and the number of output tokens. An image or
audio clip counts as one token."""
_metered: ContextVar[Meter | None] = ContextVar("metered", default=None)
_observed: ContextVar[Callable[[str], None] | None] = ContextVar("observed", default=None)


@contextmanager
def observe_models(query: Callable[[str], None]) -> Iterator[None]:
    """Call ``query`` with the id of each model that a request in the block needs.

    Requests that fail before the model computes are included.
    """
    token = _observed.set(query)
    try:
        yield
    finally:
        _observed.reset(token)


def report_model(model_id: str) -> None:
    """Report a model of a request to the active :func:`observe_models`."""
    if (query := _observed.get()) is not None:
        query(model_id)


@contextmanager
def meter(count: Meter) -> Iterator[None]:
    """Call ``count`` with the tokens of each request in the block.

    Any thread may call ``count``, also after the block, because a stream is counted at the end.
    """
    token = _metered.set(count)
    try:
        yield
    finally:
        _metered.reset(token)


def count_tokens(model_id: str, input_tokens: int, output_tokens: int = 0) -> None:
    """Report tokens of a request to the active :func:`meter`."""
    if (count := _metered.get()) is not None:
        count(model_id, input_tokens, output_tokens)


def metered_stream(stream: Stream, model_id: str) -> Stream:
    """Report the tokens of ``stream`` at the end of the stream."""
    if (count := _metered.get()) is not None:
        # The context variable is read here, because another thread may end the stream.
        stream.at_end(lambda: count(model_id, stream.prompt_tokens, stream.written()))
    return stream


class Stream:
    """Iterator over the events of one request. Closing the stream cancels the request."""

    def __init__(
        self,
        events: SimpleQueue[Any],
        prompt_tokens: int,
        n: int,
        written: Callable[[], int] = lambda: 0,
        cached: Callable[[], int] = lambda: 0,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        """Tokens of the prompt, template included."""
        self.written = written
        """Return the number of generated tokens of all replies."""
        self.cached = cached
        """Return the number of prompt tokens from the prefix cache, after the prompt is processed."""
        self._events, self._n, self._unfinished = events, n, n
        self._at_end: list[Callable[[], None]] = []
        self._interruption: InferenceFailed | None = None
        self._first: Any = None
        """First event, if :meth:`wait` received an event."""

    def at_end(self, act: Callable[[], None]) -> None:
        """Call ``act`` once, after the last reply or :meth:`close`."""
        self._at_end.append(act)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        """Return the next event; blocks.

        Raises:
            InferenceFailed: if the request failed; the stream has ended.
        """
        if not self._unfinished:
            raise StopIteration
        event, self._first = self._first, None
        event = self._interruption or event or self._events.get()
        # An interruption overtakes queued events, which an incomplete reply does not need.
        event = self._interruption or event
        if isinstance(event, BaseException):
            self.close()
            raise event
        # Another thread may have closed the stream during the wait.
        if event is ENDED or not self._unfinished:
            raise StopIteration
        if isinstance(event, FinishEvent):
            self._unfinished -= 1
            if not self._unfinished:
                self.close()
        assert isinstance(event, Event)
        return event

    def wait(self) -> None:
        """Block until the first event is available or the stream is closed.

        Raises:
            InferenceFailed: if the request failed before the first event.
        """
        if self._first is not None or not self._unfinished:
            return
        event = self._events.get()
        event = self._interruption or event
        if isinstance(event, BaseException):
            self.close()
            raise event
        self._first = event

    def close(self) -> None:
        """Cancel unfinished replies. Any thread may call this method."""
        self._unfinished = 0
        while True:
            try:
                # `pop` is atomic, so that two closing threads call each function once.
                act = self._at_end.pop(0)  # in order: the work ends before the model is released
            except IndexError:  # the reader may reach the end at the same time
                break
            act()
        self._events.put(ENDED)  # wakes a waiting reader

    def interrupt(self) -> None:
        """End the stream with an error for the reader, because the service stops. Any thread may
        call this method."""
        text = "The service is stopping and the reply is incomplete. Send the request again."
        self._interruption = InferenceFailed("ServiceUnavailable", text)
        self._events.put(ENDED)  # wakes a waiting reader

    def results(self) -> list[GenerationResult]:
        """Return all replies after the last event.

        Raises:
            InferenceFailed: if the request failed, or the stream was closed early.
        """
        answers = [GenerationResult() for _ in range(self._n)]
        missing = self._n  # a client that hangs up closes the stream early
        for event in self:
            answers[event.index].add(event)
            missing -= isinstance(event, FinishEvent)
        if missing:
            raise InferenceFailed("ServiceUnavailable", "The reply was cancelled.")
        return answers
