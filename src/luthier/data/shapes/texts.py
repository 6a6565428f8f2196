"""Shapes of text rows: raw, labelled, rated, tagged, paired, and item histories."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from luthier.data.field_checks import (
    TAGGED_EXAMPLE,
    FieldChecker,
    read_label,
    read_rating,
    read_tagged,
)
from luthier.data.files.parsing import Record, json_kind, quote
from luthier.data.shapes.base import ENOUGH_ANSWERS, ENOUGH_HINTS, MEDIA_KEYS, Labelled, Shape
from luthier.errors import RowRefused
from luthier.types import Part, Row

_SECOND_TEXT = dict.fromkeys(
    (
        *("other", "other_text", "text_pair", "text1", "text2", "text_1", "text_2", "text_a"),
        *("text_b", "sentence1", "sentence2", "sentence_a", "sentence_b", "premise", "hypothesis"),
    ),
    "For pairs with a relevance from 0 to 1, name both texts: `data.columns.query=COLUMN` and "
    "`data.columns.document=COLUMN`. For classes, `data.columns.premise=COLUMN` and "
    "`data.columns.hypothesis=COLUMN`.",
)
_ENTITIES = dict.fromkeys(
    ("entities", "spans", "ner_tags"),
    f'Write {TAGGED_EXAMPLE} for named entities, or {{"text": "Rita sings", "entities": [[0, 4, '
    '"person"]]}.',
)
NEGATIVE_KEYS = frozenset(
    (
        *("negatives", "negative", "neg", "hard_negatives", "hard_negative"),
        *(f"negative_{number}" for number in range(1, 33)),
    )
)
"""Keys of texts that are not similar to the anchor, also of sentence-transformers and
FlagEmbedding."""
_JUDGED_PAIR = dict.fromkeys(
    ("score", "similarity"), "Scored pairs are not supported; every pair is a positive pair."
)


@dataclass(frozen=True, slots=True)
class TextRow(Shape):
    """Base of shapes with one main text."""

    text: str

    def inputs(self) -> tuple[str, ...]:
        return (self.text,)

    def plain_text(self) -> str:
        return self.text

    def bare(self) -> Row:
        return RawText(self.file, self.line, self.text)


@dataclass(frozen=True, slots=True)
class RawText(TextRow):
    """A text without annotations, for language modelling."""

    shape: ClassVar[str] = "text"
    title: ClassVar[str] = '{"text"}'
    noun: ClassVar[str] = "raw text"
    keys: ClassVar[tuple[str, ...]] = ("text",)
    other_tasks: ClassVar[Mapping[str, str]] = _ENTITIES
    parts: ClassVar[Mapping[str, Part]] = {"text": "target"}

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        text = fields.text(record, "text", target=True)
        return None if text is None else cls(fields.file, fields.line, text)

    def record(self) -> Record:
        return {"text": self.text}


@dataclass(frozen=True, slots=True)
class LabelledText(TextRow, Labelled):
    """A text with its class, or with any number of classes."""

    shape: ClassVar[str] = "label"
    title: ClassVar[str] = '{"text", "label"}'
    noun: ClassVar[str] = "text with labels"
    keys: ClassVar[tuple[str, ...]] = ("label",)
    other_tasks: ClassVar[Mapping[str, str]] = _SECOND_TEXT
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("text", "label")),)
    beside: ClassVar[frozenset[str]] = frozenset(("label",))
    parts: ClassVar[Mapping[str, Part]] = {"text": "input"}

    label: str | tuple[str, ...]

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether a record has a label of a text."""
        others = (*MEDIA_KEYS, *QueryDocument.keys)
        return "label" in record and not any(key in record for key in others)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        text = fields.text(record, "text")
        label = read_label(record["label"])
        return None if text is None else cls(fields.file, fields.line, text, label)

    def record(self) -> Record:
        return {"text": self.text, **self.label_record()}


@dataclass(frozen=True, slots=True)
class RatedText(TextRow):
    """A text with a number to predict."""

    shape: ClassVar[str] = "rating"
    title: ClassVar[str] = '{"text", "rating"}'
    noun: ClassVar[str] = "text with ratings"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("rating",)
    other_tasks: ClassVar[Mapping[str, str]] = _SECOND_TEXT
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("text", "rating")),)
    optional_keys: ClassVar[frozenset[str]] = frozenset(("score",))
    beside: ClassVar[frozenset[str]] = frozenset(("rating", "score"))
    number_keys: ClassVar[frozenset[str]] = frozenset(("rating", "score"))
    parts: ClassVar[Mapping[str, Part]] = {"text": "input"}
    annotated: ClassVar[bool] = True
    encoder_targets: ClassVar[str] = "ratings"

    rating: float

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        text = fields.text(record, "text")
        rating = read_rating(record["rating"])
        return None if text is None else cls(fields.file, fields.line, text, rating)

    def targets(self) -> tuple[str, ...]:
        return (repr(self.rating),)

    def target(self) -> float:
        return self.rating

    def record(self) -> Record:
        return {"text": self.text, "rating": self.rating}


