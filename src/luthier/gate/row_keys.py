"""64-bit keys of the inputs and targets of rows, and groups of related rows.

Among 10 million rows, two different rows share a key with a probability of 3 in a million. Rows
with similar inputs or a common partner form groups that a split must not separate.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes.media import BareWindow
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.shapes.preferences import JudgedAnswers, JudgedReply
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import History, QueryDocument, TaggedWords, TextPair
from luthier.errors import location_text
from luthier.gate.columns import MEMORY_LIMIT, ColumnStore
from luthier.gate.near_duplicates import (
    Groups,
    NearDuplicates,
    Words,
    common_shingles,
    first_rows,
    normalize,
    sketch,
)
from luthier.types import IntArray, Row

Keys = NDArray[np.uint64]

_NUMBER, _WORD = re.compile(r"\d+"), re.compile(r"\w+")


def hash_texts(*texts: str) -> int:
    """Return a 64-bit hash of the sequence ``texts``."""
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    data = b"".join(each for part in parts for each in (len(part).to_bytes(8, "little"), part))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def key_column(values: Iterable[int], count: int) -> Keys:
    """``[count]`` keys as a column."""
    return np.fromiter(values, np.uint64, count)


def combine_keys(first_N: Keys, second_N: Keys) -> Keys:
    """Combine two keys per row into one key."""
    return (first_N * np.uint64(0x9E3779B97F4A7C15)) ^ (second_N + np.uint64(0x165667B19E3779F9))


def question_of(row: Row) -> str:
    """Return the model input without system turns, which are often equal in all rows.

    For a short history, return a key of its place: several people chose the same few items.
    """
    if isinstance(row, History) and len(row.items) < OWN_HISTORY:
        return f"{hash_texts(row.file, str(row.line)):x}"
    inputs = row.inputs()
    if isinstance(row, TaggedWords):
        return " ".join(inputs)
    if row.turns():
        inputs = tuple(text for text in inputs if not text.startswith("system: ")) or inputs
    return "\n".join(inputs)


def repeated_rows(rows: Sequence[Row]) -> list[int]:
    """Return the indices of rows whose input and target repeat an earlier row verbatim.

    A row without text is never a repetition.
    """
    known = set[tuple[str, str | None, int]]()
    found = []
    for number, row in enumerate(rows):
        key = question_of(row), row.expected_reply(), target_key(row)
        if key[0] and key in known:
            found.append(number)
        known.add(key)
    return found


def match_questions(rows: Sequence[Row], train: Iterable[Row]) -> dict[int, str]:
    """Find ``rows`` whose input occurs in ``train``.

    Args:
        train: iterated once, up to the last match.

    Returns:
        Index of each row with a match, and the place of the first match. Rows without text never
            match.
    """
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if question := normalize(question_of(row)):
            numbers.setdefault(question, []).append(number)
    found = dict[int, str]()
    if numbers:
        for row in train:
            for number in numbers.pop(normalize(question_of(row)), ()):
                found[number] = location_text(row.file, row.line)
            if not numbers:
                break
    return dict(sorted(found.items()))


OWN_HISTORY = 6
"""Minimum number of items of a history that two people hardly share."""
STRETCH = 50
"""Number of consecutive lines of a time series that a split keeps together. Adjacent windows
overlap."""


def partner_of(row: Row) -> str:
    """Return a key, in addition to the input, that related rows share; empty without such a key."""
    # Histories that lead to one item are many people's, and not one that is asked twice.
    if isinstance(row, TextPair) and not isinstance(row, History):
        return normalize(row.positive)
    if isinstance(row, QueryDocument):
        return normalize(row.text)
    if isinstance(row, AnsweredQuestion):
        return normalize(row.context)
    if isinstance(row, CitedAnswer):
        return normalize("\n".join(row.passages[n - 1] for n in row.cited))
    return f"{row.file}:{row.line // STRETCH}" if isinstance(row, BareWindow) else ""


def mask_numbers(text: str) -> str:
    """Replace each number in ``text`` with 0."""
    return _NUMBER.sub("0", text)


def comparable_texts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the input and the whole text of each row, normalized.

    For a text pair, the whole text is the input: many texts share a partner, such as a paragraph,
    and would all look similar. For the same reason, a question has no context here: see
    :func:`context_key`.
    """
    inputs = [
        normalize(
            row.question if isinstance(row, AnsweredQuestion | CitedAnswer) else question_of(row)
        )
        for row in rows
    ]
    wholes = []
    for row, text in zip(rows, inputs, strict=True):
        answer = () if row.annotated or isinstance(row, TextPair) else row.targets()
        wholes.append(f"{text}\n{normalize(' '.join(answer))}" if answer else text)
    return inputs, wholes


