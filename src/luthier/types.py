"""Plain data types shared by all packages, without heavy imports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.errors import Location

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.inputs import Media, MediaInput

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


TemplateKwargs = Mapping[str, bool | int | float | str]
"""Variables of a chat template, such as ``enable_thinking``: transformers'
``chat_template_kwargs``."""

IMAGE_MARK = "\ufffc"
"""Unicode's object replacement character: the place of an image in the text of a turn."""
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
"""Marks around a tool call in the text of most models."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"}, hash=False)
    """JSON schema of the arguments."""


LongRows = Literal["error", "drop", "truncate"]
"""How to handle rows longer than the context."""
Part = Literal["input", "target", "other"]
"""Role of a text: model ``input``, learned or preferred ``target``, or ``other`` (a grader's
reference, a rejected answer)."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a row."""

    field: str
    """Name in messages: ``prompt``, ``messages[2].content``, ``tokens``."""
    content: str
    part: Part


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply ``change`` to every string in a JSON value, except for object keys."""
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
    """A function call requested by an assistant."""

    id: str
    name: str
    arguments: Mapping[str, Any] = field(hash=False)

    @property
    def arguments_json(self) -> str:
        """Arguments as JSON text, as in OpenAI's form."""
        return json.dumps(dict(self.arguments), ensure_ascii=False)

    @property
    def text(self) -> str:
        """Call as text, for display and comparison."""
        return f"{self.name} {self.arguments_json}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, tool calls and their results included."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str = ""
    learned: bool = True
    """False for an assistant turn that serves as context only."""
    calls: tuple[ToolCall, ...] = ()
    """Calls requested by the assistant."""
    call_id: str = ""
    """Id of the call that a tool turn answers."""
    reasoning: str = ""
    """Reasoning before the assistant's answer or call."""
    images: tuple[Media, ...] = ()
    """Images of the turn, in the order of the characters :data:`IMAGE_MARK` in ``content``."""

    @property
    def parts(self) -> list[str | Media]:
        """Text and images of the content, in order."""
        if not self.images:
            return [self.content]
        texts = self.content.split(IMAGE_MARK)
        mixed = zip_longest(texts, self.images)
        return [part for pair in mixed for part in pair if part]

    @property
    def whole_text(self) -> str:
        """Content, reasoning and calls, for comparison of turns."""
        reasoning = [self.reasoning] if self.reasoning else []
        images = [media.identity for media in self.images]
        return "\n".join([self.content, *images, *reasoning, *(call.text for call in self.calls)])

    def texts(self, name: str, part: Part) -> Iterator[Text]:
        """Yield all texts of the turn, with field names under ``name``."""
        if self.reasoning:
            yield Text(f"{name}.reasoning", self.reasoning, part)
        if self.content or not self.calls:
            yield Text(f"{name}.content", self.content, part)
        for place, call in enumerate(self.calls, 1):
            yield Text(f"{name}.tool_calls[{place}]", call.text, part)

    def edit_texts(self, name: str, change: Callable[[str, str], str]) -> Message:
        """Return the turn with each text replaced by ``change(field, text)``, including call
        arguments."""
        reasoning = change(f"{name}.reasoning", self.reasoning) if self.reasoning else ""
        content = change(f"{name}.content", self.content)
        calls = []
        for place, call in enumerate(self.calls, 1):
            text = partial(change, f"{name}.tool_calls[{place}]")
            calls.append(replace(call, arguments=map_texts(dict(call.arguments), text)))
        return replace(self, content=content, reasoning=reasoning, calls=tuple(calls))

    @property
    def reply_text(self) -> str:
        """Content with calls as JSON: the output of a model without its own call format."""
        calls = [
            json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
            for call in self.calls
        ]
        if not calls:
            return self.content
        if len(calls) == 1 and not self.content:
            return calls[0]
        # Tags separate several calls.
        marked = [f"{CALL_OPEN}\n{call}\n{CALL_CLOSE}" for call in calls]
        return "\n".join([*([self.content] if self.content else []), *marked])

    def to_dict(self) -> dict[str, Any]:
        """Return the turn in OpenAI's form for JSON, without the training mark."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.images:
            turn["content"] = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image_url", "image_url": {"url": part.address}}
                for part in self.parts
            ]
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
    """One checked row of a data set, with the interface of all shapes.

    The shapes are subclasses in ``luthier.data.shapes``.
    """

    shape: ClassVar[str] = ""
    """Name of the shape, as in ``Objective.shapes``."""
    parts: ClassVar[Mapping[str, Part]] = {}
    """Text fields in the order of the model's input."""
    annotated: ClassVar[bool] = False
    """True if the target is a name or a number instead of a text."""

    file: str
    line: int
    """1-based line in ``file``, or :class:`~luthier.errors.RowNumber`; 1 for a plain-text file."""

    @property
    def location(self) -> Location:
        """File and line of the row."""
        return Location(self.file, self.line)

    @property
    def members(self) -> Mapping[str, Any] | None:
        """Other keys of a prompt row, for graders."""
        return None

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Functions that the assistant may call."""
        return ()

    def texts(self) -> Iterator[Text]:
        """Yield all texts of the row in the order of the model's input.

        A field of :attr:`parts` is a text, a tuple of texts, or turns. Assistant turns have the
        field's role; other turns are inputs.
        """
        for name, part in self.parts.items():
            value = getattr(self, name)
            if isinstance(value, str):
                yield Text(name, value, part)
            elif value and isinstance(value[0], str):
                yield Text(name, " ".join(value), part)
            elif value is not None:
                context_part: Part = "other" if part == "other" else "input"
                for number, turn in enumerate(value, 1):
                    side = part if turn.role == "assistant" else context_part
                    yield from turn.texts(f"{name}[{number}]", side)

    def edit_texts(self, change: Callable[[str, str], str]) -> Self:
        """Return the row with each text replaced by ``change(field, text)``; see :meth:`texts`.

        Words, and several texts in one field, are changed one by one.
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
        """Return the inputs of the first answer; rows with equal inputs are duplicates."""
        return ()

    def targets(self) -> tuple[str, ...]:
        """Return the targets for :meth:`inputs`; empty for raw text and bare prompts."""
        return ()

    def turns(self) -> tuple[Message, ...]:
        """Return the row as a conversation that ends with the preferred answer; empty for other
        rows."""
        return ()

    def prompt_turns(self) -> tuple[Message, ...]:
        """Return the turns before a reply; empty for a row without a prompt."""
        turns = self.turns()
        return turns[:-1] if turns and turns[-1].role == "assistant" else turns

    def expected_reply(self) -> str | None:
        """Return the reference text for a reply to :meth:`prompt_turns`, if any."""
        turns = self.turns()
        return turns[-1].reply_text if turns and turns[-1].role == "assistant" else None

    @property
    def other_replies(self) -> tuple[str, ...]:
        """Other correct replies: a grader keeps the best score."""
        return ()

    @property
    def images(self) -> tuple[Media, ...]:
        """Images in the turns of the row."""
        return tuple(media for turn in self.turns() for media in turn.images)

    def plain_text(self) -> str:
        """Return the whole row as one text, for networks without a conversation format."""
        return "\n\n".join(turn.reply_text for turn in self.turns())

    def excerpt(self) -> str:
        """Return a short description of a row without text: the name of an image."""
        return ""

    def classes(self) -> tuple[str, ...]:
        """Return the strata of the row in a stratified split: labels or a judgement."""
        return ()

    def bare(self) -> Row:
        """Return the row without its target: label, rating, tags or partner."""
        return self

    def sides(self) -> list[Row]:
        """Return one bare row per network input: the row itself, both texts of a pair, each answer."""
        return [self.bare()]

    def input_record(self) -> dict[str, object]:
        """Return the input as a JSON object, for files of predictions."""
        return {"text": self.plain_text()}

    def target(self) -> object:
        """Return the target of a model that predicts, as a JSON value; ``None`` without a target."""
        return None

    def record(self) -> dict[str, object]:
        """Return the row as a JSON object with the keys of its shape."""
        raise TypeError("a row of no shape cannot be written")


