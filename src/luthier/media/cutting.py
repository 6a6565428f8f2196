"""Rows from larger media: clips of long recordings, and lines of photographed pages.

A zip archive receives the clips or lines and a ``metadata.jsonl`` with a row for each. Labels of
recordings are label tracks of Audacity or selection tables of Raven; the outlines of lines are ALTO
(https://www.loc.gov/standards/alto/) or PAGE (https://github.com/PRImA-Research-Lab/PAGE-XML).
"""

from __future__ import annotations

import glob
import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from luthier.data.files.sources import is_clutter
from luthier.data.inputs import media_kind, reason_of
from luthier.errors import RefusedInput, RowRefused
from luthier.files import json_lines, names_below, new_file
from luthier.media.decoding import Pixels, decode_image

CLIP_SECONDS = 1.0
"""Default length of a clip: the networks take one second."""
BACKGROUND = "background"
"""Label of a clip without an event in a recording with labels."""
SHARE = 0.5
"""Smallest share of a clip, or of a shorter event, that the label needs."""
MOST_STRETCH = 0.02
"""Largest relative difference between the aspects of an image and of its outlines."""
_BEGIN, _END = "Begin Time (s)", "End Time (s)"
_LABELS = ("Annotation", "Species", "Label", "Common Name")
"""Possible label columns of a selection table of Raven."""
_TRACK = re.compile(r"\.([^/]*selection[^/]*\.)?txt")
"""Rest of the name of a label track or selection table, after the name of the recording."""

File = Path | zipfile.Path
Row = dict[str, Any]
Piece = tuple[float, tuple[str, bytes, Row] | None]
"""Finished share of the recording or page, then name in the archive, encoded clip or line, and the
other keys of the row; ``None`` for a part that is left out."""


@dataclass(frozen=True)
class Cut:
    """Clips or lines that were written."""

    kind: str
    """``clips`` or ``lines``."""
    sources: int
    """Number of recordings or pages."""
    rows: int
    labels: Mapping[str, int]
    """Number of clips by label."""
    left_out: int
    """Number of clips with too small a part of an event, or of lines without a transcription next
    to lines with one."""
    unlabelled: int
    """Number of recordings left out: without labels, next to recordings with labels."""
    seconds: float
    """Length of a clip."""


@dataclass(frozen=True)
class SoundEvent:
    """A labelled part of a recording, in seconds from the start."""

    start: float
    end: float
    label: str


PageLine = tuple[NDArray[np.float64], str]
"""Points of the outline ``[N, 2]``, in the unit of the page's size, and the text."""


@dataclass(frozen=True)
class Page:
    """The outlines of an ALTO or PAGE file."""

    name: str
    """Name of the file."""
    size: tuple[float, float]
    """Width and height. The unit of ALTO may be a tenth of a millimetre."""
    lines: list[PageLine]


