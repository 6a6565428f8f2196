"""Row inputs other than text: images, audio and windows of time series.

A row stores the location of an input: a file, a member of a zip archive, bytes in a table, or an
array. Inputs are decoded per micro-batch, so memory does not grow with the number of rows.
:mod:`luthier.media` has the decoders and processors; this module has the interface to both.
"""

from __future__ import annotations

import base64
import hashlib
import lzma
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from luthier.errors import CorruptFile, Location, RowRefused, UnknownModel
from luthier.files import read_json, write_json
from luthier.plugins import PluginTable
from luthier.validation import describe_constraint

if TYPE_CHECKING:
    from luthier.data.augmentation import Augmentation
    from luthier.data.files.parsing import Record

MediaKind = Literal["image", "audio", "window"]
"""A ``window`` is the latest values of a time series."""
SINGULAR: Mapping[str, str] = {
    "image": "image", "audio": "audio file", "window": "window of a time series", "text": "text",
}  # fmt: skip
"""Names of the input kinds for messages."""
PLURAL: Mapping[str, str] = {
    "image": "images", "audio": "audio files", "window": "windows of a time series", "text": "texts",
}  # fmt: skip

IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".npy",
)  # fmt: skip
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
MEDIA_ENDINGS = (*IMAGE_ENDINGS, *AUDIO_ENDINGS)
MOST_PIXELS = 64_000_000
"""Most pixels of an image; a file of a few kilobytes can claim any number."""
MOST_MEDIA_BYTES = 64 * 1024 * 1024
"""Most bytes of an encoded image or audio file."""
MOST_IMAGES_OF_ROW = 64
"""Most images of a conversation."""
LONGEST_WINDOW = 512
"""Most values in a window of a time series; no supported network accepts more."""
MOST_COLUMNS = 64
"""Most columns of a time series."""
LARGEST_VALUE = 1e100
"""Largest magnitude in a time series; the square of a larger value overflows."""
CONVERSIONS: Mapping[str, str] = {
    **{ending: f"magick OLD{ending} NEW.jpg" for ending in (".heic", ".heif")},
    **{ending: f"ffmpeg -i OLD{ending} NEW.flac" for ending in (".m4a", ".aac", ".wma", ".amr")},
}
"""Shell commands by file ending, for formats that neither Pillow nor libsndfile decodes."""


def media_kind(name: str) -> MediaKind | None:
    """Return the kind of a file by its ending; ``None`` for neither image nor audio."""
    ending = name.lower()
    if ending.endswith(IMAGE_ENDINGS):
        return "image"
    return "audio" if ending.endswith(AUDIO_ENDINGS) else None