def weight_at_end(count: int) -> FloatArray:
    """Return the weights ``[T]`` of a row with a single target, which is at the last token."""
    weight_T = np.zeros(count, dtype=np.float32)
    weight_T[-1] = 1
    return weight_T


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids with the loss weight of each token.

    If ``target`` is ``None``, the tokens are the targets: ``weight_T[t]`` is the weight of
    predicting ``ids_T[t]`` from ``ids_T[:t]``, and ``weight_T[0]`` is 0. Otherwise the objective
    defines ``target``, and ``weight_T`` is the weight of each token's target. The weight of a
    single target per row is at the last token.
    """

    ids_T: IntArray
    weight_T: FloatArray
    row: int
    """Number of the row, unique within one split, for messages and caching."""
    target: NDArray[Any] | None = None
    source_T: IntArray | None = None
    """Input ids of the encoder in an encoder-decoder; ``ids_T`` are the decoder's."""
    partner: Example | None = None
    """Next text of a row with several texts, such as the rejected answer."""
    source_row: Row | None = None
    """The original row, for objectives that need the text: graders and character positions."""
    group: int | None = None
    """Rows with the same number share a micro-batch, because the loss needs all of them."""
    desirable: bool | None = None
    """True for a desired answer; for objectives with single judged answers."""
    media: MediaInput | None = None
    """Image or audio input: ``ids_T`` is then one token, a hash of the input, or the decoder's
    text."""
    segment_T: IntArray | None = None
    """Segment of each token in a pair of texts: ``token_type_ids`` of BERT-like encoders."""
    images: tuple[Media, ...] = ()
    """Images of the image tokens in ``ids_T``."""
    reference: float | None = None
    """Precomputed log-probability of the learned tokens under the reference model."""

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def sides(self) -> list[Example]:
        """All texts of the row as separate examples: the row, its partner, the partner's partner,
        and so on."""
        chain: list[Example] = []
        side = self
        while side.partner is not None:
            chain, side = [*chain, replace(side, partner=None)], side.partner
        return [*chain, side]

    @staticmethod
    def from_sides(sides: Sequence[Example]) -> Example:
        """Return one example for several texts, the inverse of :attr:`sides`."""
        *others, example = sides
        for side in reversed(others):
            example = replace(side, partner=example)
        return example

    @property
    def tokens(self) -> int:
        """Number of input tokens, including the encoder's; an image counts as one."""
        if self.media is not None:
            return 1
        return len(self.ids_T) + (0 if self.source_T is None else len(self.source_T))

    @property
    def longest(self) -> int:
        """Length of the longer of encoder and decoder sequence, for the context limit."""
        return (
            len(self.ids_T) if self.source_T is None else max(len(self.ids_T), len(self.source_T))
        )

    @property
    def weight(self) -> float:
        """Weight of the row in a mean over rows or tokens."""
        return float(self.weight_T.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Loss:
    """A **sum** over the micro-batch. Only the engine divides, once, by the global weight."""

    total: Tensor
    """Scalar tensor with a gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Additional sums, divided by the same weight for display."""
    ratios: Mapping[str, tuple[ArrayLike, ArrayLike]] = field(default_factory=dict)
    """Numerator and denominator per row, summed before the division, for metrics such as F1 that
    are not means over rows. ``loss`` is the loss per row, for the standard error of the mean."""
    states: Tensor | None = None
    """States of the rows ``[R, …]`` without a gradient, for metrics of all rows."""

    @staticmethod
    def from_rows(
        each_R: Tensor,
        metrics: Mapping[str, float],
        ratios: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
        states: Tensor | None = None,
    ) -> Loss:
        """The sum of the losses ``[R]`` of single rows."""
        own = {"loss": (each_R.tolist(), [1] * len(each_R))}
        return Loss(each_R.sum(), metrics, own | dict(ratios or {}), states)
