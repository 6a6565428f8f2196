"""What is asked of a model that writes or makes images, and what comes back. Imports nothing
heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Annotated, Any, Literal

from luthier.errors import Location, LuthierError, RefusedInput
from luthier.models.sampling import FieldLimits, Sampling
from luthier.types import Message, TemplateKwargs, Tool, ToolCall

STOPS = 2500
"""Stop sequences of one request at most."""
TURNS = 10_000
"""Messages of one conversation, and parts of one message, at most."""
BIASES = 1024
"""Tokens of which the logits of one request are changed."""
CHOICES = 128
"""Answers to one request at most."""
TOP_LOGPROBS = 20
"""Likeliest tokens that are told beside each token at most."""


class InferenceRefused(RefusedInput):
    """A request that cannot be answered as it is. ``parameter`` is the field that is wrong."""

    def __init__(self, message: str, parameter: str | None = None, rule: str = "") -> None:
        super().__init__(message, rule=rule, location=Location(field=parameter or ""))
        self.parameter = parameter


class TooLong(InferenceRefused):
    """The prompt leaves no room in the model's context."""


class PredictionsOnly(InferenceRefused):
    """A model that gives predictions was asked for something else; how to ask it the API adds."""


class InferenceFailed(LuthierError):
    """A request that could not be answered. ``code`` is Bedrock's word for why:
    ``Throttling``, ``ModelNotReady``, ``ModelError``, ``ModelTimeout``, ``ServiceUnavailable``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, rule=code)
        self.code = code

    @staticmethod
    def busy(seconds: float) -> InferenceFailed:
        """Its turn has not come within so many seconds."""
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
    """For the chat template, over what the model was trained with."""


Prompt = Chat | str | Sequence[int]
"""A conversation, a text as it is, or tokens."""


@dataclass(frozen=True)
class GenerationRequest(Sampling):
    """A prompt, and how it is to be answered; without ``max_tokens`` in the rest of the context."""

    prompt: Prompt
    temperature: Annotated[float, FieldLimits(0, 2, "")] = field(default=1.0, kw_only=True)
    """Divisor of the logits; 0 takes the most likely token."""
    seed: int | None = field(default=None, kw_only=True)
    """Seed of the draws; a random seed when ``None``."""
    n: Annotated[int, FieldLimits(1, CHOICES, "")] = field(default=1, kw_only=True)
    """Number of answers, each drawn with its own seed."""
    top_logprobs: Annotated[int | None, FieldLimits(0, TOP_LOGPROBS, "")] = field(
        default=None, kw_only=True
    )
    """Number of likely tokens reported next to each token; ``None`` reports no log-probability."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if len(self.logit_bias) > BIASES:
            raise InferenceRefused(f"logit_bias must be at most {BIASES:,} tokens", "logit_bias")
        for value in self.logit_bias.values():
            _in("logit_bias", value, -100, 100)
        if len(self.stop) > STOPS:
            raise InferenceRefused(f"stop must be at most {STOPS} texts", "stop")

    @staticmethod
    def refusal(message: str, field: str) -> Exception:
        """Return the error for a wrong value of ``field``."""
        return InferenceRefused(message, field)


@dataclass(frozen=True)
class ImageRequest:
    """New images that a model is to make."""

    count: int = 1
    label: str = ""
    """Name of a class, or what a model that learned from captions is to show; empty for each class
    in turn, or of a model that knows none."""
    seed: int | None = None
    """Of the draws: the same one gives the same images. A random one where not given."""
    size: tuple[int, int] | None = None
    """Height and width that they must have, as a model makes images of one size."""
    steps: int | None = None
    """From noise to image, of a model that takes several."""
    guidance_scale: float | None = None
    """How much such a model makes of what is asked for."""
    negative_prompt: str = ""
    """What the images of such a model are to be unlike, where it learned from captions."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _in("seed", self.seed or 0, 0, 2**63 - 1)


def _in(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN is refused too.
    if not low <= value <= high:
        raise InferenceRefused(f"{name} must be between {low} and {high}", name)


@dataclass(frozen=True)
class Score:
    """A token that was written, and how likely it was."""

    text: bytes
    """What it stands for; characters may be spread over several tokens."""
    logprob: float
    """Of the model itself: before temperature, penalties and constraints."""
    top: tuple[tuple[bytes, float], ...] = ()
    """The likeliest tokens at its place."""


@dataclass(frozen=True)
class TokenChunk:
    """The next characters of an answer."""

    index: int
    """Which answer."""
    text: str
    scores: tuple[Score, ...] = ()
    """Of the tokens that begin in them, where they were asked for."""


@dataclass(frozen=True)
class ReasoningChunk:
    """The next characters of what a model thinks before it answers."""

    index: int
    text: str
    scores: tuple[Score, ...] = ()
    """Of its tokens, those of the marks around it included, where they were asked for."""


@dataclass(frozen=True)
class ToolCallEvent:
    """A call of a tool, whole."""

    index: int
    call: ToolCall


Reason = Literal["stop", "length", "stop_sequence", "tool_calls", "context"]
"""The model ended its turn, ``max_tokens``, a stop sequence, tool calls, the end of the context."""


@dataclass(frozen=True)
class FinishEvent:
    """The end of an answer."""

    index: int
    reason: Reason
    tokens: int
    """Tokens of the answer, without a stop token and without those of a stop sequence."""
    stop: str | None = None
    """The stop sequence that ended it."""
    reasoning_tokens: int = 0
    """Those of the tokens that stand before the answer: the reasoning with its marks."""


Event = TokenChunk | ReasoningChunk | ToolCallEvent | FinishEvent


@dataclass
class GenerationResult:
    """An answer that was put together again."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    reason: Reason = "stop"
    tokens: int = 0
    stop: str | None = None
    reasoning: str = ""
    reasoning_scores: list[Score] = field(default_factory=list)
    reasoning_tokens: int = 0

    def take(self, event: Event) -> None:
        """Add what came."""
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
"""Stands behind the last event of a stream that was cut short."""