def conversion_fix(names: Iterable[str]) -> str:
    """Return the command to convert unsupported images and audio; empty if not needed."""
    lower = [name.lower() for name in names]
    return " ".join(
        f"Convert {ending} files, for example with: {command}."
        for ending, command in CONVERSIONS.items()
        if any(name.endswith(ending) for name in lower)
    )


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Media:
    """Location of one image, audio file or window."""

    kind: MediaKind
    name: str
    """Name for messages: a path, ``archive.zip/member``, ``digits.npz[17]``."""
    path: str | None = None
    """Path of the file or zip archive, as a string to save memory for a million rows."""
    member: str = ""
    """Name inside the zip archive."""
    data: bytes | None = field(default=None, repr=False)
    """Encoded bytes, if stored in a table."""
    array: NDArray[Any] | None = field(default=None, repr=False, compare=False)
    """Pixels ``[H, W]`` or ``[H, W, 3]``, or values ``[T]`` or ``[T, C]``, if in memory."""
    most: int | None = None
    """Most pixels or samples; default :data:`MOST_PIXELS` or :data:`MOST_SAMPLES`."""
    names: tuple[str, ...] = field(default=(), compare=False)
    """Columns of a window of several columns; empty if unknown."""
    time: float | None = field(default=None, compare=False)
    """Time of a window's last value, in seconds, or in the unit of the series; NaN if not read."""
    time_text: str = field(default="", compare=False)
    """Time of a window's last value as written in the series."""

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            RowRefused: if the file cannot be read or is too large.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            if self.member:
                # Time and size are keys of the cache: a replaced archive must be opened again.
                status = os.stat(self.path)
                return self._unpack(open_archive(self.path, status.st_mtime_ns, status.st_size))
            if (size := os.stat(self.path).st_size) > MOST_MEDIA_BYTES:
                raise _too_large(size)
            return Path(self.path).read_bytes()
        except (
            OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, KeyError, RuntimeError
        ) as error:  # fmt: skip
            raise media_error(
                "unreadable", f"the file cannot be read: {reason_of(error)}."
            ) from error

    def _unpack(self, archive: zipfile.ZipFile) -> bytes:
        size = archive.getinfo(self.member).file_size
        if size > MOST_MEDIA_BYTES:
            raise _too_large(size)
        with archive.open(self.member) as stream:
            return stream.read(MOST_MEDIA_BYTES)  # the zip directory may understate the size

    def digest(self) -> str:
        """Return the SHA-256 of the bytes, so equal files with different names match."""
        if self.array is not None:
            shape = f"{self.array.shape}{self.array.dtype}".encode()
            return hashlib.sha256(shape + np.ascontiguousarray(self.array).tobytes()).hexdigest()
        if (version := self.version()) is None:
            return hashlib.sha256(self.read()).hexdigest()
        return _file_digest(*version)

    @property
    def identity(self) -> str:
        """Hash of the bytes, or the name of an unreadable file."""
        try:
            return self.digest()
        except RowRefused:  # the gate reports the reason (media/checks/media_files.py)
            return self.name

    @property
    def address(self) -> str:
        """Path of the file, or the bytes as a ``data:`` address."""
        if self.data is None:
            return self.name
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"

    def version(self) -> tuple[str, str, int, int] | None:
        """Return a key for the file's current content, without reading the file; ``None`` without a
        file."""
        if self.path is None:
            return None
        try:
            state = os.stat(self.path)
        except OSError as error:
            raise media_error(
                "unreadable", f"the file cannot be read: {reason_of(error)}."
            ) from error
        return self.path, self.member, state.st_mtime_ns, state.st_size

    @property
    def columns(self) -> int:
        """Number of columns of a window."""
        return 1 if self.array is None or self.array.ndim == 1 else self.array.shape[1]

    def select(self, names: tuple[str, ...]) -> Media:
        """Return the window with the columns ``names`` in their order.

        Raises:
            RowRefused: for a missing column; without names, for another number of columns.
        """
        if not names or self.names == names:
            return self
        wanted = ", ".join(names)
        missing = [name for name in names if name not in self.names]
        if self.names and missing:
            raise RowRefused(
                "window.columns", f"the series has no column {', '.join(missing)}.",
                f"The model reads {wanted}. Add the columns, or rename them.",
            )  # fmt: skip
        if not self.names and self.columns != len(names):
            raise RowRefused(
                "window.columns", f"the window has {self.columns} columns, not {len(names)}.",
                f"Give {len(names)} values for each time, in this order: {wanted}.",
            )  # fmt: skip
        if not self.names:
            return self
        assert self.array is not None
        places = [self.names.index(name) for name in names]
        return replace(self, array=self.array[:, places], names=names)

    def values(self) -> NDArray[np.float64]:
        """Return the values ``[T]`` of a window; of several columns, ``[T, C]``.

        float64: float32 loses the differences between large values of a counter.
        """
        assert self.array is not None
        return np.asarray(self.array, np.float64)


OBJECTS = "objects"
"""Folder next to rows with copies of objects at ``s3://`` addresses."""
REFERENCES = ("image", "audio", "image-ref", "file_name", "path")
"""Keys with the path of an image or audio file, in luthier's shapes and other forms."""


def object_name(address: str) -> str:
    """Return the relative path of an object's copy.

    The file name is a hash of the address, because an object key may contain ``..``.
    """
    ending = PurePosixPath(address).suffix.lower()
    digest = hashlib.sha256(address.encode()).hexdigest()[:32]
    return f"{OBJECTS}/{digest}{ending if ending in MEDIA_ENDINGS else ''}"


def media_references(record: Record, keys: Iterable[str] = REFERENCES) -> list[str]:
    """Return the paths and addresses of images and audio in a record, without embedded data."""
    references = []
    for key in keys:
        value = record.get(key)
        if isinstance(value, dict):
            value = None if value.get("bytes") else value.get("path")
        if key == "path" and not is_media(str(value)):
            continue  # the path of a text's origin, not of media
        if isinstance(value, str) and value.strip() and not value.startswith("data:"):
            references.append(value)
    return references


def is_media(name: str) -> bool:
    """Return whether a file is an image or audio, by its ending."""
    return media_kind(name) is not None


@lru_cache(maxsize=1 << 18)
def _file_digest(path: str, member: str, modified: int, size: int) -> str:
    """Return the SHA-256 of one version of a file, cached because every data check needs the hash."""
    return hashlib.sha256(Media("image", path, path, member).read()).hexdigest()


@lru_cache(maxsize=4)
def open_archive(path: str, modified: int, size: int) -> zipfile.ZipFile:
    """Return an open zip archive, cached so the directory is read once for all members."""
    return zipfile.ZipFile(path)


def _too_large(size: int) -> RowRefused:
    return media_error(
        "too_large", f"the file has {size:,} bytes; the limit is {MOST_MEDIA_BYTES:,}."
    )


