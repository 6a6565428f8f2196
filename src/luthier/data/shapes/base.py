"""Base classes of row shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from luthier.data.field_checks import FieldChecker
from luthier.data.files.parsing import Record
from luthier.data.inputs import MediaKind
from luthier.types import Row

InputKind = MediaKind | Literal["text"]
"""Kind of a network input."""
ENOUGH_ANSWERS = 50
"""Fewest labelled rows with a clear gain, according to providers of fine-tuning."""
ENOUGH_HINTS = 100
"""Fewest rows with a weaker signal: preferences, pairs, prompts."""


class Shape(Row):
    """Base of all shapes: detection, parsing and properties."""

    __slots__ = ()

    title: ClassVar[str]
    """Keys of the shape, for messages."""
    noun: ClassVar[str]
    """Plural noun for the rows, for messages."""
    keys: ClassVar[tuple[str, ...]]
    """Identifying keys; any key suffices."""
    complete: ClassVar[tuple[frozenset[str], ...]] = ()
    """Key sets that identify the shape regardless of other keys."""
    optional_keys: ClassVar[frozenset[str]] = frozenset()
    """Additional keys that the shape reads."""
    beside: ClassVar[frozenset[str]] = frozenset()
    """Keys of the shape that forms of other tools also have."""
    other_tasks: ClassVar[Mapping[str, str]] = {}
    """Keys of a different task, each with the advice in the error."""
    json_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys with JSON cells in a CSV table."""
    number_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys with numeric cells in a CSV table."""
    object_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys whose values may be objects."""
    reads: ClassVar[InputKind] = "text"
    """Kind of input that a network needs for the shape."""
    encoder_targets: ClassVar[str] = ""
    """Targets that an encoder learns from the shape; empty if none."""
    enough: ClassVar[int] = 0
    """Fewest training rows to learn more than the output format; 0 without a limit."""

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether a record has keys of this shape."""
        return any(key in record for key in cls.keys)

    @classmethod
    def source_keys(cls) -> frozenset[str]:
        """Return all keys that the shape may read."""
        return cls.optional_keys.union(cls.keys, *cls.complete)

    @classmethod
    def title_of(cls, record: Record) -> str:
        """Return the title for the keys of a record."""
        return cls.title

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        """Return the row of a record; ``None`` after a reported problem.

        Raises:
            RowRefused: with a problem that is not reported yet.
        """
        raise NotImplementedError


class Labelled(Shape):
    """Base of shapes with class labels."""

    __slots__ = ()

    annotated: ClassVar[bool] = True
    encoder_targets: ClassVar[str] = "labels"

    label: str | tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, also of a row with a single label."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def has_one_label(self) -> bool:
        """True for exactly one label, alone or in an array."""
        return isinstance(self.label, str) or len(self.label) == 1

    def targets(self) -> tuple[str, ...]:
        return tuple(sorted(self.labels))

    def target(self) -> str | tuple[str, ...]:
        return self.label

    def classes(self) -> tuple[str, ...]:
        return self.labels

    def label_record(self) -> Record:
        """Label, or array of labels."""
        return {"label": self.label if isinstance(self.label, str) else list(self.label)}


def is_multi_label(rows: int, arrays: int, unlike_one: int) -> bool:
    """Return whether the labels are multi-label: a row has not exactly one label, or all are
    arrays.

    A few arrays of one label among single labels do not make a multi-label task.

    Args:
        rows: number of rows.
        arrays: number of rows with an array.
        unlike_one: number of rows without exactly one label.
    """
    return unlike_one > 0 or 0 < rows == arrays


MEDIA_KEYS: tuple[MediaKind, ...] = ("image", "audio", "window")
"""Keys of images, audio and time series, equal to the input kinds."""
