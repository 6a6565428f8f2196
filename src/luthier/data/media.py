"""Images and sounds of rows: where each lies, and how its bytes become numbers.

A row holds no pixels, only where they are: a file, a member of a zip archive, bytes of a table, or an
array of an ``.npz`` file. They are decoded when a micro-batch needs them, so memory does not grow with
the number of rows. Nothing of a file is trusted: only formats without scripts are opened, and sizes are
looked at before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import os
import re
import struct
import wave
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.errors import RowRefused

MediaKind = Literal["image", "audio", "window"]
"""A ``window`` is the latest values of a time series."""
SINGULAR: Mapping[str, str] = {
    "image": "image", "audio": "sound", "window": "window of a time series", "text": "text",
}  # fmt: skip
"""What people call each kind of input."""
PLURAL: Mapping[str, str] = {
    "image": "images", "audio": "sounds", "window": "windows of a time series", "text": "texts",
}  # fmt: skip

IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".npy",
)  # fmt: skip
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
MEDIA_ENDINGS = (*IMAGE_ENDINGS, *AUDIO_ENDINGS)
_NPY = b"\x93NUMPY"
"""First bytes of an ``.npy`` file."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""What Pillow may open: formats of pixels only. EPS, for one, is a program."""
MOST_PIXELS = 64_000_000
"""Of one image; a compressed file of some kilobytes can claim any number."""
MOST_MEDIA_BYTES = 64 * 1024 * 1024
"""Of one encoded image or sound."""
MOST_SECONDS = 600
"""Of one sound."""
MOST_SAMPLES = 64_000_000
"""Of one sound, all channels counted: silence packs to nothing."""
LONGEST_WINDOW = 512
"""Values of a time series that a row has at most; no network that reads windows can be longer."""
LARGEST_VALUE = 1e100
"""Of a time series, on both sides of 0: the squares of further ones overflow."""
CONVERSIONS: Mapping[str, str] = {
    **{ending: f"magick OLD{ending} NEW.jpg" for ending in (".heic", ".heif")},
    **{ending: f"ffmpeg -i OLD{ending} NEW.flac" for ending in (".m4a", ".aac", ".wma", ".amr")},
}
"""Shell commands, by ending, for images and audio that neither Pillow nor libsndfile decodes."""
_WHITES = (1.0, 255.0, 65535.0)
"""Values of a white pixel in images whose number type does not tell the value."""
_OVERSHOOT = 0.2
"""Relative distance of float pixels from their range at most: resampling filters overshoot."""
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, MemoryError, KeyError, TypeError, IndexError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files."""

Pixels = NDArray[np.uint8]


def media_kind(name: str) -> MediaKind | None:
    """Return what a file holds by its ending; ``None`` for a file that is neither image nor audio."""
    ending = name.lower()
    if ending.endswith(IMAGE_ENDINGS):
        return "image"
    return "audio" if ending.endswith(AUDIO_ENDINGS) else None


def conversion_fix(names: Iterable[str]) -> str:
    """Return how to convert images and audio of other formats; empty if no name has such an ending."""
    lower = [name.lower() for name in names]
    return " ".join(
        f"Convert {ending} files, for example with: {command}."
        for ending, command in CONVERSIONS.items()
        if any(name.endswith(ending) for name in lower)
    )


@dataclass(frozen=True, slots=True)
class Media:
    """One image or sound, where it lies."""

    kind: MediaKind
    name: str
    """As people find it: a path, ``archive.zip/member``, ``digits.npz[17]``."""
    path: str | None = None
    """The file, or the zip archive that has it: as text, since there may be a million of them."""
    member: str = ""
    """Its name in a zip archive."""
    data: bytes | None = field(default=None, repr=False)
    """Its encoded bytes, where a table holds them."""
    array: NDArray[Any] | None = field(default=None, repr=False, compare=False)
    """Its pixels ``[H, W]`` or ``[H, W, 3]``, or values ``[T]``, where they are in memory."""
    most: int | None = None
    """Pixels or samples that it may have; else :data:`MOST_PIXELS` or :data:`MOST_SAMPLES`."""
    time: float | None = field(default=None, compare=False)
    """Of the last value of a window, in seconds, or as a number where the series counts otherwise."""

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Its encoded bytes.

        Raises:
            RowRefused: where they cannot be read, or are too many.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            if self.member:
                known = os.stat(self.path)
                return self._unpack(_archive(self.path, known.st_mtime_ns, known.st_size))
            if (size := os.stat(self.path).st_size) > MOST_MEDIA_BYTES:
                raise _too_large(size)
            return Path(self.path).read_bytes()
        except (
            OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, KeyError, RuntimeError
        ) as error:  # fmt: skip
            raise _refusal("unreadable", f"it cannot be read: {_reason(error)}.") from error

    def _unpack(self, archive: zipfile.ZipFile) -> bytes:
        size = archive.getinfo(self.member).file_size
        if size > MOST_MEDIA_BYTES:
            raise _too_large(size)
        with archive.open(self.member) as stream:
            return stream.read(MOST_MEDIA_BYTES)  # it may hold more than its directory says

    def digest(self) -> str:
        """SHA-256 of its bytes: equal files are one image, whatever they are called."""
        if self.array is not None:
            shape = f"{self.array.shape}{self.array.dtype}".encode()
            return hashlib.sha256(shape + np.ascontiguousarray(self.array).tobytes()).hexdigest()
        if (version := self.version()) is None:
            return hashlib.sha256(self.read()).hexdigest()
        return _file_digest(*version)

    def version(self) -> tuple[str, str, int, int] | None:
        """What tells one content of its file from another without reading it; ``None`` without one."""
        if self.path is None:
            return None
        try:
            state = os.stat(self.path)
        except OSError as error:
            raise _refusal("unreadable", f"it cannot be read: {_reason(error)}.") from error
        return self.path, self.member, state.st_mtime_ns, state.st_size

    def pixels(self) -> Pixels:
        """The image ``[H, W, 3]`` in RGB, upright, on white where it is transparent.

        Raises:
            RowRefused: for what is no image, or too large a one.
        """
        if self.array is not None:
            return _array_pixels(self.array)
        return decode_image(self.read(), self.most)

    def samples(self) -> tuple[NDArray[np.float32], int]:
        """The sound, all channels in one, ``[T]`` from -1 to 1, and its samples in a second.

        Raises:
            RowRefused: for what is no sound, or too long a one.
        """
        if self.array is not None:
            raise _refusal("unreadable", "an array of samples names no sampling rate.")
        return decode_audio(self.read(), self.most)

    def values(self) -> NDArray[np.float64]:
        """The values of a time series up to the row's own, ``[T]``.

        A counter that has come to billions differs from line to line in digits that float32 has not.
        """
        assert self.array is not None
        return np.asarray(self.array, np.float64)


def read_place(media: Media) -> str:
    """Return where an image was taken by its EXIF data, to a tenth of a degree; empty if unknown.

    Raises:
        RowRefused: if the image cannot be opened.
    """
    from PIL.ExifTags import IFD

    if media.array is not None or (data := media.read()).startswith(_NPY):
        return ""
    with _open_image(data, MOST_PIXELS) as image:
        fields = image.getexif().get_ifd(IFD.GPSInfo)
        try:
            degrees = [float(fields[tag][0]) + float(fields[tag][1]) / 60 for tag in (2, 4)]
            return f"{degrees[0]:.1f} {fields.get(1, '?')}, {degrees[1]:.1f} {fields.get(3, '?')}"
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            return ""


def decode_image(data: bytes, most: int | None = None) -> Pixels:
    """An encoded image of at most ``most`` pixels; see :meth:`Media.pixels`."""
    from PIL import Image, ImageOps

    if data.startswith(_NPY):
        return _array_pixels(_read_npy(data, most or MOST_PIXELS))
    with _open_image(data, most or MOST_PIXELS) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        elif image.mode.startswith("I;16") or image.mode in ("I", "F"):
            values = np.asarray(image)
            image = Image.fromarray(scale_pixels(values, white_of(values)))
        return np.array(image.convert("RGB"))


@contextmanager
def _open_image(data: bytes, most: int) -> Iterator[Any]:
    """An image of at most ``most`` pixels, which may be decoded in the block.

    Raises:
        RowRefused: for what is no image, or too large a one.
    """
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that Pillow cannot read; pixels matter
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
                width, height = opened.size
                if width * height > most:
                    text = f"{width:,} x {height:,} pixels; at most {most:,} are decoded."
                    raise _refusal("too_large", f"it says to have {text}")
                yield opened
    except RowRefused:
        raise
    except Image.DecompressionBombError:  # Pillow's own bound, before the size can be asked
        text = f"it says to have more pixels than the {most:,} that are decoded."
        raise _refusal("too_large", text) from None
    except _DAMAGE as error:
        message, fix = f"it is no image that can be read: {_reason(error)}.", ""
        if data[4:8] == b"ftyp" and b"avif" not in data[8:64]:  # cameras name such files .jpg, too
            message = "it is a HEIC file, which Pillow cannot decode."
            fix = conversion_fix([".heic"])
        raise _refusal("unreadable", message, fix) from error


def white_of(values: NDArray[Any]) -> float:
    """Return the value of a white pixel in an image, or in an array of images.

    Booleans and unsigned integers of 8 and 16 bits have the range of their type. Other types are used
    for several ranges: white is then the smallest of 1 (floats only), 255 and 65535 that is not below
    the largest value.

    Raises:
        RowRefused: for values outside of all ranges, such as those of normalized pixels from -1 to 1.
    """
    if values.dtype.kind == "b":
        return 1.0
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return 2.0 ** (8 * values.dtype.itemsize) - 1
    # fmin and fmax ignore NaN without a copy of the array.
    low, high = (float(f.reduce(values, axis=None, initial=0)) for f in (np.fmin, np.fmax))
    overshoot, whites = (_OVERSHOOT, _WHITES) if values.dtype.kind == "f" else (0, _WHITES[1:])
    white = next((each for each in whites if high <= each * (1 + overshoot)), None)
    if white is None or low < -overshoot * max(high, 1):
        raise _refusal(
            "unreadable",
            f"its pixels range from {low:g} to {high:g}; ranges that are read are 0 to 1 (floats), "
            "0 to 255 and 0 to 65535.",
            "Scale the pixels to one of these ranges, or save the image with 8 or 16 bits.",
        )
    return white


def scale_pixels(values: NDArray[Any], white: float) -> Pixels:
    """Scale pixels from 0..``white`` to 0..255; NaN becomes black."""
    scaled = np.clip(np.nan_to_num(values.astype(np.float64)) / white, 0, 1)
    return (scaled * 255).round().astype(np.uint8)


def _read_npy(data: bytes, most: int) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except _DAMAGE as error:
        raise _refusal(
            "unreadable", f"it is no array that can be read: {_reason(error)}."
        ) from error
    if math.prod(array.shape[:2]) > most:
        text = f"it is an array with the shape {array.shape}; at most {most:,} pixels are decoded."
        raise _refusal("too_large", text)
    return array


def _array_pixels(array: NDArray[Any]) -> Pixels:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    is_shaped = array.ndim in (2, 3) and array.shape[2:] in ((), (3,)) and array.size
    if array.dtype.kind not in "buif" or not is_shaped:
        raise _refusal(
            "unreadable",
            f"an array of {array.dtype} with shape {array.shape} is no image; images are numbers, "
            "[H, W] or [H, W, 3].",
        )
    if array.dtype != np.uint8:
        array = scale_pixels(array, white_of(array))
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, -1))


def decode_audio(data: bytes, most: int | None = None) -> tuple[NDArray[np.float32], int]:
    """An encoded sound as samples, at most ``most`` in all channels; see :meth:`Media.samples`.

    PCM in WAV needs no further package.
    """
    most = most or MOST_SAMPLES
    if data[:4] == b"RIFF" and (read := _read_pcm(data, most)) is not None:
        samples, rate = read
    else:
        try:
            import soundfile
        except ImportError:
            raise _refusal(
                "unreadable",
                "only WAV files of whole numbers are read without the package soundfile.",
                "Install it: pip install 'luthier[audio]'.",
            ) from None
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                _check_length(file.frames, file.samplerate, file.channels, most)
                read_TC, rate = file.read(dtype="float32", always_2d=True), file.samplerate
            with np.errstate(invalid="ignore"):
                samples = read_TC.mean(1)
        except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
            message, fix = f"it is no sound that can be read: {_reason(error)}.", ""
            if data[4:8] == b"ftyp":
                message = "it is an M4A file, which libsndfile cannot decode."
                fix = conversion_fix([".m4a"])
            raise _refusal("unreadable", message, fix) from error
    if not len(samples) or not np.isfinite(samples).all():
        raise _refusal("unreadable", "it has no samples." if not len(samples) else "it is damaged.")
    return samples, rate


def _read_pcm(data: bytes, most: int) -> tuple[NDArray[np.float32], int] | None:
    """A WAV file of 8, 16, 24 or 32 bits; ``None`` for one of another kind."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, rate, channels = file.getsampwidth(), file.getframerate(), file.getnchannels()
            if width > 4:
                return None
            # What was written to a pipe, or cut off, claims more than there is.
            count = min(file.getnframes(), len(data) // (width * channels))
            _check_length(count, rate, channels, most)
            raw = file.readframes(count)
    except (wave.Error, EOFError, RuntimeError):  # the last of a part that ends behind the file
        return None
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if width == 1:  # the only width that is unsigned
        samples = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        bytes_N3 = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(bytes_N3), 4), np.uint8)
        wide[:, 1:] = bytes_N3
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        samples = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return samples.reshape(-1, channels).mean(1), rate


