"""One spelling for words that are spelled in several ways."""

from __future__ import annotations

import unicodedata

import pytest

from luthier.data.spelling import unify_spelling


@pytest.mark.parametrize(
    ("first", "second"),
    [("hòa", "hoà"), ("Khỏe", "Khoẻ"), ("thủy", "thuỷ"), ("HỎA", "HOẢ"), ("lọa", "loạ")],
)
def test_tone_marks_of_open_syllables_are_unified(first: str, second: str) -> None:
    assert unify_spelling(f"{first} bình") == unify_spelling(f"{second} bình") == f"{second} bình"
    decomposed = unicodedata.normalize("NFD", first)
    assert unify_spelling(decomposed) == second


@pytest.mark.parametrize(
    "text", ["hoàn toàn", "quý", "ma", "mà", "má", "của", "khóc", "tìa", "Zoe", "suy"]
)
def test_other_words_keep_spelling(text: str) -> None:
    assert unify_spelling(text) == text
