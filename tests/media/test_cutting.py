"""Clips of recordings and lines of pages: outlines, labels, refused files."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import luthier
from luthier.errors import RefusedInput
from luthier.media.cutting import SoundEvent, cut, label_of
from luthier.media.decoding import decode_image

ALTO = """<?xml version="1.0"?>
<alto xmlns="http://www.loc.gov/standards/alto/ns-v4#"><Description>
<sourceImageInformation><fileName>{image}</fileName></sourceImageInformation></Description>
<Layout><Page WIDTH="{width}" HEIGHT="{height}"><PrintSpace><TextBlock>{lines}</TextBlock>
</PrintSpace></Page></Layout></alto>"""
PAGE = """<?xml version="1.0"?>
<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15">
<Page imageFilename="{image}" imageWidth="200" imageHeight="100"><TextRegion>{lines}</TextRegion>
</Page></PcGts>"""


def rows_of(archive: Path) -> list[dict[str, Any]]:
    with zipfile.ZipFile(archive) as opened:
        return [json.loads(line) for line in opened.read("metadata.jsonl").splitlines()]


def pixels_of(archive: Path, name: str) -> np.ndarray[Any, Any]:
    with zipfile.ZipFile(archive) as opened:
        return decode_image(opened.read(name))


def make_page(folder: Path, xml: str, image: str = "page.png") -> Path:
    """Write a grey page of 200 x 100 pixels with a black line from (20, 10) to (120, 30)."""
    folder.mkdir(exist_ok=True)
    page_HW = np.full((100, 200), 220, np.uint8)
    page_HW[10:30, 20:120] = 0
    Image.fromarray(page_HW).save(folder / image)
    (folder / "page.xml").write_text(xml)
    return folder


def cut_all(source: Path, target: Path, seconds: float | None = None) -> Any:
    return cut(source, target, seconds, lambda done: None)


def test_alto_box_in_tenths_of_a_millimetre(tmp_path: Path) -> None:
    line = (
        '<TextLine HPOS="200" VPOS="100" WIDTH="1000" HEIGHT="200"><String CONTENT="hand"/><SP/>'
        '<String CONTENT="writ"/><HYP CONTENT="-"/></TextLine>'
    )
    xml = ALTO.format(image="scans/page.png", width=2000, height=1000, lines=line)
    found = cut_all(make_page(tmp_path / "in", xml), target := tmp_path / "lines.zip")
    assert (found.kind, found.sources, found.rows, found.left_out) == ("lines", 1, 1, 0)
    [row] = rows_of(target)
    assert row["text"] == "hand writ-"
    pixels = pixels_of(target, row["file_name"])
    assert pixels.shape == (20, 100, 3)
    assert pixels.max() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_page_outline_hides_the_neighbours(tmp_path: Path, packed: bool) -> None:
    line = (
        '<TextLine><Coords points="20,10 120,10 20,30"/><Word><TextEquiv><Unicode>no</Unicode>'
        "</TextEquiv></Word><TextEquiv><Unicode>ꝑ wt</Unicode></TextEquiv></TextLine>"
    )
    source = make_page(tmp_path / "in", PAGE.format(image="page.png", lines=line))
    (source / "METS.xml").write_text("<mets/>")
    if packed:
        folder, source = source, tmp_path / "export.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in folder.iterdir():
                archive.write(path, f"pages/{path.name}")
    cut_all(source, target := tmp_path / "lines.zip")
    [row] = rows_of(target)
    assert row["text"] == "ꝑ wt"
    # The lower right half is outside of the triangle.
    whole = np.full((100, 200, 3), 220, np.uint8)
    whole[10:30, 20:120] = 0
    assert (pixels_of(target, row["file_name"])[-1, -1] == np.median(whole[10:30, 20:120])).all()


def test_lines_without_text_are_rows_only_without_transcription(tmp_path: Path) -> None:
    outline = '<Coords points="20,10 120,10 120,30 20,30"/>'
    text = "<TextEquiv><Unicode>a</Unicode></TextEquiv>"
    bare = f"<TextLine>{outline}</TextLine>"
    mixed = PAGE.format(image="page.png", lines=f"<TextLine>{outline}{text}</TextLine>{bare}")
    found = cut_all(make_page(tmp_path / "in", mixed), tmp_path / "mixed.zip")
    assert (found.rows, found.left_out) == (1, 1)
    only = PAGE.format(image="page.png", lines=bare * 2)
    found = cut_all(make_page(tmp_path / "in", only), tmp_path / "bare.zip")
    assert (found.rows, found.left_out) == (2, 0)
    assert "text" not in rows_of(tmp_path / "bare.zip")[0]


@pytest.mark.parametrize(
    ("xml", "word"),
    [
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><alto/>", "DOCTYPE"),
        ("<alto", "XML"),
        (PAGE.format(image="other.png", lines="").replace("page.xml", ""), "lines"),
    ],
)
def test_unreadable_page(tmp_path: Path, xml: str, word: str) -> None:
    with pytest.raises(RefusedInput, match=word):
        cut_all(make_page(tmp_path / "in", xml), tmp_path / "lines.zip")
    assert not (tmp_path / "lines.zip").exists()


def test_image_in_the_folder_above_and_hidden_files(tmp_path: Path) -> None:
    line = '<TextLine><Coords points="20,10 120,10 120,30"/></TextLine>'
    source = make_page(tmp_path / "in", PAGE.format(image="page.png", lines=line))
    (source / "page").mkdir()
    (source / "page.xml").rename(source / "page" / "page.xml")
    (source / "._page.xml").write_bytes(b"no XML")
    assert cut_all(source, tmp_path / "lines.zip").rows == 1


@pytest.mark.parametrize("is_stored", [True, False])
def test_image_with_exif_rotation(tmp_path: Path, is_stored: bool) -> None:
    line = '<TextLine HPOS="20" VPOS="10" WIDTH="100" HEIGHT="20"/>'
    width, height = 200, 100
    if not is_stored:  # orientation 6: the viewer turns the image to the right
        line = '<TextLine HPOS="70" VPOS="20" WIDTH="20" HEIGHT="100"/>'
        width, height = height, width
    xml = ALTO.format(image="page.png", width=width, height=height, lines=line)
    source = make_page(tmp_path / "in", xml)
    with Image.open(source / "page.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(source / "page.png", exif=exif)
    cut_all(source, target := tmp_path / "lines.zip")
    pixels = pixels_of(target, rows_of(target)[0]["file_name"])
    assert pixels.shape == ((20, 100, 3) if is_stored else (100, 20, 3))
    assert pixels.max() == 0


def test_image_with_another_aspect_than_its_outlines(tmp_path: Path) -> None:
    xml = ALTO.format(image="page.png", width=200, height=104, lines="<TextLine/>")
    with pytest.raises(RefusedInput, match=r"page\.xml.*200 x 104.*200 x 100"):
        cut_all(make_page(tmp_path / "in", xml), tmp_path / "lines.zip")


def test_two_xml_files_of_one_image(tmp_path: Path) -> None:
    source = make_page(tmp_path / "in", xml := PAGE.format(image="page.png", lines=""))
    (source / "other.XML").write_text(xml)
    with pytest.raises(RefusedInput, match=r"page\.xml and other\.XML|other\.XML and page\.xml"):
        cut_all(source, tmp_path / "lines.zip")


def test_lines_without_outline_are_counted(tmp_path: Path) -> None:
    lines = '<TextLine/><TextLine><Coords points="20,10 120,10 120,30"/></TextLine>'
    source = make_page(tmp_path / "in", PAGE.format(image="page.png", lines=lines))
    (source / "page.xml").rename(source / "page.XML")
    found = cut_all(source, tmp_path / "lines.zip")
    assert (found.rows, found.left_out) == (1, 1)


@pytest.mark.parametrize("size", ['imageWidth="200px"', 'imageWidth="0"', ""])
def test_page_without_size(tmp_path: Path, size: str) -> None:
    xml = PAGE.format(image="page.png", lines="").replace('imageWidth="200"', size)
    with pytest.raises(RefusedInput, match=r"page\.xml"):
        cut_all(make_page(tmp_path / "in", xml), tmp_path / "lines.zip")


def test_missing_image_of_a_page(tmp_path: Path) -> None:
    source = make_page(tmp_path / "in", PAGE.format(image="1.jpg", lines=""), image="2.png")
    with pytest.raises(RefusedInput, match=r"page.xml.*1\.jpg"):
        cut_all(source, tmp_path / "lines.zip")


@pytest.mark.parametrize(
    ("start", "label"),
    [
        (0, "background"),
        (2.4, None),
        (2.5, "owl"),
        (3, "owl"),
        (3.5, "owl"),
        (3.6, None),
        (6, "tick"),
    ],
)
def test_label_needs_half_of_the_clip_or_event(start: float, label: str | None) -> None:
    events = [SoundEvent(3, 4, "owl"), SoundEvent(6.2, 6.3, "tick")]
    assert label_of(start, start + 1, events) == label
    # A longer part of an event with too small a share hides no whole event.
    assert label_of(0, 1, [SoundEvent(0.6, 10, "rain"), SoundEvent(0.1, 0.4, "owl")]) == "owl"


def write_recording(path: Path, seconds: float, rate: int = 8000) -> Path:
    soundfile = pytest.importorskip("soundfile", reason="needs luthier[audio]")
    path.parent.mkdir(parents=True, exist_ok=True)
    times_T = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, np.stack([np.floor(times_T) / 10, np.zeros_like(times_T)], 1), rate)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("forest.txt", "1,0\t3.0\towl\n\\\t200.0\t900.0\n"),
        (
            "forest.Table.1.selections.txt",
            "Selection\tBegin Time (s)\tEnd Time (s)\tSpecies\n1\t1.0\t3.0\towl\n",
        ),
    ],
)
def test_clips_with_labels(tmp_path: Path, name: str, content: str) -> None:
    recording = write_recording(tmp_path / "in" / "forest.wav", 4.7)
    (recording.parent / name).write_text(content)
    for source in (recording, recording.parent):
        found = luthier.convert(source, tmp_path / "clips.zip", overwrite=True)
        assert (found.kind, found.rows) == ("clips", 5)
        assert found.labels == {"background": 3, "owl": 2}
    rows = rows_of(tmp_path / "clips.zip")
    assert [row["label"] for row in rows] == [
        "background",
        "owl",
        "owl",
        "background",
        "background",
    ]
    assert [row["start_time"] for row in rows] == [0, 1, 2, 3, 4]
    assert (rows[-1]["recording"], rows[-1]["end_time"]) == ("forest.wav", 4.7)
    with (
        zipfile.ZipFile(tmp_path / "clips.zip") as archive,
        archive.open(rows[2]["file_name"]) as clip,
    ):
        import soundfile

        samples, rate = soundfile.read(clip)
    assert rate == 8000
    assert samples.mean() == pytest.approx(0.1, abs=1e-3)  # the mean of two channels


def test_clips_without_labels(tmp_path: Path) -> None:
    source = write_recording(tmp_path / "night.wav", 5)
    found = luthier.convert(source, tmp_path / "clips.zip", seconds=2)
    assert (found.rows, found.labels) == (3, {})
    assert "label" not in rows_of(tmp_path / "clips.zip")[0]


@pytest.mark.parametrize(
    ("content", "place"),
    [(b"0\t1\tch\xeane", r"a\.txt"), (b"0\t1\towl\n0\t1\t \n", r"a\.txt:2")],
)
def test_label_track_with_another_encoding_or_an_empty_label(
    tmp_path: Path, content: bytes, place: str
) -> None:
    recording = write_recording(tmp_path / "a.wav", 1)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(RefusedInput, match=place):
        luthier.convert(recording, tmp_path / "clips.zip")


def test_label_track_of_a_recording_with_a_longer_name(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "a.wav", 1)
    (tmp_path / "a.night.txt").write_text("0\t1\towl\n")
    assert luthier.convert(recording, tmp_path / "clips.zip").labels == {}


def test_recordings_without_labels_next_to_labelled_recordings(tmp_path: Path) -> None:
    source = write_recording(tmp_path / "in" / "a.wav", 2).parent
    write_recording(source / "b.wav", 2)
    (source / "b.txt").write_text("")  # Audacity exports no labels: all of b is background
    found = luthier.convert(source, tmp_path / "clips.zip")
    assert (found.sources, found.rows, found.unlabelled) == (1, 2, 1)
    assert {row["recording"] for row in rows_of(tmp_path / "clips.zip")} == {"b.wav"}


def test_progress_within_a_recording(tmp_path: Path) -> None:
    done: list[int] = []
    cut(write_recording(tmp_path / "a.wav", 4), tmp_path / "clips.zip", None, done.append)
    assert done == [25, 50, 75, 100]


@pytest.mark.parametrize("source", ["s3://bucket/night.wav", "*.wav"])
def test_address_and_pattern_as_source(tmp_path: Path, source: str) -> None:
    with pytest.raises(RefusedInput, match=re.escape(source)):
        luthier.convert(source, tmp_path / "clips.zip")


def test_refused_recordings(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "a.wav", 1)
    target = tmp_path / "clips.zip"
    for options, word in (({"seconds": 0}, "seconds"), ({"to": "chat"}, "zip")):
        with pytest.raises(RefusedInput, match=word):
            luthier.convert(recording, target, **options)
    (tmp_path / "a.txt").write_text("one\ttwo\n")
    with pytest.raises(RefusedInput, match=r"a\.txt:1"):
        luthier.convert(recording, target)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.flac").write_bytes(b"no audio")
    with pytest.raises(RefusedInput, match=r"x\.flac"):
        luthier.convert(tmp_path / "b", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedInput, match="no recordings"):
        luthier.convert(tmp_path / "empty", target)
    assert not target.exists()
