"""Plain data that crosses seams. No heavy imports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.errors import Location

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.inputs import MediaInput

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


TemplateKwargs = Mapping[str, bool | int | float | str]
"""What a chat template reads beside the conversation, such as ``enable_thinking``: transformers'
``chat_template_kwargs``."""

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
"""What most models that call put around a call."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask to be called."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"}, hash=False)
    """JSON schema of its arguments."""


Part = Literal["input", "target", "other"]
"""What a text is to a model: ``input`` is given, ``target`` is learned or preferred, ``other`` is only
graded against, or was rejected."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a row."""

    field: str
    """As people know it: ``prompt``, ``messages[2].content``, ``tokens``."""
    content: str
    part: Part


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed; keys of objects stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(each, change) for each in value]
    if isinstance(value, dict):
        return {key: map_texts(each, change) for key, each in value.items()}
    return value


def dotted_items(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables with their dotted names, such as ``training.epochs``."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant asks for."""

    id: str
    name: str
    arguments: Mapping[str, Any] = field(hash=False)

    @property
    def arguments_json(self) -> str:
        """The arguments as OpenAI's form has them."""
        return json.dumps(dict(self.arguments), ensure_ascii=False)

    @property
    def text(self) -> str:
        """The call as one text, for people and for comparing."""
        return f"{self.name} {self.arguments_json}"


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

    @property
    def whole_text(self) -> str:
        """All that the turn says, its reasoning and calls included; by it turns are the same or not."""
        further = [self.reasoning] if self.reasoning else []
        return "\n".join([self.content, *further, *(call.text for call in self.calls)])

    def texts(self, name: str, part: Part) -> Iterator[Text]:
        """Every text of the turn, which people know as ``name``."""
        if self.reasoning:
            yield Text(f"{name}.reasoning", self.reasoning, part)
        if self.content or not self.calls:
            yield Text(f"{name}.content", self.content, part)
        for place, call in enumerate(self.calls, 1):
            yield Text(f"{name}.tool_calls[{place}]", call.text, part)

    def edit_texts(self, name: str, change: Callable[[str, str], str]) -> Message:
        """The turn with each text as ``change(field, text)`` gives it; of a call, its arguments."""
        reasoning = change(f"{name}.reasoning", self.reasoning) if self.reasoning else ""
        content = change(f"{name}.content", self.content)
        calls = []
        for place, call in enumerate(self.calls, 1):
            text = partial(change, f"{name}.tool_calls[{place}]")
            calls.append(replace(call, arguments=map_texts(dict(call.arguments), text)))
        return replace(self, content=content, reasoning=reasoning, calls=tuple(calls))

    @property
    def reply_text(self) -> str:
        """What is said, and calls as JSON: what a model writes that has no other way to call."""
        calls = [
            json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
            for call in self.calls
        ]
        if not calls:
            return self.content
        if len(calls) == 1 and not self.content:
            return calls[0]
        # Tags tell where each call begins and ends.
        marked = [f"{CALL_OPEN}\n{call}\n{CALL_CLOSE}" for call in calls]
        return "\n".join([*([self.content] if self.content else []), *marked])

    def to_dict(self) -> dict[str, Any]:
        """Return the turn in OpenAI's form, ready for JSON, without its training mark."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        if self.calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_json},
                }
                for call in self.calls
            ]
        if self.role == "tool":
            turn["tool_call_id"] = self.call_id
        return turn

    def to_row(self) -> dict[str, Any]:
        """Return :meth:`to_dict` with ``"weight": 0`` if the turn is not learned."""
        turn = self.to_dict()
        return turn if self.learned else {**turn, "weight": 0}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, checked, and what everybody may ask of it whatever its shape.

    Each shape is a class of ``luthier.data.shapes`` with fields of its own.
    """

    shape: ClassVar[str] = ""
    """Name of the shape, as objectives give it in ``shapes``."""
    parts: ClassVar[Mapping[str, Part]] = {}
    """Fields that hold texts, in the order a model reads them."""
    annotated: ClassVar[bool] = False
    """Whether what it teaches is a name or a number and not a text."""

    file: str
    line: int
    """1-based line in ``file``; 1 for a plain-text file, which is one row."""

    @property
    def location(self) -> Location:
        """File and line of the row."""
        return Location(self.file, self.line)

    @property
    def members(self) -> Mapping[str, Any] | None:
        """Whatever else a row says of itself whose answer is not learned; graders may look at it."""
        return None

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The functions that an assistant of the row may ask to be called."""
        return ()

    def texts(self) -> Iterator[Text]:
        """Every text of the row, in the order a model reads them.

        A field of :attr:`parts` is a text, words that are one, or turns, of which those of the
        assistant are what the field is, and the others what it is given.
        """
        for name, part in self.parts.items():
            value = getattr(self, name)
            if isinstance(value, str):
                yield Text(name, value, part)
            elif value and isinstance(value[0], str):
                yield Text(name, " ".join(value), part)
            elif value is not None:
                given: Part = "other" if part == "other" else "input"
                for number, turn in enumerate(value, 1):
                    side = part if turn.role == "assistant" else given
                    yield from turn.texts(f"{name}[{number}]", side)

    def edit_texts(self, change: Callable[[str, str], str]) -> Self:
        """The row with each text as ``change(field, text)`` gives it, by their names in :meth:`texts`.

        Of words, and of several texts in one field, each is changed; of a call, each text among its
        arguments.
        """
        changed: dict[str, Any] = {}
        for name in self.parts:
            value = getattr(self, name)
            if isinstance(value, str):
                changed[name] = change(name, value)
            elif value and isinstance(value[0], str):
                changed[name] = tuple(change(name, text) for text in value)
            elif value and isinstance(value[0], Message):
                changed[name] = tuple(
                    turn.edit_texts(f"{name}[{number}]", change)
                    for number, turn in enumerate(value, 1)
                )
        return replace(self, **changed)

    def inputs(self) -> tuple[str, ...]:
        """All that the model is given before it first answers; what makes two rows ask the same."""
        return ()

    def targets(self) -> tuple[str, ...]:
        """All that the row teaches about :meth:`inputs`; empty for raw text and bare prompts."""
        return ()

    def turns(self) -> tuple[Message, ...]:
        """The row as a conversation, the preferred answer at its end; empty where it is none."""
        return ()

    def prompt_turns(self) -> tuple[Message, ...]:
        """The turns that a reply follows; empty where the row asks nothing."""
        turns = self.turns()
        return turns[:-1] if turns and turns[-1].role == "assistant" else turns

    def expected_reply(self) -> str | None:
        """The text that a reply to :meth:`prompt_turns` is compared with, where the row has one."""
        turns = self.turns()
        return turns[-1].reply_text if turns and turns[-1].role == "assistant" else None

    def plain_text(self) -> str:
        """What a network reads that knows no turns: all of it as one text."""
        return "\n\n".join(turn.reply_text for turn in self.turns())

    def excerpt(self) -> str:
        """What people know it by where it has no text: the name of an image."""
        return ""

    def classes(self) -> tuple[str, ...]:
        """What the row counts as where rows are split in proportion: its labels, its judgement."""
        return ()

    def bare(self) -> Row:
        """The row without what is to be found out about it: its label, rating, tags or partner."""
        return self

    def sides(self) -> list[Row]:
        """Bare rows that a network reads for this one: itself, both texts of a pair, each answer."""
        return [self.bare()]

    def record(self) -> dict[str, object]:
        """The row in the keys of its shape, as it is written to a file."""
        raise TypeError("a row of no shape cannot be written")


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
    """The next text of the row, where a row is several: what was rejected, beside what was chosen."""
    given: Row | None = None
    """The row itself, where its texts are needed beside its tokens: to grade what the network answers,
    or to say where in them something was found."""
    group: int | None = None
    """Rows with the same number are computed in one micro-batch, as their loss needs all of them."""
    desirable: bool | None = None
    """Whether people want such an answer, where rows come one by one."""
    media: MediaInput | None = None
    """The image or sound that the network reads: ``ids_T`` is then one token, a hash of it, or the
    text that a decoder writes of it."""
    reference: float | None = None
    """Log-probability of the learned tokens under the reference model, where it is known ahead."""

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def sides(self) -> list[Example]:
        """The texts of the row, each alone: itself, its partner, the partner of that, and so on."""
        chain: list[Example] = []
        side = self
        while side.partner is not None:
            chain, side = [*chain, replace(side, partner=None)], side.partner
        return [*chain, side]

    @staticmethod
    def of_sides(sides: Sequence[Example]) -> Example:
        """A row of several texts, the way back from :attr:`sides`."""
        *others, example = sides
        for side in reversed(others):
            example = replace(side, partner=example)
        return example

    @property
    def tokens(self) -> int:
        """Tokens that the network reads, the encoder's included; an image and its text are one."""
        if self.media is not None:
            return 1
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

    total: Tensor
    """Scalar tensor with a gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further sums, divided by the same weight before they are shown."""
    ratios: Mapping[str, tuple[ArrayLike, ArrayLike]] = field(default_factory=dict)
    """A part and a whole for each row, whose sums are divided: F1 is no mean over rows. ``loss`` is the
    loss of each row, where that is one number: its mean is known less well than one over tokens."""
    states: Tensor | None = None
    """States of the rows ``[R, …]`` without a gradient, for metrics of all rows."""

    @staticmethod
    def of_rows(
        each_R: Tensor,
        metrics: Mapping[str, float],
        ratios: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
        states: Tensor | None = None,
    ) -> Loss:
        """The sum of the losses ``[R]`` of single rows."""
        own = {"loss": (each_R.tolist(), [1] * len(each_R))}
        return Loss(each_R.sum(), metrics, own | dict(ratios or {}), states)
