"""The shapes of rows: of each its keys, its checks, its texts, what it teaches and how it is written.

A shape is a class with the fields it needs. :data:`SHAPES` is the table, by the names that objectives
give in ``shapes``. To add one, write a class and put it into the table: reading, writing, tables,
splits, the gate and the graders ask the class (:class:`luthier.types.Row` says what).

What people prefer has several spellings. ``{"prompt", "chosen", "rejected"}``, where the prompt is a
text or a list of messages and each answer a text, a message or a list of messages; the same without
a prompt, where both are whole conversations with a common beginning; OpenAI's form ``{"input":
{"messages"}, "preferred_output", "non_preferred_output"}``; ``{"prompt", "completion"}`` with a
``rating`` (or ``score``), or with ``label: true`` or ``false`` (or ``thumb: "up"`` or ``"down"``). A
rejected answer may be empty: not to stop at once is a lesson. An empty chosen one is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

from luthier.data.fields import (
    FieldChecker,
    Turns,
    check_calls,
    check_not_blank,
    check_turn_order,
    read_label,
    read_prompt,
    read_rating,
    read_tagged,
    read_turns,
)
from luthier.data.media import PLURAL, Media, MediaKind
from luthier.data.parsing import Record, json_kind, quote
from luthier.data.spool import spool
from luthier.data.tools import describe_tool
from luthier.errors import DataError, Problem, RowRefused
from luthier.types import Message, Part, Row, Text, Tool

InputKind = MediaKind | Literal["text"]
"""What a network has to read."""
MOST_ANSWERS = 64
"""Ranked answers of a row; listwise DPO computes them in one micro-batch."""
ENOUGH_ANSWERS = 50
"""Rows that say what is right: the fewest with which providers of fine-tuning report a clear gain."""
ENOUGH_HINTS = 100
"""Rows that only say which is better, what belongs together or what is asked: each tells less."""
LONGEST_CLASS = 64
"""Characters of a completion that may be the name of a class."""


class Shape(Row):
    """Base of all shapes: how records of it are told and read."""

    __slots__ = ()

    title: ClassVar[str]
    """Its keys, for messages."""
    words: ClassVar[str]
    """What its rows are, for messages."""
    keys: ClassVar[tuple[str, ...]]
    """Any of these keys of a record tells the shape."""
    complete: ClassVar[tuple[frozenset[str], ...]] = ()
    """Sets of keys that make a record one of this shape whatever else is there."""
    further_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that are read beside those."""
    beside: ClassVar[frozenset[str]] = frozenset()
    """Those of all these that records in the forms of other tools have too."""
    json_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys whose cells hold JSON in a table of texts."""
    number_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys whose cells hold a number."""
    object_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that may hold objects."""
    reads: ClassVar[InputKind] = "text"
    """What a network has to read for such rows."""
    reader_text: ClassVar[str] = ""
    """What an encoder reads such rows for; empty where it has nothing to say of them."""
    enough: ClassVar[int] = 0
    """Training rows with which more than their form is learned; 0 where it is not rows that count."""

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Whether a record has keys of this shape."""
        return any(key in record for key in cls.keys)

    @classmethod
    def source_keys(cls) -> frozenset[str]:
        """Keys that such a row may have been read from; others stand beside it."""
        return cls.further_keys.union(cls.keys, *cls.complete)

    @classmethod
    def title_of(cls, record: Record) -> str:
        """The keys in which a record of this shape is written."""
        return cls.title

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """The row of a record of this shape; ``None`` where a problem was noted.

        Raises:
            RowRefused: with a problem that is not noted yet.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class PromptCompletion(Shape):
    """A prompt and the reply to learn."""

    shape: ClassVar[str] = "prompt"
    title: ClassVar[str] = '{"prompt", "completion"}'
    words: ClassVar[str] = "prompt and completion"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("prompt", "completion")),)
    parts: ClassVar[Mapping[str, Part]] = {"prompt": "input", "completion": "target"}

    prompt: str
    completion: str

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Both texts, neither blank."""
        prompt = fields.text(record, "prompt")
        completion = fields.text(record, "completion", target=True)
        if prompt is None or completion is None:
            return None
        return cls(fields.file, fields.line, prompt, completion)

    def inputs(self) -> tuple[str, ...]:
        """The prompt."""
        return (self.prompt,)

    def targets(self) -> tuple[str, ...]:
        """The completion."""
        return (self.completion,)

    def turns(self) -> Turns:
        """One of the user, one of the assistant."""
        return (Message("user", self.prompt), Message("assistant", self.completion))

    def classes(self) -> tuple[str, ...]:
        """The completion, where it is short enough to be the name of a class."""
        return (self.completion,) if len(self.completion) <= LONGEST_CLASS else ()

    def record(self) -> Record:
        """Both texts."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True, slots=True)
class Conversation(Shape):
    """Turns of a conversation; those of the assistant are learned."""

    shape: ClassVar[str] = "messages"
    title: ClassVar[str] = '{"messages"}'
    words: ClassVar[str] = "messages"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("messages",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("messages",)),)
    further_keys: ClassVar[frozenset[str]] = frozenset(("tools", "toolConfig", "prompt", "input"))
    json_keys: ClassVar[frozenset[str]] = frozenset(("messages", "tools"))
    parts: ClassVar[Mapping[str, Part]] = {"messages": "target", "expected": "other"}

    messages: Turns
    expected: str | None = None
    """Answer that a reply to what is only asked is graded by; it is never learned."""
    members: Mapping[str, Any] | None = field(default=None, kw_only=True)
    tools: tuple[Tool, ...] = field(default=(), kw_only=True)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Turns in their order, the assistant's at the end, and the tools that it may call."""
        messages, tools = fields.messages(record["messages"]), fields.tools(record)
        if messages is None:
            return None
        check_calls(messages, tools)
        return cls(fields.file, fields.line, messages, tools=tools)

    def inputs(self) -> tuple[str, ...]:
        """The turns before the last of the assistant, with who speaks."""
        return tuple(f"{turn.role}: {turn.whole_text}" for turn in self.prompt_turns())

    def targets(self) -> tuple[str, ...]:
        """The last turn, where it is the assistant's."""
        last = self.messages[-1]
        return (last.whole_text,) if last.role == "assistant" else ()

    def turns(self) -> Turns:
        """All turns."""
        return self.messages

    def expected_reply(self) -> str | None:
        """What is expected, or else the last turn of the assistant."""
        last = self.messages[-1]
        return self.expected or (last.reply_text if last.role == "assistant" else None)

    def record(self) -> Record:
        """Who says what, and the tools."""
        record: Record = {"messages": [turn.to_dict() for turn in self.messages]}
        if self.tools:
            record["tools"] = [describe_tool(tool) for tool in self.tools]
        return record


