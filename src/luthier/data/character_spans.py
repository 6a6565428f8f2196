"""Entities by characters, as annotation tools write them: a text becomes words with BIO tags.

A span is an array ``[start, end, kind]`` (spaCy, doccano) or an object with ``start`` and ``end``, or
``start_offset`` and ``end_offset``, and ``label`` or ``labels`` (Prodigy, doccano, Label Studio).
Positions count characters from 0; the end is exclusive. White space at the edges of a span is left
out, and a space in the name of a kind becomes ``_``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import regex

from luthier.data.files.parsing import Record, quote
from luthier.errors import RowRefused

WORD_OR_MARK = regex.compile(
    r"(?:\p{L}\.){2,}|[\p{P}--[@#]]+|[^\s\p{P}--[@#]]+(?:\p{P}+[^\s\p{P}]+)*", regex.V1
)
"""Initials such as ``U.S.``, punctuation, and words with punctuation inside, such as ``don't``."""
_EDGES = (("start", "end"), ("start_offset", "end_offset"))


class Span(NamedTuple):
    """An entity of a text, from ``start`` to ``end`` (exclusive)."""

    start: int
    end: int
    kind: str


def are_spans(value: object) -> bool:
    """Return whether a value is an array of spans; also of none."""
    return isinstance(value, list) and all(map(_is_span, value))


def tag_words(text: object, spans: Sequence[object]) -> Record:
    """Return the words and BIO tags of a text.

    Raises:
        RowRefused: for spans outside of the text, or with common characters.
    """
    if not isinstance(text, str) or not text.strip():
        fix = "Write the text, or remove the row."
        raise RowRefused("field.empty", '"text" is no text, or empty.', fix)
    found = sorted({_read_span(each, text) for each in spans})
    for one, other in pairwise(found):
        if other.start < one.end:
            names = " and ".join(f"{quote(text[s.start : s.end])} ({s.kind})" for s in (one, other))
            raise RowRefused("tags.overlap", f"{names} overlap.", "Keep one of the two entities.")
    words, tags = [], []
    starts = [span.start for span in found]
    for start, end in _cut_words(text, sorted({edge for span in found for edge in span[:2]})):
        words.append(text[start:end])
        span = found[place] if (place := bisect_right(starts, start) - 1) >= 0 else Span(0, 0, "")
        edge = "B" if span.start == start else "I"
        tags.append(f"{edge}-{span.kind}" if start < span.end else "O")
    return {"tokens": words, "tags": tags}


def label_studio_spans(record: Record) -> tuple[str, Sequence[object]]:
    """Return text and spans of a task of Label Studio, by its first annotation.

    Raises:
        RowRefused: for a task without a text or an annotation.
    """
    texts = {key: each for key, each in record["data"].items() if isinstance(each, str)}
    text = texts.get("text") or (next(iter(texts.values())) if len(texts) == 1 else "")
    done = [each for each in record["annotations"] if not each.get("was_cancelled")]
    if not text or not done:
        message = f"The task has no {'annotation' if text else 'text'}."
        raise RowRefused("field.missing", message, "Remove the task from the file.")
    values = [each.get("value") for each in done[0]["result"]]
    return text, [value for value in values if _is_span(value)]


def is_label_studio(record: Record) -> bool:
    """Return whether a record is a task of Label Studio."""
    data, annotations = record["data"], record["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        return False
    return all(
        isinstance(each, dict) and isinstance(each.get("result"), list) for each in annotations
    )


def _cut_words(text: str, edges: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each word; a word with an edge of a span inside is cut there."""
    for match in WORD_OR_MARK.finditer(text):
        start, end = match.span()
        yield from pairwise([start, *(edge for edge in edges if start < edge < end), end])


def _is_span(value: object) -> bool:
    if isinstance(value, dict):
        has_edges = any(isinstance(value.get(start), int) for start, _ in _EDGES)
        return has_edges and bool({"label", "labels"} & value.keys())
    return isinstance(value, list) and [*map(type, value)] == [int, int, str]


def _read_span(value: Any, text: str) -> Span:
    if isinstance(value, Mapping):
        keys = next(keys for keys in _EDGES if keys[0] in value)
        kind = value.get("label") or value.get("labels")
        start, end, kind = value[keys[0]], value.get(keys[1]), _only(kind)
    else:
        start, end, kind = value
    if not isinstance(end, int) or not 0 <= start < end <= len(text) or text[start:end].isspace():
        message = (
            f"The entity {quote(str(kind))} from {start} to {end} is outside of the text, or empty."
        )
        fix = f"Count characters from 0 to {len(text)}; the end is exclusive."
        raise RowRefused("tags.span", message, fix)
    if isinstance(value, Mapping) and value.get("text", text[start:end]) != text[start:end]:
        message = f"Characters {start} to {end} are {quote(text[start:end])}, not "
        message += f"{quote(str(value['text']))}."
        fix = "Count a character above U+FFFF, such as an emoji, once."
        raise RowRefused("tags.span", message, fix)
    while text[start].isspace():
        start += 1
    while text[end - 1].isspace():
        end -= 1
    return Span(start, end, "_".join(str(kind).split()))


def _only(kind: object) -> object:
    return kind[0] if isinstance(kind, list) and kind else kind