Meter = Callable[[str, int, int], None]
"""Told the stored id of a model, tokens that it read, and tokens that it wrote. An image or a sound
is one token, read or made."""
_metered: ContextVar[Meter | None] = ContextVar("metered", default=None)


@contextmanager
def meter(count: Meter) -> Iterator[None]:
    """``count`` hears what models read and write for what is asked of them in the block.

    It is called by any thread, and may be after the block: a stream is counted when it ends.
    """
    token = _metered.set(count)
    try:
        yield
    finally:
        _metered.reset(token)


def count_tokens(model_id: str, read: int, written: int = 0) -> None:
    """Say what a model read and wrote to whoever counts it."""
    if (count := _metered.get()) is not None:
        count(model_id, read, written)


def metered_stream(stream: Stream, model_id: str) -> Stream:
    """``stream`` of a model, whose tokens are counted when it ends."""
    if (count := _metered.get()) is not None:
        stream.at_end(lambda: count(model_id, stream.prompt_tokens, stream.written()))
    return stream


class Stream:
    """What a model writes for one request, as it comes. Closing it ends the work at once."""

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
        """Gives the tokens that were written so far, for all answers."""
        self.cached = cached
        """Gives the tokens of the prompt that were known of an earlier one, once it is read."""
        self._events, self._n, self._left = events, n, n
        self._at_end: list[Callable[[], None]] = []
        self._interruption: InferenceFailed | None = None
        self._first: Any = None
        """The first event, where somebody waited for it."""

    def at_end(self, act: Callable[[], None]) -> None:
        """Call ``act`` once, when the last answer ended or the stream was closed."""
        self._at_end.append(act)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        """The next piece; blocks.

        Raises:
            InferenceFailed: where the work failed; nothing follows.
        """
        if not self._left:
            raise StopIteration
        event, self._first = self._first, None
        event = self._interruption or event or self._events.get()
        # What was written before it waits in the queue, and an answer that is cut needs none of it.
        event = self._interruption or event
        if isinstance(event, BaseException):
            self.close()
            raise event
        if event is ENDED or not self._left:
            raise StopIteration
        if isinstance(event, FinishEvent):
            self._left -= 1
            if not self._left:
                self.close()
        assert isinstance(event, Event)
        return event

    def wait(self) -> None:
        """Block until the first piece is there, which stays to be read, or the stream is closed.

        Raises:
            InferenceFailed: where there will be none.
        """
        if self._first is not None or not self._left:
            return
        event = self._events.get()
        event = self._interruption or event
        if isinstance(event, BaseException):
            self.close()
            raise event
        self._first = event

    def close(self) -> None:
        """Let go of it; the answers that are not whole are not written further. Any thread may."""
        self._left = 0
        while True:
            try:
                act = self._at_end.pop(0)  # the work ends before the model is given back
            except IndexError:  # who reads it may have come to its end at the same time
                break
            act()
        self._events.put(ENDED)  # for one who waits for the next piece

    def interrupt(self) -> None:
        """End it as a failure, for who reads it: the service ends before the answer. Any thread
        may."""
        text = "The service is ending. Ask again; the answer is not whole."
        self._interruption = InferenceFailed("ServiceUnavailable", text)
        self._events.put(ENDED)  # for one who waits for the next piece

    def whole(self) -> list[GenerationResult]:
        """All answers, once they are there.

        Raises:
            InferenceFailed: where the work failed, or somebody closed the stream before.
        """
        answers = [GenerationResult() for _ in range(self._n)]
        missing = self._n  # it may be closed already, by a client that hung up at once
        for event in self:
            answers[event.index].take(event)
            missing -= isinstance(event, FinishEvent)
        if missing:
            raise InferenceFailed("ServiceUnavailable", "The answer was given up half-way.")
        return answers