@dataclass(frozen=True, slots=True)
class TextRow(Shape):
    """Base of the shapes that say something of a text."""

    text: str

    def inputs(self) -> tuple[str, ...]:
        """The text."""
        return (self.text,)

    def plain_text(self) -> str:
        """The text."""
        return self.text

    def bare(self) -> RawText:
        """The text alone."""
        return RawText(self.file, self.line, self.text)


@dataclass(frozen=True, slots=True)
class RawText(TextRow):
    """A text to learn as it is."""

    shape: ClassVar[str] = "text"
    title: ClassVar[str] = '{"text"}'
    words: ClassVar[str] = "raw text"
    keys: ClassVar[tuple[str, ...]] = ("text",)
    parts: ClassVar[Mapping[str, Part]] = {"text": "target"}

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """A text that is not blank."""
        text = fields.text(record, "text", target=True)
        return None if text is None else cls(fields.file, fields.line, text)

    def record(self) -> Record:
        """The text."""
        return {"text": self.text}


class Labelled(Shape):
    """Base of the shapes that say of which class something is, or of which classes."""

    __slots__ = ()

    annotated: ClassVar[bool] = True
    reader_text: ClassVar[str] = "labels"

    label: str | tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Its labels, also where it is the only one."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def has_one_label(self) -> bool:
        """Whether that is one, alone or in an array; not none, and not several."""
        return isinstance(self.label, str) or len(self.label) == 1

    def targets(self) -> tuple[str, ...]:
        """Its labels, sorted."""
        return tuple(sorted(self.labels))

    def classes(self) -> tuple[str, ...]:
        """Its labels."""
        return self.labels

    def label_record(self) -> Record:
        """Label, or array of labels."""
        return {"label": self.label if isinstance(self.label, str) else list(self.label)}


def takes_several_labels(rows: int, arrays: int, unlike_one: int) -> bool:
    """Whether labelled rows say that a row may have several labels: one does not have one, or all are
    arrays. An array of one label among single ones is a way to write it, no other task.

    Args:
        rows: all of them.
        arrays: those whose labels are an array.
        unlike_one: those of them that do not have one label.
    """
    return unlike_one > 0 or 0 < rows == arrays


@dataclass(frozen=True, slots=True)
class LabelledText(TextRow, Labelled):
    """A text and its class; several where it may have more than one, also none at all."""

    shape: ClassVar[str] = "label"
    title: ClassVar[str] = '{"text", "label"}'
    words: ClassVar[str] = "text with labels"
    keys: ClassVar[tuple[str, ...]] = ("label",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("text", "label")),)
    beside: ClassVar[frozenset[str]] = frozenset(("label",))
    parts: ClassVar[Mapping[str, Part]] = {"text": "input"}

    label: str | tuple[str, ...]

    @classmethod
    def matches(cls, record: Record) -> bool:
        """A label, and no image or sound that it would be of."""
        return "label" in record and not any(kind in record for kind in MEDIA_KEYS)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """A text, and a label or an array of them."""
        text = fields.text(record, "text")
        label = read_label(record["label"])
        return None if text is None else cls(fields.file, fields.line, text, label)

    def record(self) -> Record:
        """Text and label, or array of labels."""
        return {"text": self.text, **self.label_record()}


MEDIA_KEYS: tuple[MediaKind, ...] = ("image", "audio", "window")
"""Keys that hold an image, a sound or a time series, called as what they hold."""
CAPTION_KEYS = ("caption", "text")
"""Keys that hold what an image shows, or what is written on it; the first that is there is read."""


@dataclass(frozen=True, slots=True)
class MediaRow(Shape):
    """Base of the shapes that say something of an image or a sound."""

    media: Media

    @classmethod
    def key(cls) -> MediaKind:
        """The key that holds it."""
        assert cls.reads != "text"
        return cls.reads

    def inputs(self) -> tuple[str, ...]:
        """The hash of its bytes: what makes two rows the same; its name where it cannot be read."""
        try:
            return (self.media.digest(),)
        except RowRefused:  # the gate says why (gate/checks/media.py)
            return (self.media.name,)

    def excerpt(self) -> str:
        """Where it lies."""
        return self.media.name

    def bare(self) -> MediaRow:
        """The image or sound alone."""
        return BARE_MEDIA[self.media.kind](self.file, self.line, self.media)

    def record(self) -> Record:
        """Where it lies."""
        return {self.key(): self.media.name}


