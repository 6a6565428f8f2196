"""The base of all shapes, and of those that name a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from luthier.data.field_checks import FieldChecker
from luthier.data.inputs import MediaKind
from luthier.data.parsing import Record
from luthier.types import Row

InputKind = MediaKind | Literal["text"]
"""What a network has to read."""
ENOUGH_ANSWERS = 50
"""Rows that say what is right: the fewest with which providers of fine-tuning report a clear gain."""
ENOUGH_HINTS = 100
"""Rows that only say which is better, what belongs together or what is asked: each tells less."""


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
    other_tasks: ClassVar[Mapping[str, str]] = {}
    """Keys that make a row another task, with how to write that; a row with such a key is refused."""
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


MEDIA_KEYS: tuple[MediaKind, ...] = ("image", "audio", "window")
"""Keys that hold an image, a sound or a time series, called as what they hold."""
