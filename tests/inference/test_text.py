"""Shown text: whole characters, without stop sequences, for any split into pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data.conversations.reasoning import ReasoningFormat, ReasoningMarks
from luthier.data.conversations.tokenization import BROKEN
from luthier.inference.inference import Score
from luthier.inference.text import AnswerText, Detokenizer, StopFinder
from luthier.models.decoding.sampling import Sampling


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters=BROKEN), max_size=40))
def test_characters_of_several_tokens_come_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = Detokenizer(lambda part: str(tokenizer.decode(part, skip_special_tokens=True)))
    pieces = [shown.feed(token) for token in ids]
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_shown(tokenizer: Any) -> None:
    ids = tokenizer.encode("a日", add_special_tokens=False)
    shown = Detokenizer(lambda part: str(tokenizer.decode(part)))
    assert "".join(shown.feed(token) for token in ids[:-1]) == "a"


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300)
@given(st.lists(st.text("ab\n", max_size=3), max_size=12), STOPS)
@example(["b", "a", "a"], ["a", "baa"])
@example(["baa"], ["a", "baa"])
@example(["ab", "b"], ["b", "ab"])
def test_text_ends_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    """Each split gives the result of single characters."""
    whole = "".join(pieces)
    ends = (
        [end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(stops))]
        if stops
        else []
    )
    first = max((s for s in stops if whole[: ends[0]].endswith(s)), key=len) if ends else None
    expected = whole[: ends[0] - len(first)] if first is not None else whole
    finder = StopFinder(stops)
    shown = ""
    for piece in pieces:
        shown += finder.feed(piece)
        assert expected.startswith(shown)
        if finder.stop:
            break
    shown += finder.end()
    assert shown == expected
    assert finder.passed == len(expected)
    assert finder.stop == first


def test_stop_finder_withholds_only_possible_stops() -> None:
    finder = StopFinder(["</end>"])
    assert finder.feed("one </e") == "one "
    assert finder.feed("lse") == "</else"


@pytest.mark.parametrize(
    ("stop", "tokens", "text"), [("cd", 2, "ab"), ("d", 2, "abc"), ("zz", 3, "abcdef")]
)
def test_tokens_count_if_start_is_in_visible_text(stop: str, tokens: int, text: str) -> None:
    words = ["ab", "cd", "ef"]
    answer = AnswerText(lambda ids: "".join(words[i] for i in ids), Sampling(stop=(stop,)))
    shown, scores = "", []
    for token, word in enumerate(words):
        delta = answer.feed(token, Score(word.encode(), -1.0))
        more, found = delta.text, delta.scores
        shown, scores = shown + more, scores + found
        if answer.stop:
            break
    delta = answer.end()
    more, found = delta.text, delta.scores
    assert shown + more == text
    expected = 1 if stop == "cd" else tokens
    assert answer.tokens == expected
    assert [score.text.decode() for score in scores + found] == words[:expected]


def test_token_across_reasoning_end_counts_as_text() -> None:
    words = ["<thi", "nk>hm", "\n</", "think>\nab", "c", "d"]
    way = ReasoningFormat(ReasoningMarks("<think>", "</think>"), is_open=False)
    answer = AnswerText(lambda ids: "".join(words[i] for i in ids), Sampling(stop=("d",)), way)
    deltas = [answer.feed(n, Score(word.encode(), -1.0)) for n, word in enumerate(words)]
    deltas.append(answer.end())
    assert "".join(delta.reasoning for delta in deltas) == "hm"
    assert "".join(delta.text for delta in deltas) == "abc"
    assert (answer.tokens, answer.reasoning_tokens, answer.stop) == (5, 3, "d")
    before = [score.text.decode() for delta in deltas for score in delta.reasoning_scores]
    behind = [score.text.decode() for delta in deltas for score in delta.scores]
    assert (before, behind) == (words[:3], words[3:5])