@dataclass(frozen=True, slots=True)
class BareMedia(MediaRow):
    """Base of the shapes of which nothing is said."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """What is there."""
        media = fields.media(record, cls.key())
        return None if media is None else cls(fields.file, fields.line, media)


@dataclass(frozen=True, slots=True)
class BareImage(BareMedia):
    """An image of which nothing is said."""

    shape: ClassVar[str] = "image"
    reads: ClassVar[InputKind] = "image"
    title: ClassVar[str] = '{"image"}'
    words: ClassVar[str] = PLURAL["image"]
    keys: ClassVar[tuple[str, ...]] = ("image",)

    @classmethod
    def matches(cls, record: Record) -> bool:
        """An image, and nothing that is said of it."""
        return cls.key() in record and not any(key in record for key in ("label", *CAPTION_KEYS))


@dataclass(frozen=True, slots=True)
class BareAudio(BareMedia):
    """A sound of which nothing is said."""

    shape: ClassVar[str] = "audio"
    reads: ClassVar[InputKind] = "audio"
    title: ClassVar[str] = '{"audio"}'
    words: ClassVar[str] = PLURAL["audio"]
    keys: ClassVar[tuple[str, ...]] = ("audio",)

    @classmethod
    def matches(cls, record: Record) -> bool:
        """A sound, and no label."""
        return cls.key() in record and "label" not in record


@dataclass(frozen=True, slots=True)
class BareWindow(BareMedia):
    """A value of a time series, with those before it."""

    shape: ClassVar[str] = "window"
    reads: ClassVar[InputKind] = "window"
    title: ClassVar[str] = '{"window"}'
    words: ClassVar[str] = PLURAL["window"]
    keys: ClassVar[tuple[str, ...]] = ("window",)

    @classmethod
    def matches(cls, record: Record) -> bool:
        """A window."""
        return cls.key() in record

    def inputs(self) -> tuple[str, ...]:
        """A hash of where it lies: times of equal values are no copies of each other."""
        return (hashlib.sha256(self.media.name.encode()).hexdigest(),)


BARE_MEDIA: Mapping[MediaKind, type[BareMedia]] = {
    "image": BareImage,
    "audio": BareAudio,
    "window": BareWindow,
}
"""Shape of what is only read, by what it is."""


@dataclass(frozen=True, slots=True)
class LabelledImage(MediaRow, Labelled):
    """An image and its class; several where it may have more than one, also none at all."""

    shape: ClassVar[str] = "labelled_image"
    reads: ClassVar[InputKind] = "image"
    title: ClassVar[str] = '{"image", "label"}'
    words: ClassVar[str] = "images with labels"
    keys: ClassVar[tuple[str, ...]] = ("image", "label")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("image", "label")),)

    label: str | tuple[str, ...]

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Both keys."""
        return cls.key() in record and "label" in record

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """An image, and a label or an array of them."""
        media = fields.media(record, cls.key())
        label = read_label(record["label"])
        return None if media is None else cls(fields.file, fields.line, media, label)

    def record(self) -> Record:
        """Where it lies, and label or array of labels."""
        return {**MediaRow.record(self), **self.label_record()}


@dataclass(frozen=True, slots=True)
class LabelledAudio(LabelledImage):
    """A sound and its class; several where it may have more than one, also none at all."""

    shape: ClassVar[str] = "labelled_audio"
    reads: ClassVar[InputKind] = "audio"
    title: ClassVar[str] = '{"audio", "label"}'
    words: ClassVar[str] = "sounds with labels"
    keys: ClassVar[tuple[str, ...]] = ("audio", "label")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("audio", "label")),)


@dataclass(frozen=True, slots=True)
class CaptionedImage(MediaRow):
    """An image and a text: what it shows, or what is written on it."""

    shape: ClassVar[str] = "captioned_image"
    reads: ClassVar[InputKind] = "image"
    title: ClassVar[str] = '{"image", "caption"}'
    words: ClassVar[str] = "images with captions"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("image", "caption")
    complete: ClassVar[tuple[frozenset[str], ...]] = tuple(
        frozenset(("image", key)) for key in CAPTION_KEYS
    )
    parts: ClassVar[Mapping[str, Part]] = {"caption": "target"}

    caption: str

    @classmethod
    def matches(cls, record: Record) -> bool:
        """An image and a caption; the text beside a label is a remark."""
        return cls.key() in record and (
            "caption" in record or ("text" in record and "label" not in record)
        )

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """An image, and a caption that is not blank."""
        media = fields.media(record, cls.key())
        key = next(key for key in CAPTION_KEYS if key in record)
        caption = fields.text(record, key, target=True)
        if media is None or caption is None:
            return None
        return cls(fields.file, fields.line, media, caption)

    def targets(self) -> tuple[str, ...]:
        """The caption."""
        return (self.caption,)

    def sides(self) -> list[Row]:
        """The image, and the caption."""
        return [self.bare(), RawText(self.file, self.line, self.caption)]

    def record(self) -> Record:
        """Where it lies, and the caption."""
        return {**MediaRow.record(self), "caption": self.caption}


