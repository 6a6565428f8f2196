"""Character and word error rates, against a count by hand."""

from __future__ import annotations

import pytest

from luthier.data.inputs import Media
from luthier.data.shapes.media import CaptionedImage
from luthier.evaluation.significance import values
from luthier.evaluation.transcription import (
    character_errors,
    transcription_remarks,
    transcription_scores,
    word_errors,
)


def edits(one: str | list[str], other: str | list[str]) -> int:
    """Return the Levenshtein distance by definition."""
    if not one or not other:
        return len(one) + len(other)
    same = one[0] == other[0]
    least = min(edits(one[1:], other), edits(one, other[1:]), edits(one[1:], other[1:]) - same)
    return least + 1


PAIRS = [("Đây la", "Đây là"), ("", "ab"), ("x y z", "x z"), ("same", "same"), ("ab cd", "abc d")]


def test_errors_are_summed_before_they_are_divided() -> None:
    characters = sum(edits(*pair) for pair in PAIRS) / sum(len(wanted) for _, wanted in PAIRS)
    words = sum(edits(one.split(), other.split()) for one, other in PAIRS)
    scores = values(transcription_scores(PAIRS))
    assert scores["cer"] == pytest.approx(characters)
    assert scores["wer"] == pytest.approx(words / sum(len(other.split()) for _, other in PAIRS))
    assert scores["exact"] == 1 / 5
    assert [*scores] == ["cer", "wer", "exact"]


def test_error_rates_may_be_above_100_percent() -> None:
    assert character_errors([("abcd", "a")]).value == 3.0
    assert word_errors([("a b c", "a")]).value == 2.0


def test_the_worst_rows_are_named() -> None:
    media = Media("image", "i", data=b"")
    rows = [
        CaptionedImage("f.jsonl", n, media, text) for n, text in ((1, "ab"), (2, "abcd"), (3, "x"))
    ]
    answers = [{"text": "ab"}, {"text": "abce"}, {"text": "yz"}]
    assert transcription_remarks(rows, answers) == [
        "f.jsonl:3: 'yz' for 'x' (CER 200%)",
        "f.jsonl:2: 'abce' for 'abcd' (CER 25%)",
    ]
