"""Plain text with annotations: lines of fastText, and words with tags in the columns of CoNLL.

:data:`LINE_FORMS` is the table. To add a form, write a test of the first lines and a reader, and
add both to the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from luthier.data.files.parsing import Record
from luthier.errors import Location, RowRefused

Lines = Iterable[tuple[int, str]]
"""Lines of a file with their numbers, from 1."""

_LABEL = re.compile(r"__label__(\S+)\s*")
TAG = re.compile(r"O|[BIESLU]-\S+")
_DOCUMENT = "-DOCSTART-"
MOST_WRONG = 0.2
"""Maximum share of lines without a tag in a CoNLL file: reading names these lines."""


@dataclass(frozen=True, slots=True)
class LineForm:
    """A form of plain text with annotations."""

    matches: Callable[[Sequence[str]], bool]
    """Test of the first non-blank lines."""
    read: Callable[[Lines], Iterator[tuple[int, Record]]]


def _is_fasttext(lines: Sequence[str]) -> bool:
    return all(line.startswith("__label__") for line in lines)


def _read_fasttext(lines: Lines) -> Iterator[tuple[int, Record]]:
    """Yield a text with the labels at the start of its line."""
    for number, line in lines:
        labels, at = list[str](), 0
        while found := _LABEL.match(line, at):
            labels.append(found[1])
            at = found.end()
        if line.strip():
            label: Record = {"label": labels[0] if len(labels) == 1 else labels} if labels else {}
            yield number, {"text": line[at:], **label}


def _is_conll(lines: Sequence[str]) -> bool:
    """Return whether nearly all lines have as many columns and end with a tag in BIO, and some line
    with the tag of an entity."""
    rows = [line.split() for line in lines if line.strip() and not _is_comment(line)]
    rows = [row for row in rows if row[0] != _DOCUMENT]
    ((usual, _),) = Counter(map(len, rows)).most_common(1) or ((0, 0),)
    tags = [row[-1] for row in rows if len(row) == usual and TAG.fullmatch(row[-1])]
    right = len(tags) >= (1 - MOST_WRONG) * len(rows)
    return usual > 1 and right and any(tag != "O" for tag in tags)


def _is_comment(line: str) -> bool:
    return line.startswith("#") and not TAG.fullmatch(line.split()[-1])


def _read_conll(lines: Lines) -> Iterator[tuple[int, Record]]:
    """Yield the words and tags between blank lines: the first and the last column."""
    tokens, tags, first = list[str](), list[str](), 0
    for number, line in lines:
        cells = line.split()
        if cells and cells[0] != _DOCUMENT and not _is_comment(line):
            first = first or number
            tokens.append(cells[0])
            tags.append(cells[-1] if len(cells) > 1 else "")
        elif tokens and not cells:
            yield first, _tagged_record(tokens, tags, first)
            tokens, tags, first = [], [], 0
    if tokens:
        yield first, _tagged_record(tokens, tags, first)


def _tagged_record(tokens: list[str], tags: list[str], line: int) -> Record:
    if len(tokens) > 1 and tokens == [str(number) for number in range(1, len(tokens) + 1)]:
        raise RowRefused(
            "tags.type",
            "The first column numbers the words.",
            "Keep the words and one column of tags: cut -f 2,3 OLD > NEW.",
            Location(line=line),
        )
    return {"tokens": tokens, "tags": tags}


LINE_FORMS: Mapping[str, LineForm] = {
    "fasttext": LineForm(_is_fasttext, _read_fasttext),
    "conll": LineForm(_is_conll, _read_conll),
}
"""Forms of annotated lines by name."""