@dataclass(frozen=True, slots=True)
class RatedText(TextRow):
    """A text and a number that belongs to it."""

    shape: ClassVar[str] = "rating"
    title: ClassVar[str] = '{"text", "rating"}'
    words: ClassVar[str] = "text with ratings"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("rating",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("text", "rating")),)
    further_keys: ClassVar[frozenset[str]] = frozenset(("score",))
    beside: ClassVar[frozenset[str]] = frozenset(("rating", "score"))
    number_keys: ClassVar[frozenset[str]] = frozenset(("rating", "score"))
    parts: ClassVar[Mapping[str, Part]] = {"text": "input"}
    annotated: ClassVar[bool] = True
    reader_text: ClassVar[str] = "ratings"

    rating: float

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """A text and a finite number."""
        text = fields.text(record, "text")
        rating = read_rating(record["rating"])
        return None if text is None else cls(fields.file, fields.line, text, rating)

    def targets(self) -> tuple[str, ...]:
        """The number."""
        return (repr(self.rating),)

    def record(self) -> Record:
        """Text and number."""
        return {"text": self.text, "rating": self.rating}


@dataclass(frozen=True, slots=True)
class TaggedWords(Shape):
    """Words of a sentence, each with a tag."""

    shape: ClassVar[str] = "tags"
    title: ClassVar[str] = '{"tokens", "tags"}'
    words: ClassVar[str] = "tokens with tags"
    keys: ClassVar[tuple[str, ...]] = ("tokens",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("tokens", "tags")),)
    json_keys: ClassVar[frozenset[str]] = frozenset(("tokens", "tags"))
    parts: ClassVar[Mapping[str, Part]] = {"tokens": "input"}
    annotated: ClassVar[bool] = True
    reader_text: ClassVar[str] = "tags"

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    """In the BIO scheme; ``None`` where they are to be found."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """As many words as tags."""
        tokens, tags = read_tagged(record.get("tokens"), record.get("tags"))
        return cls(fields.file, fields.line, tokens, tags)

    def inputs(self) -> tuple[str, ...]:
        """The words."""
        return self.tokens

    def targets(self) -> tuple[str, ...]:
        """The tags."""
        return self.tags or ()

    def plain_text(self) -> str:
        """The words with spaces between."""
        return " ".join(self.tokens)

    def bare(self) -> TaggedWords:
        """The words without their tags."""
        return replace(self, tags=None)

    def record(self) -> Record:
        """Words and tags."""
        return {"tokens": list(self.tokens), "tags": list(self.tags or ())}


@dataclass(frozen=True, slots=True)
class TextPair(TextRow):
    """Two texts that belong together."""

    shape: ClassVar[str] = "pair"
    title: ClassVar[str] = '{"anchor", "positive"}'
    words: ClassVar[str] = "pairs of anchor and positive"
    enough: ClassVar[int] = ENOUGH_HINTS
    keys: ClassVar[tuple[str, ...]] = ("anchor", "positive")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("anchor", "positive")),)
    further_keys: ClassVar[frozenset[str]] = frozenset(("text",))
    parts: ClassVar[Mapping[str, Part]] = {"text": "input", "positive": "target"}
    reader_text: ClassVar[str] = "partners"

    positive: str
    """Partner of ``text``."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Both texts, neither blank."""
        anchor, positive = fields.text(record, "anchor"), fields.text(record, "positive")
        if anchor is None or positive is None:
            return None
        return cls(fields.file, fields.line, anchor, positive)

    def targets(self) -> tuple[str, ...]:
        """The partner."""
        return (self.positive,)

    def sides(self) -> list[Row]:
        """Each text alone."""
        return [RawText(self.file, self.line, text) for text in (self.text, self.positive)]

    def record(self) -> Record:
        """Both texts."""
        return {"anchor": self.text, "positive": self.positive}


MOST_ITEMS = 1_000
"""Items of a history."""


@dataclass(frozen=True, slots=True)
class History(TextPair):
    """Items that somebody chose, the latest last, and the item that came next.

    As a pair it is the items, a line for each, beside the next one. The latest stands first there: a
    text that is too long loses its end.
    """

    shape: ClassVar[str] = "history"
    title: ClassVar[str] = '{"history", "item"}'
    words: ClassVar[str] = "histories with the next item"
    keys: ClassVar[tuple[str, ...]] = ("history",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("history", "item")),)
    further_keys: ClassVar[frozenset[str]] = frozenset()
    reader_text: ClassVar[str] = "items"

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Both keys: conversations have histories, too."""
        return "history" in record and "item" in record

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Items of one line each, at least one before the next."""
        items, item = record["history"], fields.text(record, "item")
        if not isinstance(items, list) or not 1 <= len(items) <= MOST_ITEMS:
            count = f"has {len(items):,}" if isinstance(items, list) else f"is {json_kind(items)}"
            raise RowRefused(
                "history.type",
                f'"history" must be an array of 1 to {MOST_ITEMS:,} items, but {count}.',
                'Write "history": ["an item", "a later one"].',
            )
        if item is None:
            return None
        for each in (*items, item):
            if not isinstance(each, str) or not each.strip() or len(each.splitlines()) > 1:
                raise RowRefused(
                    "history.item",
                    "an item is not a text of one line, by which it is known.",
                    "Write each item as one line, the same in every row.",
                )
        return cls(fields.file, fields.line, "\n".join(reversed(items)), item)

    @property
    def items(self) -> list[str]:
        """What was chosen before, the latest first."""
        return self.text.split("\n")

    def record(self) -> Record:
        """The items in their order, and the next one."""
        return {"history": self.items[::-1], "item": self.positive}


MOST_CHOICES = 100
"""Choices of a row."""