def _check_length(frames: int, rate: int, channels: int, most: int) -> None:
    if rate <= 0:
        raise _refusal("unreadable", "it names no sampling rate.")
    if frames > MOST_SECONDS * rate:
        text = f"it lasts {frames / rate:,.0f} s; at most {MOST_SECONDS} are read."
        raise _refusal("too_large", text)
    if frames * channels > most:
        text = f"it has {frames * channels:,} samples; at most {most:,} are read."
        raise _refusal("too_large", text)


@lru_cache(maxsize=1 << 18)
def _file_digest(path: str, member: str, modified: int, size: int) -> str:
    """SHA-256 of a file as it was last written: each check of the data asks for the hash again."""
    return hashlib.sha256(Media("image", path, path, member).read()).hexdigest()


@lru_cache(maxsize=4)
def _archive(path: str, modified: int, size: int) -> zipfile.ZipFile:
    """An open archive, as it was last written: its directory is read once for all members."""
    return zipfile.ZipFile(path)


def _too_large(size: int) -> RowRefused:
    return _refusal(
        "too_large", f"the file has {size:,} bytes; at most {MOST_MEDIA_BYTES:,} are read."
    )


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    text = re.sub(r" <_io\.\w+ object at 0x\w+>", "", text)  # Pillow names the bytes in memory
    return text.rstrip(".")[:200]


def _refusal(rule: str, message: str, fix: str = "") -> RowRefused:
    return RowRefused(
        f"media.{rule}",
        message,
        fix or "Replace the file by one in a usual form, or remove it and its row.",
    )