def cut(
    source: str | Path, target: Path, seconds: float | None, advance: Callable[[int], None]
) -> Cut:
    """Write the clips or lines of the recordings or pages of ``source`` to the archive ``target``.

    Args:
        source: a recording, or a folder or zip archive with recordings, or with images of pages and
            an XML file for each.
        target: the new zip archive.
        seconds: length of a clip; default :data:`CLIP_SECONDS`.
        advance: receives the finished percentage.

    Raises:
        RefusedInput: for a source without recordings and pages, or with an unreadable file.
    """
    if not Path(source).exists():
        raise RefusedInput(
            f"{source} is no local file or folder. Download objects of S3, and name a folder or .zip "
            "in place of a pattern"
        )
    files = _files_of(Path(source))
    recordings = [name for name in files if media_kind(name) == "audio"]
    pages = _pages_of(files)
    if pages and recordings:
        raise RefusedInput(
            f"{source} has recordings and pages. Convert each in a command of its own"
        )
    if not pages and not recordings:
        raise RefusedInput(
            f"{source} has no recordings, and no ALTO or PAGE XML with outlines of lines. Export the "
            "outlines from eScriptorium or Transkribus; for print: `tesseract page.jpg page alto`"
        )
    if pages and seconds is not None:
        raise RefusedInput("`seconds` is for recordings. Lines of pages have outlines")
    if seconds is not None and not seconds > 0:
        raise RefusedInput(f"`seconds` is {seconds:g}. Name a number above 0")
    has_text = any(text for page in pages.values() for _, text in page.lines)
    events = {name: _events_of(name, files) for name in recordings}
    labelled = [name for name in recordings if events[name] is not None]
    sources = [*pages, *(labelled or recordings)]
    rows, left_out = list[Row](), 0
    with new_file(target) as stream, zipfile.ZipFile(stream, "w") as archive:
        for index, name in enumerate(sources):
            if pages:
                pieces = _cut_lines(name, files[name], pages[name], has_text)
            else:
                pieces = _cut_clips(name, files[name], events[name], seconds or CLIP_SECONDS)
            for share, piece in pieces:
                advance(int(100 * (index + share) / len(sources)))
                if piece is None:
                    left_out += 1
                    continue
                archive.writestr(piece[0], piece[1])
                rows.append({"file_name": piece[0], **piece[2]})
        if not rows:
            raise RefusedInput(f"{source} has no {'lines' if pages else 'labelled clips'}")
        archive.writestr("metadata.jsonl", json_lines(rows))
    counts = Counter(row["label"] for row in rows if "label" in row)
    kind = "lines" if pages else "clips"
    unlabelled = len(recordings) - len(labelled) if labelled else 0
    return Cut(
        kind, len(sources), len(rows), dict(counts.most_common()), left_out, unlabelled,
        seconds or CLIP_SECONDS,
    )  # fmt: skip


def _files_of(source: Path) -> dict[str, File]:
    """Return the files of a folder or zip archive, or one file, by relative name."""
    if source.is_dir():
        return {name: source / name for name in names_below(source) if not is_clutter(name)}
    if not zipfile.is_zipfile(source):
        tracks = sorted(source.parent.glob(f"{glob.escape(source.stem)}.*txt"))
        return {path.name: path for path in (source, *tracks)}
    archive = zipfile.ZipFile(source)
    names = [name for name in archive.namelist() if not name.endswith("/")]
    return {name: zipfile.Path(archive, name) for name in sorted(names) if not is_clutter(name)}


def _cut_clips(
    name: str, file: File, events: list[SoundEvent] | None, seconds: float
) -> Iterator[Piece]:
    """Yield the clips of a recording, ``None`` for a clip with too small a part of an event.

    The recording is decoded in blocks, so memory does not grow with its length. A rest below half
    of a clip is left out.
    """
    try:
        import soundfile
    except ImportError:
        message = "clips of recordings need soundfile: pip install 'luthier[audio]'"
        raise RefusedInput(message) from None
    try:
        with file.open("rb") as stream, soundfile.SoundFile(stream) as recording:
            rate, length = recording.samplerate, round(seconds * recording.samplerate)
            for index, samples_TC in enumerate(
                recording.blocks(max(1, length), dtype="float32", always_2d=True)
            ):
                if index and len(samples_TC) < SHARE * length:
                    return
                start, end = index * length / rate, (index * length + len(samples_TC)) / rate
                share = min(1, (index + 1) * length / max(1, recording.frames))
                label = None if events is None else label_of(start, end, events)
                if events is not None and label is None:
                    yield share, None
                    continue
                row: Row = {
                    "recording": name,
                    "start_time": round(start, 3),
                    "end_time": round(end, 3),
                }
                clip = io.BytesIO()
                soundfile.write(clip, samples_TC.mean(1), rate, format="FLAC")
                place = f"{name}/{start:010.3f}.flac"
                row = row if label is None else {**row, "label": label}
                yield share, (place, clip.getvalue(), row)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise RefusedInput(f"{name} cannot be decoded: {reason_of(error)}") from error