@dataclass(frozen=True, slots=True)
class MultipleChoice(Shape):
    """A text and what may follow it, one of which is right; for measuring, nothing is learned from it.

    With one choice it is a cloze: that, and nothing else, is what should follow. The texts before may
    differ instead, one for each choice, as in WinoGrande (Sakaguchi et al. 2020).
    """

    shape: ClassVar[str] = "choices"
    title: ClassVar[str] = '{"prompt", "choices", "answer"}'
    words: ClassVar[str] = "prompts with choices"
    keys: ClassVar[tuple[str, ...]] = ("choices",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("prompt", "choices", "answer")),)
    json_keys: ClassVar[frozenset[str]] = frozenset(("choices",))
    number_keys: ClassVar[frozenset[str]] = frozenset(("answer",))
    parts: ClassVar[Mapping[str, Part]] = {"prompts": "input", "choices": "other"}

    prompts: tuple[str, ...]
    """One for all choices, or one for each."""
    choices: tuple[str, ...]
    answer: int
    """Place of the right one, from 0."""

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Choices with the right one, or one choice alone; others stand beside what a grader reads."""
        tells = "answer" in record or isinstance(record.get("choices"), str)
        other = {"completion", "expected", "messages", "rejected"} & record.keys()
        return "prompt" in record and "choices" in record and tells and not other

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Texts that are not blank, and the place of the right one."""
        prompts, choices = _one_or_more(record, "prompt"), _one_or_more(record, "choices")
        answer = record.get("answer", 0 if len(choices) == 1 else None)
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # cells of a table
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise RowRefused(
                "choices.answer",
                f'"answer" must be the place of the right choice, from 0 to {len(choices) - 1}.',
                "Count from 0: the first choice is 0.",
            )
        if len(choices) > MOST_CHOICES or len(prompts) not in (1, len(choices)):
            raise RowRefused(
                "choices.length",
                f"The row has {len(prompts):,} prompts and {len(choices):,} choices.",
                f"Give one prompt, or one for each choice, and at most {MOST_CHOICES} choices.",
            )
        return cls(fields.file, fields.line, prompts, choices, answer)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each choice behind its prompt."""
        prompts = self.prompts if len(self.prompts) > 1 else self.prompts * len(self.choices)
        return list(zip(prompts, self.choices, strict=True))

    def inputs(self) -> tuple[str, ...]:
        """The prompt, or each of several."""
        return self.prompts

    def targets(self) -> tuple[str, ...]:
        """The right choice."""
        return (self.choices[self.answer],)

    def plain_text(self) -> str:
        """The prompts."""
        return "\n".join(self.prompts)

    def record(self) -> Record:
        """Prompt or prompts, choices, and the place of the right one."""
        prompt = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        return {"prompt": prompt, "choices": list(self.choices), "answer": self.answer}


def _one_or_more(record: Record, key: str) -> tuple[str, ...]:
    """A text, or an array of texts, none of them blank."""
    value = record[key]
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts):
        return tuple(texts)
    found = json_kind(value) if not isinstance(value, str | list) else "blank, empty or mixed"
    raise RowRefused(
        "choices.type",
        f'"{key}" must be a text or an array of texts, but is {found}.',
        'Write {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}.',
    )


@dataclass(frozen=True, slots=True)
class PromptOnly(Shape):
    """What is asked, without a reply to learn."""

    shape: ClassVar[str] = "prompt_only"
    title: ClassVar[str] = '{"prompt"}'
    words: ClassVar[str] = "a prompt without a reply"
    enough: ClassVar[int] = ENOUGH_HINTS
    keys: ClassVar[tuple[str, ...]] = ("prompt",)
    further_keys: ClassVar[frozenset[str]] = frozenset(("expected",))
    beside: ClassVar[frozenset[str]] = frozenset(("expected",))
    parts: ClassVar[Mapping[str, Part]] = {"prompt": "input", "expected": "other"}

    prompt: str
    expected: str | None = None
    """Answer that a reply is graded by; it is never learned."""
    members: Mapping[str, Any] | None = field(default=None, kw_only=True)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """What is asked, and the answer expected where the row tells it."""
        expected = fields.text(record, "expected") if "expected" in record else None
        prompt = fields.text(record, "prompt")
        if prompt is None or (expected is None and "expected" in record):
            return None
        return cls(fields.file, fields.line, prompt, expected)

    def inputs(self) -> tuple[str, ...]:
        """The prompt."""
        return (self.prompt,)

    def turns(self) -> Turns:
        """What the user asks."""
        return (Message("user", self.prompt),)

    def expected_reply(self) -> str | None:
        """What is expected."""
        return self.expected

    def record(self) -> Record:
        """The prompt, and what is expected."""
        expected = {} if self.expected is None else {"expected": self.expected}
        return {"prompt": self.prompt, **expected}


@dataclass(frozen=True, slots=True)
class JudgedAnswers(Shape):
    """Base of the shapes in which people judged answers to a prompt."""

    enough: ClassVar[int] = ENOUGH_HINTS

    messages: Turns
    """The prompt."""

    def answers(self) -> tuple[Turns, ...]:
        """Every answer, the best first."""
        raise NotImplementedError

    def judgement(self) -> tuple[str, ...]:
        """What people said of the answers, in texts: where it differs, rows teach something else."""
        return tuple(turn.whole_text for turn in self.answers()[0])

    def inputs(self) -> tuple[str, ...]:
        """All turns of the prompt, with who speaks."""
        return tuple(f"{turn.role}: {turn.whole_text}" for turn in self.messages)

    def targets(self) -> tuple[str, ...]:
        """The best answer, and the others marked as such."""
        best, *others = self.answers()
        rejected = (f"not: {turn.whole_text}" for answer in others for turn in answer)
        # The last word stands where single answers have their judgement: near-duplicates were counted
        # with it.
        return (*(turn.whole_text for turn in best), *rejected, "None")

    def turns(self) -> Turns:
        """The prompt with the best answer."""
        return (*self.messages, *self.answers()[0])

    def sides(self) -> list[Row]:
        """The prompt with each answer."""
        return [
            Conversation(self.file, self.line, (*self.messages, *answer))
            for answer in self.answers()
        ]


@dataclass(frozen=True, slots=True)
class Preference(JudgedAnswers):
    """Two answers to a prompt, of which people chose one."""

    shape: ClassVar[str] = "preference"
    title: ClassVar[str] = '{"prompt", "chosen", "rejected"}'
    openai_title: ClassVar[str] = '{"input", "preferred_output", "non_preferred_output"}'
    openai_keys: ClassVar[tuple[str, ...]] = ("input", "preferred_output", "non_preferred_output")
    words: ClassVar[str] = "chosen and rejected answers"
    keys: ClassVar[tuple[str, ...]] = ("chosen", "rejected", *openai_keys[1:])
    complete: ClassVar[tuple[frozenset[str], ...]] = tuple(frozenset((key,)) for key in keys)
    further_keys: ClassVar[frozenset[str]] = frozenset(
        ("messages", "prompt", "completion", "input")
    )
    object_keys: ClassVar[frozenset[str]] = frozenset(
        ("prompt", "chosen", "rejected", *openai_keys)
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "messages": "input",
        "chosen": "target",
        "rejected": "other",
    }

    chosen: Turns
    rejected: Turns

    @classmethod
    def title_of(cls, record: Record) -> str:
        """Ours, or OpenAI's."""
        ours = "chosen" in record or "rejected" in record
        return cls.title if ours else cls.openai_title

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Two different answers to one prompt, which may be told by what both have in common."""
        if cls.title_of(record) == cls.title:
            if missing := [key for key in ("chosen", "rejected") if key not in record]:
                raise RowRefused(
                    "preference.missing",
                    f'"{missing[0]}" is missing: a preference is one answer beside another.',
                    f'Add "{missing[0]}", or rename the other to "completion".',
                )
            prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
        else:
            prompt, chosen, rejected = _openai_sides(record, cls.openai_keys)
        sides = (
            read_turns(chosen, "chosen", "assistant"),
            read_turns(rejected, "rejected", "assistant"),
        )
        whole = [side[0].role != "assistant" for side in sides]
        given = None if prompt is None else read_prompt(prompt)
        if any(whole) or given is None:
            common = _common_beginning(*sides)
            if not common or not all(whole):
                raise RowRefused(
                    "preference.no_beginning",
                    "there is no prompt, and chosen and rejected have no common beginning.",
                    "Add the prompt, or begin both conversations with the same messages.",
                )
            if given is not None and given not in (
                common[: len(given)],
                common[1 : len(given) + 1],
            ):
                raise RowRefused(
                    "preference.no_beginning",
                    "the prompt is not what both conversations begin with.",
                    "Remove the prompt, or give only the answers as chosen and rejected.",
                )
            given, sides = common, (sides[0][len(common) :], sides[1][len(common) :])
        if _strip(sides[0]) == _strip(sides[1]):
            raise RowRefused(
                "preference.equal",
                "chosen and rejected are the same, so there is nothing to prefer.",
                "Remove the row, or mend one of the two.",
            )
        for side in sides:
            check_turn_order((*given, *side))
        check_not_blank((*given, *sides[0], *sides[1][:-1]))
        return cls(fields.file, fields.line, given, *sides)

    def answers(self) -> tuple[Turns, ...]:
        """The chosen one, then the rejected one."""
        return (self.chosen, self.rejected)

    def record(self) -> Record:
        """The prompt and both answers, each a text where that says all."""
        return {
            "prompt": _short(self.messages, "user"),
            "chosen": _short(self.chosen, "assistant"),
            "rejected": _short(self.rejected, "assistant"),
        }


def _openai_sides(record: Record, keys: Sequence[str]) -> tuple[object, object, object]:
    """Prompt, chosen and rejected answer in OpenAI's form."""
    if missing := [key for key in keys if key not in record]:
        raise RowRefused(
            "preference.missing", f'"{missing[0]}" is missing.', f'Add "{missing[0]}".'
        )
    given, chosen, rejected = (record[key] for key in keys)
    if not isinstance(given, dict) or "messages" not in given:
        raise RowRefused(
            "preference.type",
            f'"input" must be an object with "messages", but is {json_kind(given)}.',
            'Write "input": {"messages": [{"role": "user", "content": "..."}]}.',
        )
    return given["messages"], chosen, rejected


