"""Shapes that say something of an image, a sound or a window of a time series."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from luthier.data.field_checks import FieldChecker, read_label
from luthier.data.inputs import PLURAL, Media, MediaKind
from luthier.data.parsing import Record
from luthier.data.shapes.base import ENOUGH_ANSWERS, InputKind, Labelled, Shape
from luthier.data.shapes.texts import RawText
from luthier.errors import RowRefused
from luthier.types import Part, Row

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
        except RowRefused:  # the gate says why (media/checks/media_files.py)
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
