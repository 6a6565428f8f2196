"""Guesses from earlier text, and pauses after failures."""

from __future__ import annotations

from luthier.models.decoding.speculation import NGRAMS, PATIENCE, PromptLookup, Speculation


def test_lookup_guesses_earlier_continuation() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 2, 3])
    assert lookup.guess(3) == [4, 5, 9]
    assert lookup.guess(1) == [4]
    lookup.append(4)
    assert lookup.guess(2) == [5, 9]
    lookup.append(7)
    assert lookup.guess(2) == []


def test_longest_then_latest_match_is_guessed() -> None:
    assert NGRAMS == (3, 2)
    assert PromptLookup([1, 2, 3, 10, 8, 2, 3, 20, 1, 2, 3]).guess(1) == [10]
    assert PromptLookup([1, 2, 3, 10, 1, 2, 3, 20, 1, 2, 3]).guess(1) == [20]


def test_lookup_has_no_guess_from_prompt_end() -> None:
    assert PromptLookup([1, 2]).guess(4) == []
    assert PromptLookup([]).guess(4) == []
    assert PromptLookup([7, 7, 7]).guess(0) == []
    assert PromptLookup([7, 7, 7]).guess(4) == [7]


def test_copy_of_lookup_is_independent() -> None:
    lookup = PromptLookup([1, 2, 3, 1, 2])
    other = lookup.copy()
    other.append(9)
    assert lookup.guess(1) == [3]
    assert other.guess(1) == []


def test_failed_guesses_pause_longer_each_time() -> None:
    lookup = PromptLookup([1, 2, 3] * 4)
    pauses = []
    for _ in range(2):
        for _ in range(PATIENCE):
            lookup.learn(0)
        waited = 0
        while not lookup.guess(1):
            lookup.append([1, 2, 3][waited % 3])
            waited += 1
        pauses.append(waited)
    assert 0 < pauses[0] < pauses[1]
    lookup.learn(1)
    lookup.learn(0)
    assert lookup.guess(1)


def test_counts_of_several_sequences_are_added() -> None:
    assert Speculation(9, 5) + Speculation(1, 1) == Speculation(10, 6)