def _common_beginning(one: Turns, other: Turns) -> Turns:
    """Messages that both begin with, up to the last before a turn of the assistant in both."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    while count and not (one[count].role == other[count].role == "assistant"):
        count -= 1
    return one[:count]


def _strip(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]


def _short(turns: Turns, role: str) -> object:
    """Turns as people write them: one of ``role`` is its text."""
    return turns[0].content if [t.role for t in turns] == [role] else [t.to_dict() for t in turns]


@dataclass(frozen=True, slots=True)
class RankedReplies(JudgedAnswers):
    """Answers to a prompt in the order in which people like them, the best first."""

    shape: ClassVar[str] = "ranking"
    title: ClassVar[str] = '{"prompt", "ranked"}'
    words: ClassVar[str] = "ranked answers"
    keys: ClassVar[tuple[str, ...]] = ("ranked",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("prompt", "ranked")),)
    json_keys: ClassVar[frozenset[str]] = frozenset(("ranked",))
    object_keys: ClassVar[frozenset[str]] = frozenset(("prompt", "ranked"))
    parts: ClassVar[Mapping[str, Part]] = {"messages": "input"}

    ranked: tuple[Turns, ...]

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Two or more different answers; all but the best may be empty."""
        ranked = record["ranked"]
        if "prompt" not in record:
            raise RowRefused("preference.missing", '"prompt" is missing.', 'Add "prompt".')
        if not isinstance(ranked, list) or len(ranked) < 2:
            what = (
                "holds one answer or none"
                if isinstance(ranked, list)
                else f"is {json_kind(ranked)}"
            )
            raise RowRefused(
                "preference.type",
                f'"ranked" must be an array of two answers at least, but {what}.',
                'Write "ranked": ["the best", "...", "the worst"].',
            )
        prompt = read_prompt(record["prompt"])
        if len(ranked) > MOST_ANSWERS:
            raise RowRefused(
                "preference.type",
                f"the row has {len(ranked)} answers, and {MOST_ANSWERS} can be compared at once.",
                "Leave some of them out.",
            )
        answers = tuple(read_turns(each, "ranked", "assistant") for each in ranked)
        if len({tuple(_strip(answer)) for answer in answers}) < len(answers):
            raise RowRefused(
                "preference.equal",
                "two of the ranked answers are the same, so there is nothing to prefer.",
                "Remove one of the two.",
            )
        for answer in answers:
            check_turn_order((*prompt, *answer))
        best, *others = answers
        check_not_blank((*prompt, *best, *(turn for other in others for turn in other[:-1])))
        return cls(fields.file, fields.line, prompt, answers)

    def texts(self) -> Iterator[Text]:
        """The turns of the prompt, and of each answer from the best to the worst."""
        yield from JudgedAnswers.texts(self)
        for place, answer in enumerate(self.ranked, 1):
            part: Part = "target" if place == 1 else "other"
            for number, turn in enumerate(answer, 1):
                yield from turn.texts(f"ranked[{place}][{number}]", part)

    def edit_texts(self, change: Callable[[str, str], str]) -> Self:
        """The row with each text as ``change(field, text)`` gives it."""
        answers = tuple(
            tuple(
                turn.edit_texts(f"ranked[{place}][{number}]", change)
                for number, turn in enumerate(answer, 1)
            )
            for place, answer in enumerate(self.ranked, 1)
        )
        return replace(JudgedAnswers.edit_texts(self, change), ranked=answers)

    def answers(self) -> tuple[Turns, ...]:
        """All, the best first."""
        return self.ranked

    def judgement(self) -> tuple[str, ...]:
        """The answers in their order."""
        return tuple(turn.whole_text for answer in self.ranked for turn in answer)

    def record(self) -> Record:
        """The prompt and the answers, each a text where that says all."""
        return {
            "prompt": _short(self.messages, "user"),
            "ranked": [_short(answer, "assistant") for answer in self.ranked],
        }