Entities = set[tuple[str, int, int]]
"""Kind, first word and last word of each entity of a row."""


def entities(tags: Sequence[str]) -> Entities:
    """Return kind, first word and last word of each entity in a row of BIO tags."""
    found = set()
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        edge, _, name = tag.partition("-")
        if kind and not (edge == "I" and name == kind):
            found.add((kind, start, index - 1))
            kind = ""
        if edge != "O" and not kind:
            kind, start = name, index
    return found


@dataclass(frozen=True, slots=True)
class TaggedWords(Shape):
    """Words of a sentence, each with a tag."""

    shape: ClassVar[str] = "tags"
    title: ClassVar[str] = '{"tokens", "tags"}'
    noun: ClassVar[str] = "tokens with tags"
    keys: ClassVar[tuple[str, ...]] = ("tokens",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("tokens", "tags")),)
    json_keys: ClassVar[frozenset[str]] = frozenset(("tokens", "tags"))
    parts: ClassVar[Mapping[str, Part]] = {"tokens": "input"}
    annotated: ClassVar[bool] = True
    encoder_targets: ClassVar[str] = "tags"

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    """BIO tags; ``None`` for words to tag."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        tokens, tags = read_tagged(record.get("tokens"), record.get("tags"))
        return cls(fields.file, fields.line, tokens, tags)

    def inputs(self) -> tuple[str, ...]:
        return self.tokens

    def targets(self) -> tuple[str, ...]:
        return self.tags or ()

    def plain_text(self) -> str:
        return " ".join(self.tokens)

    def bare(self) -> TaggedWords:
        return replace(self, tags=None)

    def record(self) -> Record:
        return {"tokens": list(self.tokens), "tags": list(self.tags or ())}

    def input_record(self) -> Record:
        return {"tokens": list(self.tokens)}

    def target(self) -> list[str]:
        return list(self.tags or ())


@dataclass(frozen=True, slots=True)
class TextPair(TextRow):
    """Two related texts."""

    shape: ClassVar[str] = "pair"
    title: ClassVar[str] = '{"anchor", "positive"}'
    noun: ClassVar[str] = "pairs of anchor and positive"
    enough: ClassVar[int] = ENOUGH_HINTS
    keys: ClassVar[tuple[str, ...]] = ("anchor", "positive")
    other_tasks: ClassVar[Mapping[str, str]] = _JUDGED_PAIR
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("anchor", "positive")),)
    optional_keys: ClassVar[frozenset[str]] = frozenset(("text", *NEGATIVE_KEYS))
    json_keys: ClassVar[frozenset[str]] = frozenset(("negatives",))
    parts: ClassVar[Mapping[str, Part]] = {
        "text": "input",
        "positive": "target",
        "negatives": "other",
    }
    encoder_targets: ClassVar[str] = "partners"

    positive: str
    """Partner of ``text``."""
    negatives: tuple[str, ...] = ()
    """Hard negatives: text that is no partner of ``text``."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        anchor, positive = fields.text(record, "anchor"), fields.text(record, "positive")
        if anchor is None or positive is None:
            return None
        negatives = _read_negatives(record)
        # The loss would push the same embedding towards the anchor and away from it.
        if negatives and same_words(positive) in map(same_words, negatives):
            raise RowRefused(
                "pair.negative",
                f"{quote(positive)} is the positive and a negative, letter case and space aside.",
                "Remove the text from the negatives.",
            )
        return cls(fields.file, fields.line, anchor, positive, negatives)

    def targets(self) -> tuple[str, ...]:
        return (self.positive,)

    def target(self) -> str:
        return self.positive

    def sides(self) -> list[Row]:
        return [RawText(self.file, self.line, text) for text in (self.text, self.positive)]

    @property
    def candidates(self) -> Sequence[str]:
        """Text to search next to the partners of all rows."""
        return self.negatives

    def record(self) -> Record:
        negatives = {"negatives": list(self.negatives)} if self.negatives else {}
        return {"anchor": self.text, "positive": self.positive, **negatives}


