"""What makes rows the same: keys of 64 bits for what a row asks and for what it teaches.

Among 10 million rows, the chance that two different ones share a key is 3 in a million. Rows that ask
nearly the same, or have one partner, are groups that a split must keep on one side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes.media import BareWindow
from luthier.data.shapes.preferences import JudgedAnswers, JudgedReply
from luthier.data.shapes.texts import History, TaggedWords, TextPair
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
    """64 bits that stand for ``texts`` in this order."""
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    data = b"".join(each for part in parts for each in (len(part).to_bytes(8, "little"), part))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def key_column(values: Iterable[int], count: int) -> Keys:
    """``[count]`` keys as a column."""
    return np.fromiter(values, np.uint64, count)


def combine_keys(first_N: Keys, second_N: Keys) -> Keys:
    """One key of two."""
    return (first_N * np.uint64(0x9E3779B97F4A7C15)) ^ (second_N + np.uint64(0x165667B19E3779F9))


def question_of(row: Row) -> str:
    """What a model is given, without the system's turns, which are often the same in all rows."""
    inputs = row.inputs()
    if isinstance(row, TaggedWords):
        return " ".join(inputs)
    if row.turns():
        inputs = tuple(text for text in inputs if not text.startswith("system: ")) or inputs
    return "\n".join(inputs)


def repeated_rows(rows: Sequence[Row]) -> list[int]:
    """Numbers of the rows that ask and say word for word what an earlier one does.

    A row without text repeats none.
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
    """Numbers of the ``rows`` that ask what a row of ``train`` asks, each with the first one's place.

    ``train`` is read once, up to the last match; a row without text asks nothing.
    """
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if question := normalize(question_of(row)):
            numbers.setdefault(question, []).append(number)
    found = dict[int, str]()
    if numbers:
        for row in train:
            for number in numbers.pop(normalize(question_of(row)), ()):
                found[number] = f"{row.file}:{row.line}"
            if not numbers:
                break
    return dict(sorted(found.items()))


STRETCH = 50
"""Lines of a time series that stay together: windows next to each other have nearly all in common."""


def partner_of(row: Row) -> str:
    """What a row has in common with all that must stay on its side of a split, beside its question."""
    # Histories that lead to one item are many people's, and not one that is asked twice.
    if isinstance(row, TextPair) and not isinstance(row, History):
        return normalize(row.positive)
    return f"{row.file}:{row.line // STRETCH}" if isinstance(row, BareWindow) else ""


def mask_numbers(text: str) -> str:
    """``text`` with a zero for each of its numbers."""
    return _NUMBER.sub("0", text)


def comparable_texts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Of each row what is asked, and all of it that is text.

    Of a text with its partner that is the text: many have one partner, a paragraph for instance, which
    would make them alike.
    """
    inputs = [normalize(question_of(row)) for row in rows]
    wholes = []
    for row, text in zip(rows, inputs, strict=True):
        answer = () if row.annotated or isinstance(row, TextPair) else row.targets()
        wholes.append(f"{text}\n{normalize(' '.join(answer))}" if answer else text)
    return inputs, wholes


def target_key(row: Row) -> int:
    """Key of what tells rows apart however alike their texts are; 0 for what is only written.

    That is a label, tags, a rating or the words of a partner; of judged answers, the judgement and the
    answer preferred, as rows that prefer each other's rejected answer have the same texts.
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
"""Share of the rows beyond which a group is one of a template, and its rows are not kept together."""


class RelatedRows:
    """Collects rows, in order; texts are not kept."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._near, self._table = NearDuplicates(limit), ColumnStore(limit)
        self._common: Words | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Take in the next rows; the first ones show what all are written in."""
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
        """``[N]`` number of the first row of each row's group.

        Where more than half of all rows would be one group, as of a template, only rows that ask the
        same stay together, and not even those where half of all do: they could not be split otherwise.
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
    """``[N]`` groups of rows that were read already; see :meth:`RelatedRows.groups`.

    Rows with one of ``values`` stay together whatever else they are. Related rows of different values
    do too, unless more than half of all rows would then be one group.
    """
    kin = RelatedRows()
    kin.add(rows)
    related_N = kin.groups()
    if values is None:
        return related_N
    named_N = first_rows(np.array(values))
    groups = Groups(len(rows))
    groups.join(np.arange(len(rows)), named_N)
    groups.join(np.arange(len(rows)), related_N)
    largest = np.bincount(groups.roots_N).max(initial=0)
    return groups.roots_N if largest <= LARGEST * len(rows) else named_N
