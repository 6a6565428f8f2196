"""Findings of the checks of images and audio, one rule at a time."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from luthier.data.conversations.chat import ChatFormat
from luthier.data.inputs import Media
from luthier.data.shapes.conversations import Conversation
from luthier.data.shapes.media import CaptionedImage, LabelledAudio, LabelledImage
from luthier.gate.check import CheckContext
from luthier.gate.checks import NO_READER, checks_for
from luthier.gate.checks.duplicates import Duplicates
from luthier.gate.report import Report, next_steps
from luthier.gate.scan import inspect_rows
from luthier.media.checks.media_files import MediaFiles
from luthier.media.processors import AudioProcessor, FeatureExtractor, ImageProcessor
from luthier.types import IMAGE_MARK, Message, Row


def noise(seed: int, size: int = 48) -> NDArray[np.uint8]:
    """Return an image of random soft color patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC))


def image(data: bytes | NDArray[np.uint8], label: str = "a", line: int = 1, file: str = "t") -> Row:
    name = f"{line}.png"
    if isinstance(data, bytes):
        return LabelledImage(file, line, Media("image", name, data=data), label)
    return LabelledImage(file, line, Media("image", name, array=data), label)


def encoded(pixels: NDArray[np.uint8], form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def sound(samples: NDArray[np.float64], rate: int = 16_000) -> Row:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return LabelledAudio("t", 1, Media("audio", "1.wav", data=stream.getvalue()), "a")


def check(*rows: Row, reads: Any = None, **splits: list[Row]) -> Report:
    return inspect_rows({"train": [*rows], **splits}, [MediaFiles(reads)])


def messages(report: Report) -> dict[str, list[str]]:
    examples = report.findings.examples.items()
    return {rule: [f"{each.place}: {each.message}" for each in found] for rule, found in examples}


def places(report: Report) -> dict[str, list[tuple[str, ...]]]:
    """Return the place of each finding and of the other rows of the finding, by rule."""
    return {
        rule: [(str(each.place), *map(str, each.others)) for each in found]
        for rule, found in report.findings.examples.items()
    }


TONE = 0.5 * np.sin(np.arange(16_000) / 9)


def test_valid_files_have_no_findings_and_size_counts() -> None:
    report = check(*(image(noise(n), line=n) for n in range(1, 5)), reads=ImageProcessor(48, 48))
    assert not report.findings.counts
    assert report.summaries["media"]["splits"]["train"]["sizes"]["counts"] == {"48 x 48": 4}
    report = check(sound(TONE), reads=AudioProcessor())
    assert not report.findings.counts
    assert report.summaries["media"]["splits"]["train"]["sizes"]["counts"] == {"16,000 Hz": 1}


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (image(b"a text"), "media.unreadable"),
        (image(encoded(noise(1))[:-400]), "media.unreadable"),
        (image(np.zeros((2, 2), np.complex64)), "media.unreadable"),  # type: ignore[arg-type]
        (LabelledAudio("t", 1, Media("audio", "1", data=b"a text"), "a"), "media.unreadable"),
        (sound(np.zeros(601), rate=1), "media.too_large"),
    ],
    ids=["text", "cut off", "no image", "no sound", "long"],
)
def test_unreadable_file_is_an_error(row: Row, rule: str) -> None:
    report = check(row, image(noise(2), line=2))
    assert dict(report.findings.counts) == {rule: 1} and report.exit_code == 2
    ((_, (message,)),) = messages(report).items()
    assert row.media.name in message  # type: ignore[attr-defined]


def test_unreadable_file_leaves_remaining_checks_running(tmp_path: Path) -> None:
    rows = [LabelledImage("t", 1, Media("image", "gone.png", tmp_path / "gone.png"), "a"),
            image(noise(1), line=2)]  # fmt: skip
    report = inspect_rows({"train": rows}, [Duplicates(), MediaFiles()])
    assert report.findings.counts["media.unreadable"] == 1


@pytest.mark.parametrize(
    "other",
    [
        encoded(noise(1), "JPEG", quality=60),
        encoded(noise(1, 96)),
    ],
    ids=["form", "size"],
)
def test_similar_images_are_reported(other: bytes) -> None:
    one, two = image(encoded(noise(1))), image(other, line=2)
    assert places(check(one, two)) == {"media.similar": [("t:2", "t:1")]}
    contradiction = check(one, image(other, "b", 2))
    assert places(contradiction) == {"media.contradiction": [("t:2", "t:1")]}
    assert messages(contradiction)["media.contradiction"][0].endswith(": a and b.")
    held_out = image(other, line=9, file="v")
    assert places(check(one, validation=[held_out])) == {"media.leakage": [("v:9", "t:1")]}


def test_images_of_different_colour_are_not_similar() -> None:
    """A red and a green light of the same brightness."""
    lights = np.zeros((2, 32, 32, 3), np.uint8)
    lights[0, 8:24, 8:24] = (200, 0, 0)
    lights[1, 8:24, 8:24] = (0, 102, 0)
    report = check(image(lights[0], "stop"), image(lights[1], "go", 2))
    assert not report.findings.counts
    many = check(*(image(noise(n), line=n) for n in range(1, 200)))
    assert not many.findings.counts


