"""Shapes of images, audio and windows of a time series."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from luthier.data.field_checks import FieldChecker, read_label
from luthier.data.files.parsing import Record, quote
from luthier.data.files.times import MISSING
from luthier.data.inputs import PLURAL, Media, MediaKind
from luthier.data.shapes.base import ENOUGH_ANSWERS, InputKind, Labelled, Shape
from luthier.data.shapes.texts import RawText
from luthier.errors import RowRefused
from luthier.types import Part, Row

CAPTION_KEYS = ("caption", "text")
"""Keys of captions and transcriptions, in order of preference."""


@dataclass(frozen=True, slots=True)
class MediaRow(Shape):
    """Base of shapes with a media input."""

    media: Media

    @classmethod
    def key(cls) -> MediaKind:
        """Return the key of the input."""
        assert cls.reads != "text"
        return cls.reads

    def inputs(self) -> tuple[str, ...]:
        return (self.media.identity,)

    def excerpt(self) -> str:
        return self.media.name

    def bare(self) -> MediaRow:
        return BARE_MEDIA[self.media.kind](self.file, self.line, self.media)

    def record(self) -> Record:
        return {self.key(): self.media.name}

    def input_record(self) -> Record:
        return {self.key(): str(self.media)}

    def relocate(self, record: Record, folder: Path) -> Record:
        """Return ``record``, a record of the row, with the path of the input from ``folder``.

        Raises:
            RowRefused: for a path outside, which readers reject.
        """
        if self.media.path is None:
            return record
        path = os.path.relpath(self.media.path, folder)
        if path.startswith(".."):
            raise RowRefused(
                "convert.media",
                f"{quote(self.media.name)} is not below the folder of the new file.",
                "Write the new file into the folder of the images or audio files.",
            )
        path = f"{path}/{self.media.member}" if self.media.member else path
        given = (self.media, self.media.name)
        return {key: path if each in given else each for key, each in record.items()}


@dataclass(frozen=True, slots=True)
class BareMedia(MediaRow):
    """Base of media shapes without a target."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        media = fields.media(record, cls.key())
        return None if media is None else cls(fields.file, fields.line, media)


@dataclass(frozen=True, slots=True)
class BareImage(BareMedia):
    """An image without a target."""

    shape: ClassVar[str] = "image"
    reads: ClassVar[InputKind] = "image"
    title: ClassVar[str] = '{"image"}'
    noun: ClassVar[str] = PLURAL["image"]
    keys: ClassVar[tuple[str, ...]] = ("image",)

    @classmethod
    def matches(cls, record: Record) -> bool:
        return cls.key() in record and not any(key in record for key in ("label", *CAPTION_KEYS))


@dataclass(frozen=True, slots=True)
class BareAudio(BareMedia):
    """An audio file without a target."""

    shape: ClassVar[str] = "audio"
    reads: ClassVar[InputKind] = "audio"
    title: ClassVar[str] = '{"audio"}'
    noun: ClassVar[str] = PLURAL["audio"]
    keys: ClassVar[tuple[str, ...]] = ("audio",)

    @classmethod
    def matches(cls, record: Record) -> bool:
        return cls.key() in record and "label" not in record


@dataclass(frozen=True, slots=True)
class BareWindow(BareMedia):
    """A value of a time series with the values before."""

    shape: ClassVar[str] = "window"
    reads: ClassVar[InputKind] = "window"
    title: ClassVar[str] = '{"window"}'
    noun: ClassVar[str] = PLURAL["window"]
    keys: ClassVar[tuple[str, ...]] = ("window",)

    @classmethod
    def matches(cls, record: Record) -> bool:
        return cls.key() in record and "label" not in record

    def inputs(self) -> tuple[str, ...]:
        """Return a hash of the location, because windows of equal values are not duplicates."""
        return (hashlib.sha256(self.media.name.encode()).hexdigest(),)


