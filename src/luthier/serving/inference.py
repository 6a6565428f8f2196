"""What is asked of a model that writes, and what comes back while it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.errors import LuthierError, RefusedInput
from luthier.types import Message, Tool, ToolCall

STOPS = 2500
"""Stop sequences of one request at most."""
TURNS = 10_000
"""Messages of one conversation, and parts of one message, at most."""
BIASES = 1024
"""Tokens of which the logits of one request are changed."""
CHOICES = 128
"""Answers to one request at most."""
MOST_TOKENS = 2**31 - 1
"""Of any length or count of tokens that a request names: more than any context, and still a number
that everything below computes with."""
MOST_PENALTY = 1000.0
"""Repetition penalty at most, and one over it at least: far beyond, logits are no longer finite."""
TOP_LOGPROBS = 20
"""Likeliest tokens that are told beside each token at most."""


class InferenceRefused(RefusedInput):
    """A request that cannot be answered as it is. ``parameter`` is the field that is wrong."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class TooLong(InferenceRefused):
    """The prompt leaves no room in the model's context."""


class InferenceFailed(LuthierError):
    """A request that could not be answered. ``code`` is Bedrock's word for why:
    ``Throttling``, ``ModelNotReady``, ``ModelError``, ``ServiceUnavailable``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Chat:
    """A conversation to be continued in the model's own template."""

    turns: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    """``auto``, ``none``, ``required`` (any tool), or ``name:`` and the name of a tool."""


Prompt = Chat | str | Sequence[int]
"""A conversation, a text as it is, or tokens."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered."""

    prompt: Prompt
    max_tokens: int | None = None
    """Tokens of an answer at most; the rest of the context where not given."""
    temperature: float = 1.0
    """0 takes the likeliest token; higher draws more freely."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw only from so many tokens; 0 for all."""
    min_p: float = 0.0
    """Draw no token that is less likely than this share of the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that stand before are divided by it, negative ones multiplied (Keskar et al.
    2019, arXiv:1909.05858)."""
    frequency_penalty: float = 0.0
    """Taken from a logit for each time the token was written already."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were written already."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of it."""
    seed: int | None = None
    """Of the draws: the same one gives the same answer. A random one where not given."""
    n: int = 1
    """Answers, each drawn with its own seed."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token; not even its own when ``None``."""
    schema: Mapping[str, Any] | bool | None = None
    """JSON schema that answers have to match; ``True`` for any JSON object."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _in("max_tokens", 1 if self.max_tokens is None else self.max_tokens, 1, MOST_TOKENS)
        _in("temperature", self.temperature, 0, 2)
        _in("top_p", self.top_p, 0, 1)
        _in("top_k", self.top_k, 0, MOST_TOKENS)
        _in("min_p", self.min_p, 0, 1)
        _in("repetition_penalty", self.repetition_penalty, 1 / MOST_PENALTY, MOST_PENALTY)
        _in("frequency_penalty", self.frequency_penalty, -2, 2)
        _in("presence_penalty", self.presence_penalty, -2, 2)
        if len(self.logit_bias) > BIASES:
            raise InferenceRefused(f"logit_bias must be at most {BIASES:,} tokens", "logit_bias")
        for value in self.logit_bias.values():
            _in("logit_bias", value, -100, 100)
        _in("n", self.n, 1, CHOICES)
        _in("top_logprobs", self.top_logprobs or 0, 0, TOP_LOGPROBS)
        if len(self.stop) > STOPS or not all(self.stop):
            raise InferenceRefused(
                f"stop must be at most {STOPS} texts, none of them empty", "stop"
            )


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
class Piece:
    """The next characters of an answer."""

    index: int
    """Which answer."""
    text: str
    scores: tuple[Score, ...] = ()
    """Of the tokens that begin in them, where they were asked for."""


@dataclass(frozen=True)
class Called:
    """A call of a tool, whole."""

    index: int
    call: ToolCall


Reason = Literal["stop", "length", "stop_sequence", "tool_calls", "context"]
"""The model ended its turn, ``max_tokens``, a stop sequence, tool calls, the end of the context."""


@dataclass(frozen=True)
class End:
    """The end of an answer."""

    index: int
    reason: Reason
    tokens: int
    """Tokens of the answer, without a stop token and without those of a stop sequence."""
    stop: str | None = None
    """The stop sequence that ended it."""


Event = Piece | Called | End


@dataclass
class Whole:
    """An answer that was put together again."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    reason: Reason = "stop"
    tokens: int = 0
    stop: str | None = None

    def take(self, event: Event) -> None:
        """Add what came."""
        match event:
            case Piece():
                self.text += event.text
                self.scores += event.scores
            case Called():
                self.calls.append(event.call)
            case End():
                self.reason, self.tokens, self.stop = event.reason, event.tokens, event.stop
