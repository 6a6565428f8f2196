"""Decoding of images and audio: usual, unusual and malicious files."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import wave
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from luthier.data import inputs
from luthier.data.inputs import Media
from luthier.errors import Problem, RowRefused
from luthier.media import decoding
from luthier.media.decoding import decode_audio, decode_image, read_pixels, read_place


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def picture(height: int = 6, width: int = 9) -> NDArray[np.uint8]:
    """Return a smooth image, which JPEG preserves closely."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, np.full_like(x, 128)]
    return np.stack(channels, -1).astype(np.uint8)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))


def refusal(data: bytes) -> Problem:
    with pytest.raises(RowRefused) as refused:
        decode_image(data)
    return refused.value.problem


@pytest.mark.parametrize(("form", "error"), [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("JPEG", 8)])
def test_common_formats_are_decoded(form: str, error: int) -> None:
    pixels = decode_image(encoded(Image.fromarray(picture(48, 64)), form))
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - picture(48, 64)).max() <= error


def test_grey_palette_and_the_first_picture_of_a_gif() -> None:
    grey = decode_image(encoded(Image.fromarray(picture()[..., 0])))
    assert (grey == picture()[..., :1]).all() and grey.shape == (6, 9, 3)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(moving).tolist() == [[[255, 0, 0]] * 4] * 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    pixels = decode_image(encoded(image.convert(mode)))
    assert pixels.tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_16_bit_pixels_are_scaled_to_8_bits() -> None:
    values = np.array([[0, 257, 0x8080, 65535]], dtype=np.uint16)
    assert decode_image(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]
    # All dark: still 16 bits.
    dark = np.array([[0, 200]], dtype=np.uint16)
    assert decode_image(encoded(Image.fromarray(dark)))[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize("type_", ["float32", "int32"])
def test_value_range_is_inferred_from_values(type_: str, white: int) -> None:
    if type_ == "int32" and white == 1:
        return  # a label mask, whose classes are no levels of grey
    values = (np.array([[0, 0.2, 0.4, 1]]) * white).astype(type_)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"))
    assert pixels[0, :, 0].tolist() == [0, 51, 102, 255]


def test_float_overshoot_is_clipped() -> None:
    for white in (1, 255):
        values = np.array([[-0.1, 0.5, 1.1]], np.float32) * white
        pixels = decode_image(encoded(Image.fromarray(values), "TIFF"))
        assert pixels[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[-1.0, 1.0], [-1000.0, 3000.0], [0.0, 1e6], [0.0, np.inf]])
