"""Decoders of images to pixels and of audio to samples, with size limits that are checked first."""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.inputs import MOST_PIXELS, Media, conversion_fix, media_error, reason_of
from luthier.errors import RowRefused

_NPY = b"\x93NUMPY"
"""First bytes of an ``.npy`` file."""
_ORIENTATION = 0x0112
"""EXIF tag of the rotation; 5 to 8 exchange width and height."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""Formats that Pillow may open. All are plain pixel formats; EPS, for example, is a program."""
MOST_SECONDS = 600
"""Maximum length of audio, in seconds."""
MOST_SAMPLES = 64_000_000
"""Maximum number of samples in all channels: silence compresses to almost nothing."""
_WHITES = (1.0, 255.0, 65535.0)
"""Candidates for the value of a white pixel if the number type leaves the value open."""
_OVERSHOOT = 0.2
"""Maximum relative overshoot of float pixels: resampling filters overshoot."""
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, MemoryError, KeyError, TypeError, IndexError,
    struct.error, zlib.error,
)  # fmt: skip
"""Exceptions of Pillow's decoders on damaged files."""

Pixels = NDArray[np.uint8]
"""An RGB image ``[H, W, 3]``."""


def read_pixels(media: Media) -> Pixels:
    """Return an upright RGB image, with white in place of transparency.

    Raises:
        RowRefused: for a file that is not an image, or too large an image.
    """
    if media.array is not None:
        return _array_pixels(media.array)
    return decode_image(media.read(), media.most)


def read_samples(media: Media) -> tuple[NDArray[np.float32], int]:
    """Return the mean of all audio channels, ``[T]`` from -1 to 1, and the sampling rate.

    Raises:
        RowRefused: for a file that is not audio, or audio that is too long.
    """
    if media.array is not None:
        raise media_error("unreadable", "an array of samples has no sampling rate.")
    return decode_audio(media.read(), media.most)


def read_place(media: Media) -> str:
    """Return the place of an image in its EXIF data, to a tenth of a degree; empty if unknown.

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


def image_size(media: Media) -> tuple[int, int]:
    """Return width and height of an upright image, without decoding the pixels.

    Raises:
        RowRefused: for a file that is not an image, or too large an image.
    """
    if media.array is not None or (data := media.read()).startswith(_NPY):
        height, width = read_pixels(media).shape[:2]
        return width, height
    with _open_image(data, media.most or MOST_PIXELS) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
        return (height, width) if turned else (width, height)


def decode_image(data: bytes, most: int | None = None, upright: bool = True) -> Pixels:
    """Decode an image of at most ``most`` pixels, rotated by its EXIF data if ``upright``."""
    from PIL import Image, ImageOps

    if data.startswith(_NPY):
        return _array_pixels(_read_npy(data, most or MOST_PIXELS))
    with _open_image(data, most or MOST_PIXELS) as opened:
        image = ImageOps.exif_transpose(opened) if upright else opened
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
    """Open an image of at most ``most`` pixels for decoding in the block.

    Raises:
        RowRefused: for a file that is not an image, or too large an image.
    """
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
                width, height = opened.size
                if width * height > most:
                    text = f"{width:,} x {height:,} pixels; at most {most:,} are decoded."
                    raise media_error("too_large", f"the image has {text}", "Scale the image.")
                yield opened
    except RowRefused:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit comes before the size is known
        text = f"the image has more than {most:,} pixels."
        raise media_error("too_large", text, "Scale the image.") from None
    except _DAMAGE as error:
        message, fix = f"the image cannot be decoded: {reason_of(error)}.", ""
        if data[4:8] == b"ftyp" and b"avif" not in data[8:64]:  # cameras also write HEIC under .jpg
            message = "HEIC files are not supported."
            fix = conversion_fix([".heic"])
        raise media_error("unreadable", message, fix) from error


def white_of(values: NDArray[Any]) -> float:
    """Return the value of a white pixel in an image, or in an array of images.

    Booleans and unsigned integers of 8 and 16 bits use the range of the type. Other types are in
    use with several ranges: white is the smallest of 1 (floats only), 255 and 65535 that covers the
    largest value.

    Raises:
        RowRefused: for values outside all ranges, such as normalized pixels from -1 to 1.
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
        raise media_error(
            "unreadable",
            f"pixels from {low:g} to {high:g} are outside of the known ranges.",
            "Scale the pixels to 0 to 1 (floats), 0 to 255 or 0 to 65535.",
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
        raise media_error("unreadable", f"the array cannot be read: {reason_of(error)}.") from error
    if math.prod(array.shape[:2]) > most:
        text = f"the array has the shape {array.shape}; at most {most:,} pixels are decoded."
        raise media_error("too_large", text)
    return array


def _array_pixels(array: NDArray[Any]) -> Pixels:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    is_shaped = array.ndim in (2, 3) and array.shape[2:] in ((), (3,)) and array.size
    if array.dtype.kind not in "buif" or not is_shaped:
        raise media_error(
            "unreadable",
            f"the array is {array.dtype} of shape {array.shape}; images are numbers, [H, W] or "
            "[H, W, 3].",
        )
    if array.dtype != np.uint8:
        array = scale_pixels(array, white_of(array))
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, -1))


def decode_audio(data: bytes, most: int | None = None) -> tuple[NDArray[np.float32], int]:
    """Decode audio of at most ``most`` samples in all channels. PCM in WAV needs no extra package."""
    most = most or MOST_SAMPLES
    if data[:4] == b"RIFF" and (pcm := _read_pcm(data, most)) is not None:
        samples, rate = pcm
    else:
        try:
            import soundfile
        except ImportError:
            raise media_error(
                "unreadable",
                "without soundfile, only WAV files with PCM samples are supported.",
                "Install soundfile: pip install 'luthier[audio]'.",
            ) from None
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                _check_length(file.frames, file.samplerate, file.channels, most)
                samples_TC, rate = file.read(dtype="float32", always_2d=True), file.samplerate
            with np.errstate(invalid="ignore"):
                samples = samples_TC.mean(1)
        except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
            message, fix = f"the audio cannot be decoded: {reason_of(error)}.", ""
            if data[4:8] == b"ftyp":
                message = "M4A files are not supported."
                fix = conversion_fix([".m4a"])
            raise media_error("unreadable", message, fix) from error
    if not len(samples) or not np.isfinite(samples).all():
        raise media_error(
            "unreadable",
            "the audio has no samples." if not len(samples) else "samples are not finite.",
        )
    return samples, rate


def _read_pcm(data: bytes, most: int) -> tuple[NDArray[np.float32], int] | None:
    """Decode a WAV file of 8, 16, 24 or 32 bits; returns ``None`` for other encodings."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, rate, channels = file.getsampwidth(), file.getframerate(), file.getnchannels()
            if width > 4:
                return None
            # Headers of pipes and truncated files claim too many frames.
            count = min(file.getnframes(), len(data) // (width * channels))
            _check_length(count, rate, channels, most)
            raw = file.readframes(count)
    except (wave.Error, EOFError, RuntimeError):  # RuntimeError for a chunk beyond the end
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
        raise media_error("unreadable", "the audio has no sampling rate.")
    if frames > MOST_SECONDS * rate:
        text = f"the audio lasts {frames / rate:,.0f} s; the maximum is {MOST_SECONDS} s."
        raise media_error("too_large", text)
    if frames * channels > most:
        text = f"the audio has {frames * channels:,} samples; the maximum is {most:,}."
        raise media_error("too_large", text)