NORMAL = frozenset((*MISSING, "0", "0.0", "false", "no", "n", "nein", "normal", "ok", "good"))
"""Labels of values without a fault, in lower case."""


@dataclass(frozen=True, slots=True)
class LabelledWindow(BareWindow):
    """A value of a time series with a label: normal, or a fault."""

    shape: ClassVar[str] = "labelled_window"
    title: ClassVar[str] = '{"window", "label"}'
    noun: ClassVar[str] = "windows of a time series with labels"
    keys: ClassVar[tuple[str, ...]] = ("window", "label")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("window", "label")),)

    label: str

    @classmethod
    def matches(cls, record: Record) -> bool:
        return cls.key() in record and "label" in record

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        media, label = fields.media(record, cls.key()), record["label"]
        text = "" if label is None else str(label).strip()
        return None if media is None else cls(fields.file, fields.line, media, text)

    @property
    def is_fault(self) -> bool:
        """True unless the label is empty, 0, or a word for a normal value."""
        return self.label.lower() not in NORMAL

    def target(self) -> str:
        return "fault" if self.is_fault else "normal"

    def record(self) -> Record:
        return {**BareWindow.record(self), "label": self.label}


BARE_MEDIA: Mapping[MediaKind, type[BareMedia]] = {
    "image": BareImage,
    "audio": BareAudio,
    "window": BareWindow,
}
"""Shape without a target, by kind of input."""


@dataclass(frozen=True, slots=True)
class LabelledImage(MediaRow, Labelled):
    """An image with its class, or with any number of classes."""

    shape: ClassVar[str] = "labelled_image"
    reads: ClassVar[InputKind] = "image"
    title: ClassVar[str] = '{"image", "label"}'
    noun: ClassVar[str] = "images with labels"
    keys: ClassVar[tuple[str, ...]] = ("image", "label")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("image", "label")),)

    label: str | tuple[str, ...]

    @classmethod
    def matches(cls, record: Record) -> bool:
        return cls.key() in record and "label" in record

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        media = fields.media(record, cls.key())
        label = read_label(record["label"])
        return None if media is None else cls(fields.file, fields.line, media, label)

    def record(self) -> Record:
        return {**MediaRow.record(self), **self.label_record()}


@dataclass(frozen=True, slots=True)
class LabelledAudio(LabelledImage):
    """An audio file with its class, or with any number of classes."""

    shape: ClassVar[str] = "labelled_audio"
    reads: ClassVar[InputKind] = "audio"
    title: ClassVar[str] = '{"audio", "label"}'
    noun: ClassVar[str] = "audio with labels"
    keys: ClassVar[tuple[str, ...]] = ("audio", "label")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("audio", "label")),)


@dataclass(frozen=True, slots=True)
class CaptionedImage(MediaRow):
    """An image with a caption or transcription."""

    shape: ClassVar[str] = "captioned_image"
    reads: ClassVar[InputKind] = "image"
    title: ClassVar[str] = '{"image", "caption"}'
    noun: ClassVar[str] = "images with captions"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("image", "caption")
    complete: ClassVar[tuple[frozenset[str], ...]] = tuple(
        frozenset(("image", key)) for key in CAPTION_KEYS
    )
    parts: ClassVar[Mapping[str, Part]] = {"caption": "target"}

    caption: str

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether a record has a caption. A text next to a label is a comment."""
        return cls.key() in record and (
            "caption" in record or ("text" in record and "label" not in record)
        )

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        media = fields.media(record, cls.key())
        key = next(key for key in CAPTION_KEYS if key in record)
        caption = fields.text(record, key, target=True)
        if media is None or caption is None:
            return None
        return cls(fields.file, fields.line, media, caption)

    def targets(self) -> tuple[str, ...]:
        return (self.caption,)

    def sides(self) -> list[Row]:
        return [self.bare(), RawText(self.file, self.line, self.caption)]

    def target(self) -> str:
        return self.caption

    def record(self) -> Record:
        return {**MediaRow.record(self), "caption": self.caption}