def label_of(start: float, end: float, events: Iterable[SoundEvent]) -> str | None:
    """Return the label of a clip, ``None`` for a clip with too small a part of an event.

    An event counts with at least :data:`SHARE` of the clip, or of a shorter event.
    """
    parts = [(min(end, each.end) - max(start, each.start), each) for each in events]
    parts = [
        (part, each) for part, each in parts if part > 0 or start <= each.start == each.end < end
    ]
    if not parts:
        return BACKGROUND
    enough = [
        (part, event)
        for part, event in parts
        if part >= SHARE * min(end - start, event.end - event.start)
    ]
    return max(enough, key=lambda each: each[0])[1].label if enough else None


def _events_of(name: str, files: Mapping[str, File]) -> list[SoundEvent] | None:
    """Return the labels of a recording, ``None`` without a label track or selection table.

    Audacity exports ``forest.txt``, Raven ``forest.Table.1.selections.txt``.
    """
    stem = name[: name.rindex(".")]
    tables = [each for each in files if each.startswith(stem) and _TRACK.fullmatch(each, len(stem))]
    if not tables:
        return None
    return [event for each in tables for event in _parse_events(each, files[each])]


def _parse_events(name: str, file: File) -> Iterator[SoundEvent]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RefusedInput(f"{name} is not UTF-8 text. Save the file as UTF-8") from None
    columns = [0, 1, 2]
    if lines and _BEGIN in (heads := lines[0].split("\t")):
        label = next((each for each in _LABELS if each in heads), None)
        if label is None or _END not in heads:
            raise RefusedInput(f"{name}:1: the labels need a column {' or '.join(_LABELS)}")
        columns = [heads.index(each) for each in (_BEGIN, _END, label)]
    for number, line in enumerate(lines, 1):
        # Audacity writes the frequencies of a label into a line that begins with a backslash.
        if not line.strip() or line.startswith("\\") or _BEGIN in line:
            continue
        cells = line.split("\t")
        try:
            start, end = (float(cells[column].replace(",", ".")) for column in columns[:2])
            label = cells[columns[2]].strip()
        except (ValueError, IndexError):
            raise RefusedInput(
                f"{name}:{number}: {line[:60]!r} is not start, end and label, separated by tabs"
            ) from None
        if not label:
            raise RefusedInput(
                f"{name}:{number}: the label is empty. Write one, or remove the line"
            )
        yield SoundEvent(start, end, label)


def _pages_of(files: Mapping[str, File]) -> dict[str, Page]:
    """Return the ALTO or PAGE file of each image."""
    pages = dict[str, Page]()
    for name, file in files.items():
        if not name.lower().endswith(".xml"):
            continue
        content = file.read_bytes()
        # A document type declares entities, which can grow without bound. The formats have none.
        if b"<!DOCTYPE" in content:
            raise RefusedInput(f"{name}: a document type is not supported. Remove <!DOCTYPE …>")
        try:
            root = ElementTree.fromstring(content)  # noqa: S314 - no entities
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise RefusedInput(f"{name}: the XML cannot be read: {reason_of(error)}") from error
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]  # each version has a namespace
        page = next(root.iter("Page"), None)
        if page is None:  # such as the METS file of an export
            continue
        is_alto = root.tag == "alto"
        named = page.get("imageFilename") or root.findtext(".//fileName") or ""
        keys = ("WIDTH", "HEIGHT") if is_alto else ("imageWidth", "imageHeight")
        try:
            lines = [
                _alto_line(each) if is_alto else _page_line(each) for each in page.iter("TextLine")
            ]
            width, height = (float(page.get(key) or 0) for key in keys)
        except ValueError as error:
            raise RefusedInput(f"{name}: {error}. Write sizes and outlines as numbers") from None
        if not (width > 0 and height > 0):
            raise RefusedInput(f"{name}: <Page> needs {' and '.join(keys)} above 0. Add the size")
        image = _image_of(name, named, files)
        if image in pages:
            raise RefusedInput(
                f"{name} and {pages[image].name} have outlines of {image}. Remove one of the files"
            )
        pages[image] = Page(name, (width, height), lines)
    return pages