def same_words(text: str) -> str:
    """Return a text without differences that most encoders ignore: case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _read_negatives(record: Record) -> tuple[str, ...]:
    """Return the texts of all keys in :data:`NEGATIVE_KEYS`, in the order of the keys."""
    found: list[str] = []
    for key, value in record.items():
        if key not in NEGATIVE_KEYS:
            continue
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(each, str) or not each.strip():
                raise RowRefused(
                    "pair.negative",
                    f'"{key}" has {json_kind(each)} that is not a text.',
                    'Write "negatives": ["a text", "another text"], or remove the key.',
                )
            found.append(each)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class QueryDocument(TextRow):
    """A query and a document, with the relevance of the document."""

    shape: ClassVar[str] = "relevance"
    title: ClassVar[str] = '{"query", "document", "label"}'
    noun: ClassVar[str] = "queries with labelled documents"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("document",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("query", "document", "label")),)
    optional_keys: ClassVar[frozenset[str]] = frozenset(("query", "label"))
    parts: ClassVar[Mapping[str, Part]] = {"text": "input", "document": "input"}
    annotated: ClassVar[bool] = True
    encoder_targets: ClassVar[str] = "labels"

    document: str
    label: float | None = None
    """Relevance from 0 to 1; ``None`` for a pair to score."""

    @property
    def is_relevant(self) -> bool:
        """True for a relevance above one half."""
        return self.label is not None and self.label > 0.5

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether a record has a document with a query or a relevance."""
        return "document" in record and ("query" in record or "label" in record)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        query, document = fields.text(record, "query"), fields.text(record, "document")
        label = _read_relevance(record.get("label"), fields.names.get("label") or "label")
        if query is None or document is None:
            return None
        return cls(fields.file, fields.line, query, document, label)

    def inputs(self) -> tuple[str, ...]:
        return (self.text, self.document)

    def sides(self) -> list[Row]:
        return [RawText(self.file, self.line, text) for text in (self.text, self.document)]

    def plain_text(self) -> str:
        return f"{self.text}\n\n{self.document}"

    def targets(self) -> tuple[str, ...]:
        return () if self.label is None else (repr(self.label),)

    def bare(self) -> Row:
        return replace(self, label=None)

    def record(self) -> Record:
        return {"query": self.text, "document": self.document, "label": self.label}

    def input_record(self) -> Record:
        return {"query": self.text, "document": self.document}

    def target(self) -> float | None:
        return self.label


def _read_relevance(value: object, key: str) -> float:
    """Return a number from 0 to 1, also from a cell of a CSV table.

    Args:
        key: name of the value in the file.
    """
    found = json_kind(value)
    if isinstance(value, int | float | str):
        found = quote(str(value))
        with suppress(ValueError):
            # The comparison is False for NaN.
            if 0 <= (number := float(value)) <= 1:
                return number
    raise RowRefused(
        "pair.label",
        f'"{key}" must be a number from 0 to 1, but is {found}.',
        "Write 1 for a relevant document, 0 for any other, or a number between. For classes, set "
        "`data.columns.premise=COLUMN` and `data.columns.hypothesis=COLUMN`.",
    )


MOST_ITEMS = 1_000
"""Items of a history."""


def history_text(items: object) -> str:
    """Return the items of a history as lines, the latest first.

    Raises:
        RowRefused: for other values than an array of items.
    """
    if not isinstance(items, list) or not 1 <= len(items) <= MOST_ITEMS:
        count = f"has {len(items):,}" if isinstance(items, list) else f"is {json_kind(items)}"
        raise RowRefused(
            "history.type",
            f'"history" must be an array of 1 to {MOST_ITEMS:,} items, but {count}.',
            'Write "history": ["an item", "a later one"].',
        )
    return "\n".join(map(_item_text, reversed(items)))


def _item_text(item: object) -> str:
    # Items may be numbers. A float is refused, because 12.0 and 12 would be two items.
    text = str(item) if type(item) is int else item
    # An item is a line of the anchor. `splitlines` also knows U+2028 and other ends of lines.
    if not isinstance(text, str) or not text.strip() or len(text.splitlines()) > 1:
        raise RowRefused(
            "history.item",
            "an item is not a text of one line.",
            "Write each item as one line, identical in every row.",
        )
    # Lines of a catalogue have no spaces at the ends.
    return text.strip()


@dataclass(frozen=True, slots=True)
class History(TextPair):
    """A user's chosen items in chronological order, and the next item.

    As a pair, the anchor lists the items one per line, the latest first, because truncation removes
    the end of a text.
    """

    shape: ClassVar[str] = "history"
    title: ClassVar[str] = '{"history", "item"}'
    noun: ClassVar[str] = "histories with the next item"
    keys: ClassVar[tuple[str, ...]] = ("history",)
    other_tasks: ClassVar[Mapping[str, str]] = {}
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("history", "item")),)
    optional_keys: ClassVar[frozenset[str]] = frozenset()
    json_keys: ClassVar[frozenset[str]] = frozenset()
    encoder_targets: ClassVar[str] = "items"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return "history" in record and "item" in record

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        items, item = record["history"], record["item"]
        item = str(item) if type(item) is int else fields.text(record, "item")
        text = history_text(items)
        if item is None:
            return None
        return cls(fields.file, fields.line, text, _item_text(item))

    @property
    def items(self) -> list[str]:
        """Chosen items, the latest first."""
        return self.text.split("\n")

    @property
    def candidates(self) -> Sequence[str]:
        """Earlier items."""
        return self.items

    def record(self) -> Record:
        return {"history": self.items[::-1], "item": self.positive}
