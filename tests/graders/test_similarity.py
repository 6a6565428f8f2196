"""Overlap of words and characters, against plain formulas."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import RowRefused
from luthier.graders import Answer, Similarity
from luthier.graders.similarity import common_subsequence
from luthier.types import Message, Row


def answer(reply: str, expected: str) -> Answer:
    return Answer((Message("user", "?"),), reply, expected, Row("f", 1))


def table(first: Sequence[str], second: Sequence[str]) -> int:
    """The textbook's recurrence."""
    cells = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            cells[i][j] = (
                cells[i - 1][j - 1] + 1 if a == b else max(cells[i - 1][j], cells[i][j - 1])
            )
    return cells[-1][-1]


@given(st.text("abcd", max_size=80), st.text("abcd", max_size=80))
def test_the_longest_common_subsequence(first: str, second: str) -> None:
    assert common_subsequence(first, second) == table(first, second)


@given(st.lists(st.text(max_size=3), max_size=60), st.lists(st.text(max_size=3), max_size=60))
def test_the_longest_common_subsequence_of_words(first: list[str], second: list[str]) -> None:
    assert common_subsequence(first, second) == table(first, second)


def bits(first: str, second: str) -> int:
    """Compute the LCS with a column of the table as an integer (Hyyrö 2004), for long texts."""
    places: dict[str, int] = {}
    for index, item in enumerate(second):
        places[item] = places.get(item, 0) | 1 << index
    full = row = (1 << len(second)) - 1
    for item in first:
        matched = row & places.get(item, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(second) - row.bit_count()


@pytest.mark.parametrize("letters", ["ab", "abcdefgh ", "aé日𝄞\ud800\0 "])
def test_long_texts_are_compared_exactly(letters: str) -> None:
    drawn = random.Random(1)
    for lengths in ((64, 65), (1, 4000), (3000, 5000), (20_000, 20_000)):
        first, second = ("".join(drawn.choices(letters, k=each)) for each in lengths)
        assert common_subsequence(first, second) == bits(first, second)


@pytest.mark.parametrize("measure", ["token_f1", "rouge_l", "characters"])
def test_longer_texts_are_refused(measure: str) -> None:
    grader = Similarity.model_validate({"measure": measure})
    with pytest.raises(RowRefused):
        grader.score(answer("x" * 300_000, "x"))
    with pytest.raises(RowRefused):
        grader.score(answer("x", "x" * 300_000))


@pytest.mark.parametrize(
    ("reply", "expected", "measure", "score"),
    [
        ("The Eiffel tower!", "an eiffel tower", "token_f1", 1.0),
        ("in Paris, France", "Paris", "token_f1", 2 * 1 / (3 + 1)),
        ("tower eiffel", "eiffel tower", "token_f1", 1.0),
        ("tower eiffel", "eiffel tower", "rouge_l", 0.5),
        ("police killed the gunman", "police kill the gunman", "rouge_l", 0.75),
        ("the gunman kill police", "police kill the gunman", "rouge_l", 0.5),
        ("Nguyễn Huệ", "nguyễn huệ", "rouge_l", 1.0),
        ("東京都", "東京", "characters", 4 / 5),
        ("abc", "ABC", "characters", 0.0),
        ("the", "a", "token_f1", 1.0),
        ("the", "cat", "token_f1", 0.0),
        ("", "cat", "rouge_l", 0.0),
        ("", "", "characters", 1.0),
    ],
)
def test_scores(reply: str, expected: str, measure: str, score: float) -> None:
    grader = Similarity.model_validate({"measure": measure})
    assert grader.grade([answer(reply, expected)]) == [pytest.approx(score)]


@pytest.mark.parametrize("measure", ["token_f1", "rouge_l", "characters"])
def test_a_very_long_reply_takes_little_time(measure: str) -> None:
    drawn = random.Random(0)
    reply = "".join(drawn.choice("abcdefgh ") for _ in range(200_000))
    started = time.monotonic()
    score = Similarity.model_validate({"measure": measure}).score(answer(reply, reply[:5_000]))
    assert 0 < score < 1
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("reply", "expected", "score"),
    [  # sacrebleu 2.6, CHRF().sentence_score
        ("the cat sat", "the cat sat on the mat", 0.4959348409966008),
        ("Hello World", "hello world", 0.3753968253968254),
        ("xin chào các bạn", "chào các bạn nhé", 0.7191822066822069),
        ("I owe you 12 €", "I owe you 21 €", 0.6271825396825397),
        ("ab", "abc", 0.6363636363636362),
        ("same text", "same text", 1.0),
        ("a", "b", 0.0),
        ("", "b", 0.0),
        ("", "", 1.0),
    ],
)
def test_chrf_matches_sacrebleu(reply: str, expected: str, score: float) -> None:
    found = Similarity(measure="chrf").score(answer(reply, expected))
    assert found == pytest.approx(score)


@pytest.mark.parametrize(
    ("measure", "reply", "score"),
    [  # common words or pairs, twice, over those of both texts
        ("rouge_1", "the cat sat on a mat", 5 / 6),
        ("rouge_2", "the cat sat on a mat", 3 / 5),
        ("rouge_2", "mat", 0.0),
        ("rouge_1", "", 0.0),
    ],
)
def test_rouge_counts_words_and_pairs_of_words(measure: str, reply: str, score: float) -> None:
    grader = Similarity.model_validate({"measure": measure})
    assert grader.score(answer(reply, "the cat sat on the mat")) == pytest.approx(score)