def context_key(row: Row) -> int:
    """Return a key of the context of a question; 0 for other rows.

    Questions are similar only within one context.
    """
    if isinstance(row, CitedAnswer):
        return hash_texts(*map(normalize, row.passages))
    return hash_texts(normalize(row.context)) if isinstance(row, AnsweredQuestion) else 0


def target_key(row: Row) -> int:
    """Return a key of the target that separates rows with similar texts; 0 for generated text.

    The target is a label, tags, a rating or the words of a partner. For judged answers, the target
    is the judgement and the preferred answer: rows with swapped preferences have equal texts.
    """
    if row.annotated:
        return hash_texts(*row.targets())
    if isinstance(row, TextPair):
        return hash_texts(*_WORD.findall(normalize(row.positive)))
    if isinstance(row, JudgedReply):
        return hash_texts(*row.judgement())
    if isinstance(row, JudgedAnswers):
        return hash_texts(*map(normalize, row.judgement()))
    return 0


BATCH = 1024
LARGEST = 0.5
"""Maximum share of rows in a group. A larger group stems from a template and is not kept together."""


class RelatedRows:
    """Collects rows in order, without texts, and groups related rows."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._near, self._table = NearDuplicates(limit), ColumnStore(limit)
        self._common: Words | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Add the next rows. The first batch determines the common shingles."""
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            texts = [normalize(question_of(row)) for row in batch]
            if self._common is None:
                self._common = common_shingles(texts)
            self._table.append("asked", key_column(map(hash_texts, texts), len(texts)))
            partners = [partner_of(row) or text for row, text in zip(batch, texts, strict=True)]
            self._table.append("partner", key_column(map(hash_texts, partners), len(partners)))
            self._near.add(sketch(texts, self._common))

    def groups(self) -> IntArray:
        """Return ``[N]`` index of the first row of each row's group.

        If a group has more than half of all rows (a template), only rows with equal input stay
        together. If half of all rows have equal input, no rows stay together, because a split would
        be impossible.
        """
        if not self._near.rows:
            return np.zeros(0, np.int64)
        asked_N = self._table.read("asked")
        groups = Groups(self._near.rows)
        same_N = first_rows(asked_N)
        groups.join(np.arange(len(same_N)), same_N)
        groups.join_equal(self._table.read("partner"))
        self._near.find(asked_N, lambda one, other: ~groups.together(one, other), groups.join)
        found_N = groups.roots_N
        for finer_N in (same_N, np.arange(len(same_N))):
            crowded = np.bincount(found_N) > LARGEST * len(same_N)
            found_N = np.where(crowded[found_N], finer_N, found_N)
        return found_N


def group_related(rows: Sequence[Row], values: Sequence[str] | None = None) -> IntArray:
    """Return ``[N]`` groups of rows in memory; see :meth:`RelatedRows.groups`.

    Rows with equal ``values`` always stay together. Related rows of different values stay together,
    unless a group would have more than half of all rows.
    """
    related = RelatedRows()
    related.add(rows)
    related_N = related.groups()
    if values is None:
        return related_N
    named_N = first_rows(np.array(values))
    groups = Groups(len(rows))
    groups.join(np.arange(len(rows)), named_N)
    groups.join(np.arange(len(rows)), related_N)
    largest = np.bincount(groups.roots_N).max(initial=0)
    return groups.roots_N if largest <= LARGEST * len(rows) else named_N
