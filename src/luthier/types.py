"""Plain data that crosses seams. No logic, no heavy imports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask to be called."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"}, hash=False)
    """JSON schema of its arguments."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant asks for."""

    id: str
    name: str
    arguments: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, tool calls and their results included."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str = ""
    learned: bool = True
    """False for a turn of the assistant that is only read."""
    calls: tuple[ToolCall, ...] = ()
    """What an assistant asked to be called."""
    call_id: str = ""
    """Which call a tool's turn answers."""
    reasoning: str = ""
    """What an assistant thought before it answered or called."""

    def to_dict(self) -> dict[str, Any]:
        """The turn in OpenAI's form, ready for JSON."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        if self.calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
                    },
                }
                for call in self.calls
            ]
        if self.role == "tool":
            turn["tool_call_id"] = self.call_id
        return turn


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, checked and in one of the shapes of ``luthier.data.rows``.

    The fields of its shape are set; the others are ``None``.
    """

    file: str
    line: int
    """1-based line in ``file``; 1 for a plain-text file, which is one row."""
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: str | tuple[str, ...] | None = None
    """Class of ``text``; several where it may have more than one, also none at all."""
    positive: str | None = None
    """Partner of ``text`` in a pair."""
    rating: float | None = None
    """Number that belongs to ``text``, or that people gave to ``reply``."""
    tokens: tuple[str, ...] | None = None
    """Words of a sentence, each with one of ``tags``."""
    tags: tuple[str, ...] | None = None
    expected: str | None = None
    """Answer that a reply to what is only asked is graded by; it is never learned."""
    reply: tuple[Message, ...] | None = None
    """The answer to ``messages`` that people judged, or that they chose beside ``rejected``."""
    rejected: tuple[Message, ...] | None = None
    """The answer to ``messages`` that was not chosen."""
    desirable: bool | None = None
    """Thumb up or down for ``reply``."""
    members: Mapping[str, Any] | None = None
    """Whatever else a row says of itself whose answer is not learned; graders may look at it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids, with how much each token counts in the loss.

    Where ``target`` is ``None`` the tokens are their own target: ``weight_T[t]`` is the weight of
    predicting ``ids_T[t]`` from ``ids_T[:t]``, and ``weight_T[0]`` is 0, as the first token has
    nothing before it. Elsewhere the objective says what ``target`` holds; ``weight_T`` is the weight
    of each token's own target, or stands at the last token where the row has one target.
    """

    ids_T: IntArray
    weight_T: FloatArray
    row: int
    """Index of the row in the data set, for messages and caching."""
    target: NDArray[Any] | None = None
    source_T: IntArray | None = None
    """What the encoder of an encoder-decoder reads; ``ids_T`` is then the decoder's."""
    word_T: IntArray | None = None
    """Number of the word each token belongs to, -1 for tokens around the text; where it is known."""
    partner: Example | None = None
    """The other text of the row, where a row is two: what was rejected, beside what was chosen."""
    given: Row | None = None
    """The row itself, where its texts are needed in training: to grade what the network answers."""
    group: int | None = None
    """Rows with the same number are computed in one micro-batch, as their loss needs all of them."""
    desirable: bool | None = None
    """Whether people want such an answer, where rows come one by one."""
    reference: float | None = None
    """Log-probability of the learned tokens under the reference model, where it is known ahead."""

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def tokens(self) -> int:
        """Tokens that the network reads, the encoder's included."""
        return len(self.ids_T) + (0 if self.source_T is None else len(self.source_T))

    @property
    def longest(self) -> int:
        """Tokens of the longer of both sides: what must fit into the context."""
        return (
            len(self.ids_T) if self.source_T is None else max(len(self.ids_T), len(self.source_T))
        )

    @property
    def weight(self) -> float:
        """How much the row counts in a mean over rows or tokens."""
        return float(self.weight_T.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Loss:
    """A **sum** over the micro-batch. Only the engine divides, once, by the global weight."""

    total: Any
    """Scalar tensor with a gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further sums, divided by the same weight before they are shown."""
    ratios: Mapping[str, tuple[ArrayLike, ArrayLike]] = field(default_factory=dict)
    """A part and a whole for each row, whose sums are divided: F1 is no mean over rows. ``loss`` is the
    loss of each row, where that is one number: its mean is known less well than one over tokens."""

    @staticmethod
    def of_rows(
        each_R: Any,
        metrics: Mapping[str, float],
        ratios: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    ) -> Loss:
        """The sum of the losses ``[R]`` of single rows."""
        own = {"loss": (each_R.tolist(), [1] * len(each_R))}
        return Loss(each_R.sum(), metrics, own | dict(ratios or {}))
