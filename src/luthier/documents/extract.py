"""Conversion of one document into pages of Markdown, in a process of its own.

The process reads a path per line from standard input and writes a JSON object per line: ``pages``
and ``note``, or ``error``, after a space for each scanned page. Files come from users, and the
libraries that read them have no limits of memory and time: the process limits its memory, the caller
limits its time (:mod:`luthier.documents.readers`).

Tesseract, if installed, reads the pages of a PDF file without a text layer. PP-OCR (``rapidocr``) was
tried, too: its recognizer lacks the Vietnamese letters with tone marks.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MEMORY_BYTES = 4 << 30
"""Largest address space of the process."""
UNPACKED_BYTES = 1 << 30
"""Largest unpacked size of a compressed document."""
BOMB_BYTES, BOMB_RATIO = 100 << 20, 100
"""Unpacked size of a bomb, in total and per packed byte: the XML of documents shrinks to a tenth."""
HEADING_RATIO = 1.15
"""Smallest height of a heading of a PDF file, relative to the height of most characters."""
HEADING_CHARACTERS = 120
SMALL_RUNNING_LINES = 3
"""Further lines at both ends of a page that may be headers and footers, smaller than the text."""
PARAGRAPH_GAP = 1.7
"""Distance of two lines that begins a paragraph, relative to the height of a line."""
SCAN_RESOLUTION = 300
"""Resolution of a scanned page for Tesseract, in dots per inch, as its documentation recommends."""
SCAN_SECONDS = 60.0
"""Time limit of a scanned page."""
_ADDRESS = r"(?:[^()\s]|\([^()\s]*\))*"
_LINK = re.compile(rf"!?\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\({_ADDRESS}(?:\s\"[^\"]*\")?\)")
_SLIDE = re.compile(r"<!-- Slide number: (\d+) -->")
"""Comment of markitdown before each slide."""
_FOOTNOTE = re.compile(r"\[\w{1,3}\]")
"""Text of a link to a footnote, which would look like a citation."""


class RefusedDocument(Exception):
    """A document that cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Line:
    """A line of a page of a PDF file."""

    text: str
    height: float
    """Median height of the characters, in half points."""
    top: float
    """Distance from the bottom of the page, in points."""


def extract(path: Path) -> dict[str, Any]:
    """Return ``pages``, a list of ``[number, Markdown]``, and ``note`` about what was left out.

    Numbers of pages are ``None`` for formats without pages.

    Raises:
        RefusedDocument: for a protected, damaged or too large file.
    """
    ending = path.suffix.lower()
    if ending == ".pdf":
        return _read_pdf(path)
    if ending not in (".html", ".htm"):  # a ZIP archive, as every other format
        _check_unpacked(path)
    text = _read_with_markitdown(path, ending)
    # Parts alternate: text, number, text. Before the first slide is no text.
    parts = _SLIDE.split(text) if ending == ".pptx" else []
    slides = [[int(number), slide] for number, slide in zip(parts[1::2], parts[2::2], strict=True)]
    return {"pages": slides or [[None, text]], "note": ""}