def _image_of(name: str, named: str, files: Mapping[str, File]) -> str:
    """Return the image of the page ``name``: ``named``, or an image with the page's name.

    Transkribus writes the XML into a folder ``page`` or ``alto`` next to the images.
    """
    folder = name.rpartition("/")[0]
    places = [f"{each}/{PureWindowsPath(named).name}".lstrip("/")
              for each in (folder, folder.rpartition("/")[0])]  # fmt: skip
    wanted = next((each for each in places if each in files), places[0])
    stem = name[: name.rindex(".") + 1]
    images = [each for each in files if media_kind(each) == "image"]
    found = [each for each in images if each == wanted or each.startswith(stem)]
    if not found:
        raise RefusedInput(
            f"{name}: there is no image {wanted or stem}. Put it next to the XML file"
        )
    return wanted if wanted in found else found[0]


def _alto_line(line: ElementTree.Element) -> tuple[NDArray[np.float64], str]:
    strings = [each.get("CONTENT", "") for each in line.iter("String")]
    hyphen = "".join(each.get("CONTENT", "") for each in line.iter("HYP"))
    shape = line.find("Shape/Polygon")
    if shape is not None:
        points = _points(shape.get("POINTS", ""))
    else:
        left, top, width, height = (
            float(line.get(key) or 0) for key in ("HPOS", "VPOS", "WIDTH", "HEIGHT")
        )
        points = np.array([(left, top), (left + width, top + height)])
    return points, (" ".join(strings) + hyphen).strip()


def _page_line(line: ElementTree.Element) -> tuple[NDArray[np.float64], str]:
    outline = line.find("Coords")
    points = _points("" if outline is None else outline.get("points", ""))
    return points, (line.findtext("TextEquiv/Unicode") or "").strip()


def _points(text: str) -> NDArray[np.float64]:
    """Parse ``x,y x,y`` of PAGE, or ``x y x y`` of ALTO."""
    numbers = re.findall(r"-?[\d.]+", text)
    return np.array(numbers[: len(numbers) // 2 * 2], np.float64).reshape(-1, 2)


def _cut_lines(name: str, file: File, page: Page, has_text: bool) -> Iterator[Piece]:
    """Yield the lines of a page, ``None`` for a line without text if lines have text."""
    page_HW3 = _decode_page(name, file.read_bytes(), page)
    for number, (outline, text) in enumerate(page.lines, 1):
        pixels_HW3 = _crop(page_HW3, outline / page.size)
        if not pixels_HW3.size or (has_text and not text):
            yield number / len(page.lines), None
            continue
        image = io.BytesIO()
        Image.fromarray(pixels_HW3).save(image, "png")
        row: Row = {"page": name, "line": number}
        row = {"text": text, **row} if has_text else row
        yield number / len(page.lines), (f"{name}/{number:04}.png", image.getvalue(), row)


def _decode_page(name: str, data: bytes, page: Page) -> Pixels:
    """Return the pixels that the outlines refer to: programs often ignore the rotation in EXIF."""
    for upright in (False, True):
        try:
            page_HW3 = decode_image(data, upright=upright)
        except RowRefused as error:
            raise RefusedInput(f"{name}: {error}") from error
        height, width = page_HW3.shape[:2]
        if abs(width / height * page.size[1] / page.size[0] - 1) <= MOST_STRETCH:
            return page_HW3
    raise RefusedInput(
        f"{page.name}: the page is {page.size[0]:g} x {page.size[1]:g}, but {name} has {width} x "
        f"{height} pixels. Put the image of the outlines there, or export both again"
    )


def _crop(page_HW3: Pixels, outline: NDArray[np.float64]) -> Pixels:
    """Return the box around an outline. Pixels outside of it get the median colour, the paper's."""
    height, width = page_HW3.shape[:2]
    if len(outline) < 2:
        return page_HW3[:0]
    points = np.clip(outline * (width, height), 0, (width, height))
    left, top = np.floor(points.min(0)).astype(int)
    right, bottom = np.ceil(points.max(0)).astype(int)
    box_HW3 = page_HW3[top:bottom, left:right].copy()
    if len(points) > 2 and box_HW3.size:
        mask = Image.new("1", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([*map(tuple, points - (left, top))], fill=1)
        box_HW3[~np.asarray(mask)] = np.median(box_HW3, (0, 1)).astype(np.uint8)
    return box_HW3
