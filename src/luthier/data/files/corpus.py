"""Raw text for pre-training, read with constant memory.

Files are read in pieces of about 64 KiB, once per pass: to check and count, for the tokenizer, for
the tokens. A document is a row of a JSONL file, or a plain-text file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.data.files.read import last_cut
from luthier.data.files.sources import files_of
from luthier.data.rows import stream_rows
from luthier.data.shapes.texts import RawText
from luthier.errors import BoundedProblems, Problem

PIECE = 1 << 16
"""Most characters in a piece of text, if white space allows a cut."""
ENOUGH_DOCUMENTS = 20
"""Fewest held-out documents. With fewer, the end of the text is held out instead."""


@dataclass(frozen=True, slots=True)
class CorpusPiece:
    """A part of a document, in the order of the files."""

    text: str
    document: int
    """0-based number of the document."""
    start: int
    """Number of characters before the piece, over all files."""
    ends: bool
    """True for the last piece of a document."""


@dataclass(frozen=True)
class Survey:
    """Counts of one pass over all files."""

    documents: int
    characters: int


def pieces(paths: Sequence[Path]) -> Iterator[CorpusPiece]:
    """Yield all text of ``paths``; :class:`~luthier.errors.DataError` for a file without text."""
    problems = BoundedProblems()
    document = start = 0
    for path in (file for source in paths for file in files_of(source)):
        for row, ends in stream_rows(path, problems):
            if not isinstance(row, RawText):
                message = "The row has more than a text; pre-training uses raw text only."
                fix = 'Rewrite the row as {"text"}.'
                problems.append(Problem("row.objective", message, fix, row.location))
                continue
            for part, last in _parts(row.text):
                yield CorpusPiece(part, document, start, ends and last)
                start += len(part)
            document += ends
    problems.refuse()


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of ``text`` that can be tokenized separately, each with an is-last flag."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = last_cut(text[begin : begin + PIECE])
        if not cut:
            break
        yield text[begin : begin + cut], False
        begin += cut
    yield text[begin:], True


def survey(paths: Sequence[Path]) -> Survey:
    """Check and count everything; :class:`~luthier.errors.DataError` names each problem."""
    documents = characters = 0
    for piece in pieces(paths):
        documents += piece.ends
        characters += len(piece.text)
    return Survey(documents, characters)


def sample(paths: Sequence[Path], size: int, characters: int) -> Iterator[str]:
    """Yield evenly spaced pieces with about ``size`` of the ``characters`` in total."""
    stride = max(1, -(-characters // size))
    for number, piece in enumerate(pieces(paths)):
        if number % stride == 0:
            yield piece.text


@dataclass(frozen=True)
class HeldOut:
    """Choice of the held-out text.

    Whole documents, drawn by seed and number alone, or the end of the text if documents are few.
    """

    share: float
    seed: int
    survey: Survey

    def parts(self, text: Iterable[CorpusPiece]) -> Iterator[tuple[CorpusPiece, bool]]:
        """Yield each piece with a held-out flag."""
        drawn = self.share * self.survey.documents >= ENOUGH_DOCUMENTS
        edge = int((1 - self.share) * self.survey.characters)
        for piece in text:
            cut = last_cut(piece.text[: max(0, edge - piece.start)])
            if drawn:
                number = zlib.crc32(b"%d %d" % (self.seed, piece.document))
                yield piece, number < self.share * 2**32
            elif self.share and cut and piece.start + len(piece.text) > edge:
                yield replace(piece, text=piece.text[:cut], ends=False), False
                yield replace(piece, text=piece.text[cut:], start=piece.start + cut), True
            else:
                yield piece, bool(self.share) and piece.start >= edge