@dataclass(frozen=True, slots=True)
class JudgedReply(JudgedAnswers):
    """Base of the shapes in which people judged a single answer."""

    keys: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, Part]] = {"messages": "input", "reply": "target"}

    reply: Turns

    @property
    def worth(self) -> float:
        """More for a better answer."""
        raise NotImplementedError

    @staticmethod
    def read_reply(record: Record, may_be_empty: bool = False) -> tuple[Turns, Turns]:
        """Prompt and answer of a record; the last turn may be ``may_be_empty``."""
        prompt = read_prompt(record["prompt"])
        reply = read_turns(record["completion"], "completion", "assistant")
        check_turn_order((*prompt, *reply))
        check_not_blank((*prompt, *(reply[:-1] if may_be_empty else reply)))
        return prompt, reply

    def answers(self) -> tuple[Turns, ...]:
        """The only one."""
        return (self.reply,)

    def targets(self) -> tuple[str, ...]:
        """The answer and what was said of it."""
        return (*(turn.whole_text for turn in self.reply), *self.judgement())

    def record(self) -> Record:
        """Prompt and answer, each a text where that says all."""
        return {
            "prompt": _short(self.messages, "user"),
            "completion": _short(self.reply, "assistant"),
        }


@dataclass(frozen=True, slots=True)
class RatedReply(JudgedReply):
    """An answer to a prompt with a rating."""

    shape: ClassVar[str] = "rated"
    title: ClassVar[str] = '{"prompt", "completion", "rating"}'
    words: ClassVar[str] = "answers with a rating"
    further_keys: ClassVar[frozenset[str]] = frozenset(
        ("messages", "prompt", "input", "completion", "rating", "score")
    )
    beside: ClassVar[frozenset[str]] = frozenset(("rating", "score"))

    rating: float

    @classmethod
    def matches(cls, record: Record) -> bool:
        """By a number; as text or empty it is a remark beside the row, and no judgement of it."""
        return "prompt" in record and "completion" in record and _number_in(record) is not None

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """An answer that is not empty."""
        prompt, reply = cls.read_reply(record)
        rating = _number_in(record)
        assert rating is not None
        return cls(fields.file, fields.line, prompt, reply, rating)

    @property
    def worth(self) -> float:
        """The rating."""
        return self.rating

    def judgement(self) -> tuple[str, ...]:
        """The rating."""
        return (repr(self.rating),)

    def record(self) -> Record:
        """Prompt, answer and rating."""
        return {**JudgedReply.record(self), "rating": self.rating}


def _number_in(record: Record) -> float | None:
    for key in ("rating", "score"):
        value = record.get(key)
        # By exact type: True is an int in Python.
        if type(value) is int or type(value) is float:
            return float(value)
    return None


