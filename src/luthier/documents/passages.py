"""Passages of documents: parts of about :data:`WORDS` words, each below its headings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from luthier.documents.readers import DocumentPage

WORDS = 150
"""Maximum number of words of a passage, for encoders with a context of 256 tokens."""
_HEADING = re.compile(r"(#{1,6})\s+(.*?)(?:\s+#+)?")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|(?<=[。！？])")
_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")
"""Characters of languages without spaces between words."""


@dataclass(frozen=True)
class Passage:
    """A part of a document."""

    text: str
    heading: str
    """Headings from the outermost, joined by `` > ``; empty without headings."""
    page: int | None
    """DocumentPage of its beginning."""

    @property
    def content(self) -> str:
        """The text below its headings, as it is embedded and given to models."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text


def cut(pages: Iterable[DocumentPage]) -> Iterator[Passage]:
    """Yield the passages of a document. A passage ends before a heading; headings continue over
    pages."""
    path: list[tuple[int, str]] = []
    bare: Passage | None = None
    for page in pages:
        parts: list[str] = []
        for block in _blocks(page.text):
            heading = _HEADING.fullmatch(block)
            if heading is None:
                parts.append(block)
                bare = None
                continue
            yield from _pack(parts, path, page.number)
            parts, level = [], len(heading[1])
            if bare is not None and level <= path[-1][0]:
                yield bare
            path = [*((n, text) for n, text in path if n < level), (level, heading[2])]
            # A heading without text, such as "Closed on Monday", is a passage of its own.
            bare = Passage(heading[2], " > ".join(text for _, text in path[:-1]), page.number)
        yield from _pack(parts, path, page.number)
    if bare is not None:
        yield bare


def windows(
    text: str, offsets: Sequence[tuple[int, int]], size: int, overlap: int = 0
) -> Iterator[str]:
    """Yield parts of ``text`` of ``size`` tokens, each ``overlap`` tokens before the end of the
    last part. ``offsets`` has the first and last character (exclusive) of each token."""
    for start in range(0, max(1, len(offsets) - overlap), size - overlap):
        part = offsets[start : start + size]
        yield text[part[0][0] : part[-1][1]] if part else text


def count_words(text: str) -> int:
    """Return the number of words; two characters are a word in languages without spaces."""
    spaced = _WIDE.sub("", text)
    return len(spaced.split()) + (len(text) - len(spaced)) // 2


def _blocks(text: str) -> Iterator[str]:
    """Yield headings, paragraphs and tables."""
    lines: list[str] = []
    in_code = False
    for line in [*text.splitlines(), ""]:
        in_code ^= line.lstrip().startswith("```")
        alone = not in_code and _HEADING.fullmatch(line.strip()) is not None
        if lines and (alone or not line.strip()):
            yield "\n".join(lines)
            lines = []
        if alone:
            yield line.strip()
        elif line.strip():
            lines.append(line.rstrip())


def _pack(parts: Iterable[str], path: list[tuple[int, str]], page: int | None) -> Iterator[Passage]:
    """Yield passages of consecutive parts, each as long as :data:`WORDS` permits."""
    heading = " > ".join(text for _, text in path)
    kept: list[str] = []
    size = 0
    for part in (piece for each in parts for piece in _pieces(each)):
        words = count_words(part)
        if kept and size + words > WORDS:
            yield Passage("\n\n".join(kept), heading, page)
            kept, size = [], 0
        kept.append(part)
        size += words
    if kept:
        yield Passage("\n\n".join(kept), heading, page)


def _pieces(part: str) -> Iterator[str]:
    """Yield pieces of at most :data:`WORDS` words: rows of a table, each piece with the table's
    head, or sentences."""
    if count_words(part) <= WORDS:
        yield part
        return
    lines = part.splitlines()
    table = len(lines) > 2 and lines[0].startswith("|") and set(lines[1]) <= set("|-: ")
    head = "\n".join(lines[:2]) + "\n" if table else ""
    units, between = (lines[2:], "\n") if table else (_SENTENCE.split(part), " ")
    piece: list[str] = []
    size = 0
    for unit in units:
        for short in _words_of(unit):
            words = count_words(short)
            if piece and size + words > WORDS:
                yield head + between.join(piece)
                piece, size = [], 0
            piece.append(short)
            size += words
    if piece:
        yield head + between.join(piece)


def _words_of(unit: str) -> Iterator[str]:
    """Yield ``unit``, in parts if a sentence or a row alone is too long."""
    if count_words(unit) <= WORDS:
        yield unit
        return
    words = unit.split()
    if len(words) > 1:
        for start in range(0, len(words), WORDS):
            yield " ".join(words[start : start + WORDS])
    else:
        for start in range(0, len(unit), 2 * WORDS):
            yield unit[start : start + 2 * WORDS]