def _check_unpacked(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(each.file_size for each in archive.infolist())
            packed = sum(each.compress_size for each in archive.infolist())
    except zipfile.BadZipFile:
        # Office files with a password are no ZIP archives.
        raise RefusedDocument("damaged, or protected by a password") from None
    if size > UNPACKED_BYTES:
        raise RefusedDocument(f"unpacked size of {size:,} bytes; the limit is {UNPACKED_BYTES:,}")
    if size > max(BOMB_BYTES, BOMB_RATIO * packed):
        raise RefusedDocument(f"{packed:,} bytes unpack to {size:,}, as in a zip bomb")


def _read_with_markitdown(path: Path, ending: str) -> str:
    from markitdown import MarkItDown, StreamInfo

    converter = MarkItDown(enable_plugins=False)
    content = io.BytesIO(path.read_bytes())
    found = converter.convert_stream(content, stream_info=StreamInfo(extension=ending))
    # Addresses of links and base64 text of images are noise for search.
    text = str(found.text_content)
    for _ in range(2):  # an image inside a link
        text = _LINK.sub(lambda link: "" if _FOOTNOTE.fullmatch(link[1]) else link[1], text)
    return re.sub(r"\\([\\`*_{}\[\]()#+.!>|-])", r"\1", text)


def _read_pdf(path: Path) -> dict[str, Any]:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        reason = "protected by a password" if locked else "damaged, or not a PDF file"
        raise RefusedDocument(reason) from None
    pages = [[*_lines(page)] for page in document]
    scanned = {n: _recognize(document[n - 1]) for n, lines in enumerate(pages, 1) if not lines}
    pages = _without_running_lines(pages)
    # Printers of browsers write two lines above and two below, smaller than the text.
    for _ in range(SMALL_RUNNING_LINES):
        pages = _without_running_lines(pages, _body_height(pages))
    body = _body_height(pages)
    found = {line.height for lines in pages for line in lines}
    larger = sorted({h for h in found if h >= HEADING_RATIO * body}, reverse=True)
    texts = [_page_text(lines, body, larger) for lines in pages]
    texts = [scanned.get(n, text) for n, text in enumerate(texts, 1)]
    note = ""
    if empty := [n for n, text in scanned.items() if not text]:
        named = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        reason = "text" if _tesseract() else "a text layer (tesseract reads them if installed)"
        note = f"pages without {reason}, left out: {named}"
    return {"pages": [[n, text] for n, text in enumerate(texts, 1) if text], "note": note}


@cache
def _tesseract() -> list[str]:
    """Return the command that reads an image in all installed languages; empty without Tesseract or
    languages."""
    if (program := shutil.which("tesseract")) is None:
        return []
    listed = subprocess.run([program, "--list-langs"], capture_output=True, text=True)
    codes = {*listed.stdout.split("\n")[1:]} - {"", "osd", "equ"}
    return [program, "stdin", "stdout", "-l", "+".join(sorted(codes))] if codes else []


def _recognize(page: Any) -> str:
    """Return the text of a scanned page; empty without Tesseract, or after :data:`SCAN_SECONDS`."""
    if not (command := _tesseract()):
        return ""
    print(end=" ", file=sys.__stdout__, flush=True)  # starts the caller's time limit again
    image = io.BytesIO()
    page.render(scale=SCAN_RESOLUTION / 72, grayscale=True).to_pil().save(image, "PNG")
    # Its threads cost more than they save on one page.
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    try:
        read = subprocess.run(
            command, input=image.getvalue(), capture_output=True, env=environment,
            timeout=SCAN_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return ""
    paragraphs = re.split(r"\n\s*\n", read.stdout.decode("utf-8", "replace"))
    joined = (" ".join(re.sub(r"-\n(?=\w)", "", each).split()) for each in paragraphs)
    return "\n\n".join(each for each in joined if each)


def _lines(page: Any) -> Iterator[Line]:
    """Yield the lines of a page of a PDF file, in the order of its text."""
    import pypdfium2.raw as pdfium

    text = page.get_textpage()
    characters: list[str] = []
    boxes: list[tuple[float, float]] = []

    def finish() -> Iterator[Line]:
        content = re.sub(r"\s+", " ", "".join(characters)).strip()
        if content:
            heights = sorted(high - low for low, high in boxes) or [0.0]
            tops = sorted(high for _, high in boxes) or [0.0]
            yield Line(content, round(2 * heights[len(heights) // 2]) / 2, tops[len(tops) // 2])
        characters.clear()
        boxes.clear()

    for n in range(text.count_chars()):
        character = chr(pdfium.FPDFText_GetUnicode(text.raw, n))
        if character in "\r\n":
            yield from finish()
        elif character in "\x02\ufffe":  # a hyphen at the end of a line
            characters.append("\u00ad")
        elif character != "\x00":
            characters.append(character)
            if not character.isspace():
                _, low, _, high = text.get_charbox(n, loose=True)
                boxes.append((low, high))
    yield from finish()


def _body_height(pages: list[list[Line]]) -> float:
    """Return the height of most characters."""
    heights = Counter[float]()
    for line in (line for lines in pages for line in lines):
        heights[line.height] += len(line.text)
    return heights.most_common(1)[0][0] if heights else 0.0


def _without_running_lines(
    pages: list[list[Line]], below: float = float("inf")
) -> list[list[Line]]:
    """Remove headers and footers: first and last lines with equal text and height on most pages.

    The number of the page may differ. Lines of the height ``below`` or larger stay.
    """

    def keys(number: int, line: Line) -> set[tuple[str, float, float]]:
        """Return the line as it is, and with each number relative to the number of the page."""
        relative = (
            f"{line.text[: each.start()]}{int(each[0]) - number:+}{line.text[each.end() :]}"
            for each in re.finditer(r"(?<!\d)\d{1,4}(?!\d)", line.text)
        )
        return {(text, line.height, round(line.top, -1)) for text in (line.text, *relative)}

    repeated = Counter[tuple[str, float, float]]()
    for number, lines in enumerate(pages):
        for line in {*lines[:1], *lines[-1:]}:
            if line.height < below:
                repeated.update(keys(number, line))
    running = {each for each, count in repeated.items() if 2 * count > max(3, len(pages))}
    kept = []
    for number, lines in enumerate(pages):
        ends = (0, len(lines) - 1)
        body = [
            line
            for place, line in enumerate(lines)
            if place not in ends or not keys(number, line) & running
        ]
        kept.append(body or lines)
    return kept


def _page_text(lines: list[Line], body: float, larger: list[float]) -> str:
    """Return the Markdown of a page: lines larger than ``body`` are headings."""
    parts: list[str] = []
    before: Line | None = None
    for line in lines:
        heading = line.height in larger and len(line.text) <= HEADING_CHARACTERS
        heading = heading and any(map(str.isalpha, line.text))
        gap = 0.0 if before is None else before.top - line.top
        joins = before is not None and before.height == line.height
        joins = joins and -PARAGRAPH_GAP * body < gap < PARAGRAPH_GAP * max(line.height, 1.0)
        if joins and parts:
            parts[-1] += " " + line.text
        elif heading:
            parts.append("#" * min(3, larger.index(line.height) + 1) + " " + line.text)
        else:
            parts.append(line.text)
        before = line
    return re.sub(r"\u00ad\s*", "", "\n\n".join(parts))


def _answer(path: str) -> dict[str, Any]:
    try:
        return extract(Path(path))
    except RefusedDocument as refused:
        return {"error": str(refused)}
    except MemoryError:
        return {"error": f"needs more than {MEMORY_BYTES >> 30} GB of memory"}
    except ImportError as missing:
        return {"missing": str(missing)}
    except Exception as error:  # the libraries raise anything for a damaged file
        reason = " ".join(str(error).split())[:200]
        return {"error": f"damaged ({type(error).__name__}: {reason})"}


def main() -> None:
    """Answer the paths of standard input until it ends."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
