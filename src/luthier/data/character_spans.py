"""Entities by characters, the notation of annotation tools: a text becomes words with BIO tags.

A span is an array ``[start, end, kind]`` (spaCy, doccano) or an object with ``start`` and ``end``, or
``start_offset`` and ``end_offset``, and ``label`` or ``labels`` (Prodigy, doccano, Label Studio).
Positions count characters from 0; the end is exclusive. White space at the edges of a span is left
out, and a space in the name of a kind becomes ``_``. A word with only a part in a span belongs to the
entity, because predictions have whole words.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import regex

from luthier.data.files.parsing import Record, quote
from luthier.errors import RowRefused

CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"
"""Scripts without spaces between words."""
WORD_OR_MARK = regex.compile(
    rf"[{CJK}]|(?:\p{{L}}\.){{2,}}|[\p{{P}}--[@#]]+|"
    rf"[^\s\p{{P}}{CJK}--[@#]]+(?:\p{{P}}+[^\s\p{{P}}{CJK}]+)*",
    regex.V1,
)
"""Initials such as ``U.S.``, punctuation, and words with punctuation inside, such as ``don't``.
Chinese and Japanese, without spaces, are split into characters."""
_EDGES = (("start", "end"), ("start_offset", "end_offset"))
Spans = Sequence[object]


class EntitySpan(NamedTuple):
    """An entity of a text, from ``start`` to ``end`` (exclusive)."""

    start: int
    end: int
    kind: str


class Tagged(NamedTuple):
    """Words and BIO tags of a text."""

    tokens: list[str]
    tags: list[str]
    entities: int
    """Number of entities."""
    cut: list[str]
    """Texts of the entities with an edge inside a word."""


def are_spans(value: object) -> bool:
    """Return whether a value is an array of spans; also of none."""
    return isinstance(value, list) and all(map(_is_span, value))


def tag_words(text: object, spans: Spans) -> Tagged:
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
    places = [match.span() for match in WORD_OR_MARK.finditer(text)]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    tags, cut = ["O"] * len(places), []
    for span in found:
        first, last = bisect_right(ends, span.start), bisect_left(starts, span.end) - 1
        free = [word for word in range(first, last + 1) if tags[word] == "O"]
        for word in free:
            tags[word] = f"{'B' if word == free[0] else 'I'}-{span.kind}"
        if starts[first] < span.start or ends[last] > span.end:
            cut.append(text[span.start : span.end])
    return Tagged([text[start:end] for start, end in places], tags, len(found), cut)


def label_studio_text(record: Record, spans: Spans = ()) -> str:
    """Return the text of a task of Label Studio: the one with the texts of ``spans``, ``text``, or
    else the longest.

    Raises:
        RowRefused: for a task without a text.
    """
    data: Any = record["data"]
    texts = {key: each for key, each in data.items() if isinstance(each, str) and each.strip()}
    named: list[Any] = [each for each in spans if isinstance(each, dict) and "text" in each]
    for text in texts.values():
        if named and all(text[each["start"] : each["end"]] == each["text"] for each in named):
            return text
    if not texts:
        raise RowRefused("field.missing", "The task has no text.", "Remove the task from the file.")
    return texts.get("text") or max(texts.values(), key=len)


def label_studio_spans(record: Record) -> tuple[str, Spans]:
    """Return text and spans of a task of Label Studio.

    Raises:
        RowRefused: for a task without a text or an annotation, or with different annotations.
    """
    annotations: Any = record["annotations"]
    done = [each for each in annotations if not each.get("was_cancelled")]
    done = [each for each in done if each.get("ground_truth")] or done
    sides = [_spans_of_results(one["result"]) for one in done]
    if not sides:
        fix = "Remove the task from the file."
        raise RowRefused("field.missing", "The task has no annotation.", fix)
    text = label_studio_text(record, sides[0])
    first, *others = ({_read_span(each, text) for each in side} for side in sides)
    if any(other != first for other in others):
        message = f"The {len(sides)} annotations of the task differ."
        raise RowRefused("tags.annotators", message, "Mark one as ground truth, or keep one.")
    return text, sides[0]


def is_label_studio(record: Record) -> bool:
    """Return whether a record is a task of Label Studio."""
    data, annotations = record["data"], record["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        return False
    return all(
        isinstance(each, dict) and isinstance(each.get("result"), list) for each in annotations
    )


def _spans_of_results(results: Sequence[object]) -> list[object]:
    """Return the spans among the results of an annotation, which may also be choices or relations.

    Raises:
        RowRefused: for a region outside of plain text, or without a label.
    """
    values = [each.get("value") for each in results if isinstance(each, dict)]
    for value in values:
        is_region = isinstance(value, dict) and (
            "start" in value or any(key.endswith("labels") for key in value)
        )
        if is_region and not _is_span(value):
            message = "A region of the task has no start, end and label in plain text."
            raise RowRefused("field.list", message, "Label it as text, or remove the task.")
    return [value for value in values if _is_span(value)]


def _is_span(value: object) -> bool:
    return _parse_span(value) is not None


def _parse_span(value: Any) -> tuple[int, int, list[str]] | None:
    """Return start, end and kinds of a span; ``None`` for any other value."""
    if isinstance(value, Mapping):
        edges = next((keys for keys in _EDGES if keys[0] in value), _EDGES[0])
        start, end = (value.get(key) for key in edges)
        kind = value.get("label", value.get("labels"))
    elif isinstance(value, list) and len(value) == 3:
        start, end, kind = value
    else:
        return None
    kinds = kind if isinstance(kind, list) else [kind]
    named = [str(each) for each in kinds if isinstance(each, str | int) and str(each).strip()]
    if type(start) is not int or type(end) is not int or not named or len(named) != len(kinds):
        return None
    return start, end, named


def _read_span(value: object, text: str) -> EntitySpan:
    parsed = _parse_span(value)
    assert parsed is not None  # the form has checked the values
    start, end, kinds = parsed
    if len(kinds) != 1:
        message = f"The entity from {start} to {end} has {len(kinds)} kinds."
        raise RowRefused("tags.overlap", message, "Keep one.")
    if not 0 <= start < end <= len(text) or text[start:end].isspace():
        message = f"The entity {quote(kinds[0])} from {start} to {end} is outside of the text, "
        fix = f"Count characters from 0 to {len(text)}; the end is exclusive."
        raise RowRefused("tags.span", f"{message}or empty.", fix)
    if isinstance(value, Mapping) and value.get("text", text[start:end]) != text[start:end]:
        message = f"Characters {start} to {end} are {quote(text[start:end])}, not "
        message += f"{quote(str(value['text']))}."
        fix = "Count a character above U+FFFF, such as an emoji, once."
        raise RowRefused("tags.span", message, fix)
    while text[start].isspace():
        start += 1
    while text[end - 1].isspace():
        end -= 1
    return EntitySpan(start, end, "_".join(kinds[0].split()))