def reason_of(error: Exception) -> str:
    """Return the first line of an error of a library, without addresses of objects."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    text = re.sub(r" <_io\.\w+ object at 0x\w+>", "", text)  # Pillow prints the address
    return text.rstrip(".")[:200]


def media_error(rule: str, message: str, fix: str = "") -> RowRefused:
    """Return the error for an input that breaks ``media.RULE``."""
    return RowRefused(
        f"media.{rule}", message, fix or "Convert the file to a common format, or remove the row."
    )


PREPROCESSOR_CONFIG, PROCESSOR_CONFIG = "preprocessor_config.json", "processor_config.json"
_SHARED_FIELDS = ("image_seq_len", "processor_class")
"""Fields of ``processor_config.json`` that a processor of images in text needs."""


class Processor(ABC):
    """Base of conversions from inputs of one kind to network arrays.

    Implementations are immutable, comparable and picklable. A processor is stored with a model and
    converts training rows and requests.
    """

    name: ClassVar[str]
    """Name in :data:`PROCESSORS`."""
    kind: ClassVar[MediaKind]
    in_text: ClassVar[bool] = False
    """True for images inside a conversation (:mod:`luthier.data.conversations.image_tokens`)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Shape of an array."""

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings of ``[data]`` that :meth:`with_settings` accepts."""
        return ()

    @staticmethod
    @abstractmethod
    def parse(fields: Mapping[str, Any]) -> Processor | None:
        """Return the processor of a ``preprocessor_config.json``; ``None`` if of another kind."""

    @staticmethod
    @abstractmethod
    def for_shape(shape: tuple[int, int, int]) -> Processor:
        """Return a processor of arrays of ``shape`` with the usual settings."""

    @abstractmethod
    def with_settings(self, **settings: Any) -> Processor:
        """Return a copy with other :attr:`settings`."""

    @abstractmethod
    def array(
        self, media: Media, augmentation: Augmentation | None = None, seed: tuple[int, ...] = ()
    ) -> NDArray[np.float32]:
        """Return the array of one input, randomly changed by ``augmentation``.

        Raises:
            RowRefused: if the input cannot be decoded.
        """

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """Return the contents of ``preprocessor_config.json``."""

    def is_whole(self, media: Media) -> bool:
        """Return whether the array of an input has no visible padding."""
        return True


PROCESSORS: PluginTable[type[Processor]] = PluginTable("processors", Processor, {})
"""Processors by name, from :mod:`luthier.media` and plugins."""


@dataclass(frozen=True, slots=True)
class MediaInput:
    """An input with the processor and the random changes to apply."""

    media: Media
    processor: Processor
    augmentation: Augmentation | None = None
    seed: tuple[int, ...] = ()
    """Seed of the random changes."""
    file: str = ""
    """File of the row."""
    line: int = 0

    @property
    def is_whole(self) -> bool:
        """False for padded inputs, such as the first windows of a time series."""
        return self.processor.is_whole(self.media)

    def array(self) -> NDArray[np.float32]:
        """Return the array ``[C, H, W]``.

        Raises:
            RowRefused: if the file cannot be read any more.
        """
        try:
            return self.processor.array(self.media, self.augmentation, self.seed)
        except RowRefused as bad:
            problem, location = bad.problem, Location(self.file, self.line)
            message = f"{self.media.name}: {problem.message}"  # row.file may be a folder
            raise RowRefused(problem.rule, message, problem.advice, location) from bad


def read_processor(folder: Path) -> Processor | None:
    """Return the processor of the model in ``folder``; ``None`` for a model of text alone.

    Raises:
        UnknownModel: for an unsupported processor.
        CorruptFile: for values out of range.
    """
    path, whole = folder / PREPROCESSOR_CONFIG, folder / PROCESSOR_CONFIG
    fields = read_json(path) if path.is_file() else None
    if whole.is_file() and isinstance(found := read_json(whole), dict):
        # Since version 5, transformers stores the image processor inside this file.
        fields = found.get("image_processor") if fields is None else fields
        if isinstance(fields, dict):
            fields = {**fields, **{k: v for k, v in found.items() if k in _SHARED_FIELDS}}
    return None if fields is None else parse_processor(fields, path)


def parse_processor(fields: Any, path: Path) -> Processor:
    """Return the processor that ``fields`` of the file ``path`` describe.

    Raises:
        UnknownModel, CorruptFile: see :func:`read_processor`.
    """
    try:
        for kind in PROCESSORS.values():
            if (processor := kind.parse(fields)) is not None:
                return processor
        name = fields.get("feature_extractor_type", "without a type")
        raise UnknownModel(f"the preprocessor {name} is not supported")
    except UnknownModel as error:
        raise UnknownModel(f"{path}: {error}", rule="processor.unknown") from error
    except ValidationError as error:
        first = error.errors()[0]
        setting, value = ".".join(map(str, first["loc"])), str(first["input"])[:80]
        raise CorruptFile(
            f"{path}: {setting}={value}: {describe_constraint(first)}", rule="processor.invalid"
        ) from error
    except KeyError as error:
        raise CorruptFile(f"{path}: {error} is missing", rule="processor.invalid") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}", rule="processor.invalid") from error


def save_processor(processor: Processor, folder: Path) -> None:
    """Write :data:`PREPROCESSOR_CONFIG`."""
    fields = processor.fields()
    write_json(folder / PREPROCESSOR_CONFIG, fields)
    if processor.in_text:
        write_json(folder / PROCESSOR_CONFIG, {k: fields[k] for k in _SHARED_FIELDS if k in fields})
