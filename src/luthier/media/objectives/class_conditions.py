"""Conditions of image generation: classes of labeled rows, or words of captions.

A network identifies a class or word by position in ``Head.labels``, so the list is fixed before
training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from luthier.data.shapes.media import CaptionedImage, LabelledImage
from luthier.errors import RowRefused
from luthier.types import IntArray, Row

FEWEST_ROWS = 2
"""Minimum number of rows with a word: a word in one row only identifies that row."""
MOST_WORDS = 4096
"""Maximum number of known words, by frequency."""


def classes_of(rows: Sequence[Row], method: str) -> tuple[str, ...]:
    """Return the classes of ``rows``, sorted; empty if a row has no label, or all rows have one
    label.

    Raises:
        RowRefused: for rows with several labels, which ``method`` does not support.
    """
    names = {row.label for row in rows if isinstance(row, LabelledImage)}
    if any(isinstance(name, tuple) for name in names):
        raise RowRefused(
            "label.mixed",
            f"rows have several labels, and {method} supports one label per row.",
            "Use one label, or omit all labels.",
        )
    whole = all(isinstance(row, LabelledImage) for row in rows) and len(names) > 1
    return tuple(sorted(str(name) for name in names)) if whole else ()


def class_target(row: Row, labels: Sequence[str]) -> IntArray:
    """Return the position ``[1]`` of the row's class.

    Raises:
        RowRefused: for a row without one of ``labels``.
    """
    if not isinstance(row, LabelledImage) or row.label not in labels:
        raise RowRefused(
            "label.unseen",
            "the label of the row is missing in the training rows.",
            "Correct the label, or remove the row.",
        )
    return np.array([labels.index(str(row.label))])


def caption_words(text: str) -> list[str]:
    """Return the distinct words of a caption, in lower case."""
    return [*dict.fromkeys(re.findall(r"\w+", text.lower()))]


def words_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the words of the captions that are frequent enough to learn, sorted."""
    counts = Counter(
        word
        for row in rows
        if isinstance(row, CaptionedImage)
        for word in caption_words(row.caption)
    )
    common = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(sorted(w for w in common[:MOST_WORDS] if counts[w] >= FEWEST_ROWS))


def words_target(text: str, words: Sequence[str]) -> IntArray:
    """Return the positions ``[K]`` of the known words of a caption."""
    positions = {word: place for place, word in enumerate(words)}
    return np.array([positions[w] for w in caption_words(text) if w in positions], dtype=np.int64)