def test_photograph_location_is_reported() -> None:
    fields = Image.Exif()
    place = fields.get_ifd(0x8825)
    place[1], place[2], place[3], place[4] = "S", (33.0, 54.0, 0.0), "W", (70.0, 42.0, 0.0)
    report = check(image(encoded(noise(1), "JPEG", exif=fields)))
    ((message,),) = messages(report).values()
    assert places(report) == {"media.location": [("t:1",)]} and "33.9 S, 70.7 W" in message


def test_small_images_are_reported_for_known_input_size() -> None:
    small = image(noise(1, 12))
    report = check(small, reads=ImageProcessor(64, 64))
    ((message,),) = messages(report).values()
    assert places(report) == {"media.low_resolution": [("t:1",)]}
    assert "12 x 12" in message and "64 x 64" in message
    for reads in (None, ImageProcessor(48, 48)):
        assert not check(small, reads=reads).findings.counts


@pytest.mark.parametrize(
    ("samples", "rate", "rule", "values"),
    [
        (TONE * 0.001, 16_000, "media.silent", ["0.0%"]),
        (np.clip(TONE * 3, -1, 1), 16_000, "media.clipped", ["%", "1.wav"]),
        (np.tile(TONE, 2), 16_000, "media.cut", ["2.0 s", "1 s"]),
        (TONE[:8000], 8_000, "media.rate", ["8,000", "16,000"]),
    ],
)
def test_unusual_audio_is_reported(
    samples: NDArray[np.float64], rate: int, rule: str, values: list[str]
) -> None:
    report = check(sound(samples, rate), reads=AudioProcessor())
    assert list(report.findings.counts) == [rule]
    assert all(each in messages(report)[rule][0] for each in values)


def test_suggested_command_uses_the_files_sampling_rate() -> None:
    """A network with random weights would waste half of its input at a higher rate."""
    slow = check(sound(TONE, 8_000), sound(TONE[:9000], 11_025), reads=AudioProcessor())
    assert slow.summaries["media"]["highest_rate"] == 11_025
    assert next_steps(slow)[-1][1].endswith(" --set data.sampling_rate=11025")
    some = check(sound(TONE, 8_000), sound(TONE), reads=AudioProcessor())
    assert "sampling_rate" not in next_steps(some)[-1][1]
    made_for_one = object.__new__(FeatureExtractor)
    object.__setattr__(made_for_one, "sampling_rate", 16_000)
    object.__setattr__(made_for_one, "max_seconds", 1.0)
    found = check(sound(TONE[:8000], 8_000), reads=made_for_one)
    assert "highest_rate" not in found.summaries["media"] and not found.findings.counts


def test_rows_of_texts_are_passed_over() -> None:
    from luthier.data.shapes.texts import LabelledText

    report = check(LabelledText("t", 1, "words", "a"))
    assert not report.findings.counts and not report.summaries["media"]["splits"]


def test_captions_are_checked_without_a_tokenizer() -> None:
    known = CheckContext(chat=ChatFormat.reading(ImageProcessor(8, 8)))
    chosen, left = checks_for(known, skip=["learning"])
    assert left["white_space"] == NO_READER
    captions = ["<|im_end|> a red disc", "Call ann.doe@nowhere.de", "a caf\u00c3\u00a9", "As an AI"]
    rows = [
        CaptionedImage("t", n, Media("image", f"{n}.png", array=noise(n)), text)
        for n, text in enumerate(captions, 1)
    ]
    report = inspect_rows({"train": rows}, chosen)
    assert {"privacy.email", "encoding.mojibake", "marker.other_template"} <= {
        *report.findings.counts
    }
    assert not any("ann.doe" in line for found in messages(report).values() for line in found)
    assert not {"privacy", "encoding", "markers", "language", "lengths"} & {*report.left_out}


def test_text_checks_are_omitted_without_text_rows() -> None:
    known = CheckContext(chat=ChatFormat.reading(ImageProcessor(8, 8)))
    chosen, _ = checks_for(known, skip=["learning", "amount", "balance"])
    report = inspect_rows({"train": [image(noise(1))]}, chosen)
    of_texts = {"conversations", "echo", "encoding", "language", "lengths", "markers", "privacy"}
    assert {*report.left_out} == of_texts
    assert not {*report.left_out} & {*report.summaries} and "media" in report.summaries
    assert not report.findings.counts


def test_every_rule_is_met_here() -> None:
    source = Path(__file__).read_text()
    for rule in MediaFiles.rules:
        assert f'"{rule.id}"' in source, rule.id


def test_media_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(1)))
    reads, read = list[Media](), Media.read
    monkeypatch.setattr(Media, "read", lambda media: reads.append(media) or read(media))
    check(LabelledImage("t", 1, Media("image", "a.png", str(path)), "a"))
    assert len([each for each in reads if each.data is None]) == 1


def test_images_of_messages_are_decoded() -> None:
    whole = encoded(noise(1))
    rows = [
        Conversation("t", line, (Message("user", IMAGE_MARK, images=(media,)),))
        for line, media in enumerate(
            (Media("image", "1.png", data=whole), Media("image", "2.png", data=whole[:-400])), 1
        )
    ]
    assert places(check(*rows)) == {"media.unreadable": [("t:2",)]}