def test_floats_of_unknown_range_are_refused(values: list[float]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert refusal(encoded(image, "TIFF")).rule == "media.unreadable"


def test_heic_file_error_suggests_conversion() -> None:
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    assert "NEW.jpg" in refusal(data).advice


def test_nan_pixels_are_black() -> None:
    values = np.array([[np.nan, 255.0, 0.0]], dtype=np.float32)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"))
    assert pixels[0, :, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(turn: int) -> None:
    """Each orientation of EXIF, undone by hand."""
    upright = Image.fromarray(picture())
    stored = {
        1: lambda i: i,
        2: lambda i: i[:, ::-1],
        3: lambda i: i[::-1, ::-1],
        4: lambda i: i[::-1],
        5: lambda i: i.transpose(1, 0, 2),
        6: lambda i: np.rot90(i, 1),
        7: lambda i: i.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda i: np.rot90(i, -1),
    }[turn](np.asarray(upright))
    fields = Image.Exif()
    fields[0x0112] = turn
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=fields)
    assert (decode_image(data) == np.asarray(upright)).all()


def bomb(side: int) -> bytes:
    """Return the start of a PNG of ``side`` x ``side`` pixels that would decompress to zeros."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(999)))


@pytest.mark.parametrize("side", [8_001, 60_000])
def test_oversized_image_is_not_decompressed(side: int) -> None:
    assert refusal(bomb(side)).rule == "media.too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"This is a text and no picture, whatever its name says.",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        encoded(Image.fromarray(picture()), "EPS"),
        encoded(Image.fromarray(picture()), "PDF"),
        encoded(NOISE)[:3000],
        encoded(NOISE, "JPEG")[:3000],
        encoded(NOISE, "GIF")[:3000],
    ],
    ids=["empty", "text", "eps", "svg", "eps image", "pdf", "cut png", "cut jpeg", "cut gif"],
)
def test_invalid_images_are_refused(data: bytes) -> None:
    assert refusal(data).rule == "media.unreadable"


def test_damaged_bytes_raise_only_row_refused() -> None:
    chance = random.Random(0)
    image = Image.fromarray(picture(20, 30))
    originals = [encoded(image, form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM")]
    for number in range(120):
        data = bytearray(originals[number % len(originals)])
        for _ in range(chance.choice((1, 4, 16))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        for reads in (decode_image, lambda each: read_place(Media("image", "x", data=each))):
            try:
                reads(bytes(data))
            except RowRefused as bad:
                assert bad.rule in ("media.unreadable", "media.too_large")


def test_gps_position_is_read_from_exif() -> None:
    fields = Image.Exif()
    place = fields.get_ifd(0x8825)
    place[1], place[2], place[3], place[4] = "N", (48.0, 12.0, 0.0), "E", (11.0, 30.0, 0.0)
    data = encoded(Image.fromarray(picture()), "JPEG", exif=fields)
    assert read_place(Media("image", "x", data=data)) == "48.2 N, 11.5 E"
    assert read_place(Media("image", "x", data=encoded(Image.fromarray(picture())))) == ""
    assert read_place(Media("image", "x", array=picture())) == ""


def npy(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("type_", "white"),
    [
        ("uint8", 255),
        ("uint16", 65535),
        ("float32", 1),
        ("float64", 255),
        ("bool", 1),
        ("int64", 255),
    ],
)
def test_npy_arrays_are_decoded(type_: str, white: int) -> None:
    values = (np.array([[0, 0.2, 1], [0, 0.4, 1]]) * white).astype(type_)
    for array in (values, values[..., None], np.stack([values] * 3, -1)):
        pixels = decode_image(npy(array))
        low = (255, 255) if type_ == "bool" else (51, 102)
        assert pixels.shape == (2, 3, 3)
        assert pixels[..., 2].tolist() == [[0, low[0], 255], [0, low[1], 255]]
    assert read_place(Media("image", "x", data=npy(values))) == ""


@pytest.mark.parametrize(
    "data",
    [
        npy(np.zeros(4)), npy(np.zeros((2, 2, 4))), npy(np.zeros((0, 2))), npy(np.full((2, 2), -1.0)),
        npy(np.array([["a"]])), npy(np.zeros((4, 4)))[:-8], b"\x93NUMPY" + bytes(40),
    ],
)  # fmt: skip
def test_npy_arrays_without_images_are_refused(data: bytes) -> None:
    assert refusal(data).rule == "media.unreadable"


def test_pickled_and_oversized_arrays_are_refused() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([[{}]], dtype=object), allow_pickle=True)
    assert refusal(stream.getvalue()).rule == "media.unreadable"
    with pytest.raises(RowRefused) as refused:
        decode_image(npy(np.zeros((2, 2))), 3)
    assert refused.value.rule == "media.too_large"


def test_an_array_is_an_image_of_eight_bits() -> None:
    assert (read_pixels(Media("image", "x", array=picture())) == picture()).all()
    for grey in (picture()[..., 0], picture()[..., :1]):
        assert (read_pixels(Media("image", "x", array=grey)) == picture()[..., :1]).all()
    for array in (picture().astype(np.complex64), picture()[0, 0], np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(RowRefused) as refused:
            read_pixels(Media("image", "x", array=array))
        assert refused.value.rule == "media.unreadable"


def test_equal_bytes_have_equal_digest(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(picture()))
    (tmp_path / "a.png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.png", data)
    places = [
        Media("image", "1", tmp_path / "a.png"),
        Media("image", "2", tmp_path / "a.zip", "b.png"),
        Media("image", "3", data=data),
    ]
    assert len({each.digest() for each in places}) == 1
    assert all((read_pixels(each) == picture()).all() for each in places)
    # The same bytes as pixels of another shape are another image.
    flat = np.zeros((4, 6), np.uint8)
    one, other = Media("image", "4", array=flat), Media("image", "5", array=flat.reshape(6, 4))
    assert one.digest() != other.digest()


def test_changed_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = tmp_path / "a.png", list[str]()
    read = Media.read
    monkeypatch.setattr(Media, "read", lambda media: (reads.append(media.name), read(media))[1])
    for number in range(2):
        path.write_bytes(bytes(number + 1))
        wanted = hashlib.sha256(bytes(number + 1)).hexdigest()
        assert [Media("image", name, str(path)).digest() for name in "ab"] == [wanted] * 2
    assert reads == [str(path)] * 2


def test_changed_archive_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for number in range(2):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x" * number + str(number))
        assert Media("image", "x", path, "a.txt").read().endswith(str(number).encode())


def test_a_damaged_member_of_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", encoded(Image.fromarray(picture(50, 50)), "BMP"))
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)
    for member in ("a.png", "missing.png"):
        with pytest.raises(RowRefused) as refused:
            Media("image", "x", path, member).read()
        assert refused.value.rule == "media.unreadable"
    with pytest.raises(RowRefused):
        Media("image", "x", tmp_path / "missing.png").read()


def test_files_with_too_many_bytes_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MOST_MEDIA_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1001))
    for each in (Media("image", "1", tmp_path / "a.png"),
                 Media("image", "2", tmp_path / "a.zip", "a.png")):  # fmt: skip
        with pytest.raises(RowRefused) as refused:
            each.read()
        assert refused.value.rule == "media.too_large"


WAVE = (0.6 * np.sin(np.arange(400) / 7)).astype(np.float32)


def wav(
    width: int, channels: int = 1, rate: int = 8000, samples: NDArray[np.float32] = WAVE
) -> bytes:
    """A WAV file by hand; a second channel has the opposite sign at half strength."""
    sides = np.stack([samples * (1 if side == 0 else -0.5) for side in range(channels)], 1)
    if width == 1:
        raw = (sides * 128 + 128).round().astype(np.uint8).tobytes()
    else:
        whole = (sides.astype(np.float64) * (2 ** (8 * width - 1) - 1)).round().astype(np.int64)
        raw = b"".join(int(v).to_bytes(width, "little", signed=True) for v in whole.reshape(-1))
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(raw)
    return stream.getvalue()


@pytest.mark.parametrize(("width", "error"), [(1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_of_each_width(width: int, channels: int, error: float) -> None:
    samples, rate = decode_audio(wav(width, channels))
    assert rate == 8000 and samples.dtype == np.float32
    wanted = WAVE if channels == 1 else WAVE / 4
    assert samples.shape == WAVE.shape and np.abs(samples - wanted).max() < error


def test_truncated_recording_is_read_to_the_end() -> None:
    whole = wav(2)
    samples, _ = decode_audio(whole[:-101])
    assert len(samples) == 349 and np.abs(samples - WAVE[:349]).max() < 1e-4
    # Audio written to a pipe has the maximum size in its header.
    piped = bytearray(whole)
    piped[40:44] = b"\xff\xff\xff\xff"
    assert (decode_audio(bytes(piped))[0] == decode_audio(whole)[0]).all()


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (wav(2)[:44], "unreadable"),
        (wav(2, rate=1, samples=np.zeros(700, np.float32)), "too_large"),
        (b"RIFF" + bytes(60), "unreadable"),
        (b"words", "unreadable"),
    ],
    ids=["empty", "long", "zeros", "text"],
)
def test_invalid_audio_is_refused(data: bytes, rule: str) -> None:
    with pytest.raises(RowRefused) as refused:
        decode_audio(data)
    assert refused.value.rule == f"media.{rule}"


def test_flac_and_float_wav_with_soundfile() -> None:
    soundfile = pytest.importorskip("soundfile")
    for form, subtype, error in (("FLAC", "PCM_16", 1e-4), ("WAV", "FLOAT", 1e-6)):
        stream = io.BytesIO()
        soundfile.write(stream, np.stack([WAVE, WAVE / 2], 1), 8000, subtype, format=form)
        samples, rate = decode_audio(stream.getvalue())
        assert rate == 8000 and np.abs(samples - WAVE * 0.75).max() < error
    stream = io.BytesIO()
    soundfile.write(stream, np.array([0.0, np.nan]), 8000, "FLOAT", format="WAV")
    with pytest.raises(RowRefused) as refused:
        decode_audio(stream.getvalue())
    assert refused.value.rule == "media.unreadable"


@pytest.mark.parametrize("form", ["MP3", "OPUS", "VORBIS", "AIFF"])
def test_compressed_audio_of_libsndfile(form: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    stream = io.BytesIO()
    container, subtype = ("OGG", form) if form in ("OPUS", "VORBIS") else (form, None)
    wave = np.sin(np.arange(24_000) / 20).astype(np.float32) / 2
    soundfile.write(stream, wave, 24_000, subtype, format=container)
    samples, rate = decode_audio(stream.getvalue())
    assert rate == 24_000 and abs(len(samples) - len(wave)) < 100
    middle = slice(6000, 18_000)
    assert np.corrcoef(samples[: len(wave)][middle], wave[middle])[0, 1] > 0.9


def test_m4a_names_the_conversion() -> None:
    pytest.importorskip("soundfile")
    with pytest.raises(RowRefused) as refused:
        decode_audio(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(100))
    assert "NEW.flac" in refused.value.problem.advice


def test_oversized_silence_is_not_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.setattr(decoding, "MOST_SAMPLES", 10_000)
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros((6000, 2)), 8000, format="FLAC")
    with pytest.raises(RowRefused) as refused:
        decode_audio(stream.getvalue())
    assert refused.value.rule == "media.too_large"