@dataclass(frozen=True, slots=True)
class ThumbedReply(JudgedReply):
    """An answer to a prompt with a thumb up or down."""

    shape: ClassVar[str] = "thumb"
    title: ClassVar[str] = '{"prompt", "completion", "label": true}'
    words: ClassVar[str] = "answers with a thumb"
    further_keys: ClassVar[frozenset[str]] = frozenset(
        ("messages", "prompt", "input", "completion", "label", "thumb")
    )
    beside: ClassVar[frozenset[str]] = frozenset(("label", "thumb"))

    desirable: bool

    @classmethod
    def matches(cls, record: Record) -> bool:
        """By a thumb, or a label that is true or false."""
        if "prompt" not in record or "completion" not in record:
            return False
        return "thumb" in record or isinstance(record.get("label"), bool)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """An answer of nothing may be disliked, as a rejected one may be empty."""
        value = record.get("thumb", record.get("label"))
        thumbs = {"up": True, "down": False}
        thumb = thumbs.get(value) if isinstance(value, str) else value
        if not isinstance(thumb, bool):
            cls.read_reply(record, may_be_empty=True)  # its faults are named first
            given = quote(value) if isinstance(value, str) else json_kind(value)
            raise RowRefused(
                "thumb.type",
                f"the thumb is {given}, which is neither up nor down.",
                'Write "label": true or false, or "thumb": "up" or "down".',
            )
        prompt, reply = cls.read_reply(record, may_be_empty=not thumb)
        return cls(fields.file, fields.line, prompt, reply, thumb)

    @property
    def worth(self) -> float:
        """1 for a thumb up, 0 for one down."""
        return float(self.desirable)

    def judgement(self) -> tuple[str, ...]:
        """The thumb."""
        return (repr(self.desirable),)

    def classes(self) -> tuple[str, ...]:
        """The thumb."""
        return (str(self.desirable),)

    def record(self) -> Record:
        """Prompt, answer and thumb."""
        return {**JudgedReply.record(self), "label": self.desirable}


SHAPES: Mapping[str, type[Shape]] = {
    kind.shape: kind
    for kind in (
        PromptCompletion,
        Conversation,
        RawText,
        LabelledText,
        LabelledImage,
        LabelledAudio,
        CaptionedImage,
        BareImage,
        BareAudio,
        BareWindow,
        RatedText,
        TaggedWords,
        TextPair,
        History,
        MultipleChoice,
        PromptOnly,
        Preference,
        RankedReplies,
        ThumbedReply,  # before the rating, which is then a remark beside it
        RatedReply,
    )
}
"""Every shape by its name."""


def describe_shapes(shapes: Iterable[str]) -> str:
    """Shapes in words."""
    *others, last = (SHAPES[shape].words for shape in sorted(shapes))
    return f"{', '.join(others)} or {last}" if others else last


Kind = TypeVar("Kind", bound=Row)


def of_shape(kind: type[Kind], rows: Sequence[Row]) -> Sequence[Kind] | None:
    """``rows``, where all of them are of one shape."""
    return cast(Sequence[Kind], rows) if all(isinstance(row, kind) for row in rows) else None


def pair_answers(rows: Sequence[Row]) -> Sequence[Preference]:
    """Judged answers as pairs; rows that are pairs stay as they are, ranked ones become all of theirs.

    Every two answers to one prompt with different ratings are a pair (Ouyang et al. 2022, section
    3.5); a thumb is a rating of 1 or 0. Pairs stand at the place of the better answer.

    Raises:
        DataError: for answers that nothing can be compared with.
    """
    groups: dict[Turns, list[JudgedReply]] = {}
    for row in rows:
        if isinstance(row, JudgedReply):
            groups.setdefault(row.messages, []).append(row)
    problems = [found for group in groups.values() if (found := _incomparable(group))]
    if problems:
        raise DataError(problems)
    pairs = spool(_pairs(rows, groups))
    problems = [
        Problem(
            pair.file,
            pair.line,
            "preference.equal",
            "the same answer to the same prompt has another judgement in another row.",
            "Keep one of the two rows.",
        )
        for pair in pairs
        if pair.chosen == pair.rejected
    ]
    if problems:
        raise DataError(problems)
    return pairs


def _pairs(
    rows: Iterable[Row], groups: Mapping[Turns, Sequence[JudgedReply]]
) -> Iterator[Preference]:
    """A pair of each better answer with each worse one; ``groups`` are single answers by prompt."""
    for row in rows:
        if not isinstance(row, JudgedAnswers):
            continue
        sides = list(combinations(row.answers(), 2))
        if isinstance(row, JudgedReply):
            group = groups[row.messages]
            sides = [(row.reply, other.reply) for other in group if other.worth < row.worth]
        for better, worse in sides:
            yield Preference(row.file, row.line, row.messages, better, worse)


def _incomparable(group: Sequence[JudgedReply]) -> Problem | None:
    first = group[0]
    if any(other.worth != first.worth for other in group):
        return None
    if len(group) == 1:
        return Problem(
            first.file,
            first.line,
            "rating.single",
            "this is the only answer to its prompt, so there is nothing to compare it with.",
            "Add another answer with another rating, remove the row, learn from thumbs one by one "
            "with objective kto, or from every answer alike with objective sft.",
        )
    return Problem(
        first.file,
        first.line,
        "rating.tied",
        f"all {len(group)} answers to this prompt have the same rating ({first.worth:g}).",
        "Rate one of them differently, or remove the rows.",
    )
