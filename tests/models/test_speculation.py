"""Guesses come from what stood before, and pause where they fail."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from luthier.models.speculation import (
    LONGEST_DRAFT,
    LONGEST_RETRY,
    NGRAMS,
    PATIENCE,
    RETRY,
    DraftLength,
    PromptLookup,
    Speculation,
    StepTimes,
)

SIZES = (4, 8, 16, 32, 64)


def test_what_followed_before_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 2, 3])
    assert lookup.guess(3) == [4, 5, 9]
    assert lookup.guess(1) == [4]
    lookup.append(4)
    assert lookup.guess(2) == [5, 9]
    lookup.append(7)
    assert lookup.guess(2) == []


def test_more_tokens_in_common_come_first_and_then_the_latest_place() -> None:
    assert NGRAMS == (3, 2)
    assert PromptLookup([1, 2, 3, 10, 8, 2, 3, 20, 1, 2, 3]).guess(1) == [10]
    assert PromptLookup([1, 2, 3, 10, 1, 2, 3, 20, 1, 2, 3]).guess(1) == [20]


def test_nothing_is_guessed_from_the_end_itself() -> None:
    assert PromptLookup([1, 2]).guess(4) == []
    assert PromptLookup([]).guess(4) == []
    assert PromptLookup([7, 7, 7]).guess(0) == []
    assert PromptLookup([7, 7, 7]).guess(4) == [7]


def test_a_copy_goes_its_own_way() -> None:
    lookup = PromptLookup([1, 2, 3, 1, 2])
    other = lookup.copy()
    other.append(9)
    assert lookup.guess(1) == [3]
    assert other.guess(1) == []


def test_guesses_that_fail_pause_ever_longer() -> None:
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
    one, other = Speculation(9, 5, 6, 3, 1), Speculation(1, 1, 1, 1, 0)
    assert one + other == Speculation(10, 6, 7, 4, 1)
    assert one + other - other == one
    assert one.draft_acceptance_rate == 0.5
    assert Speculation(4, 2).draft_acceptance_rate is None


def test_the_time_of_a_step_is_the_median_of_the_last_ones() -> None:
    times = StepTimes()
    assert times.seconds(8) is None
    times.observe(8, 100.0)  # makes the kernels
    assert times.seconds(8) is None
    for seconds in (1.0, 9.0, 2.0):
        times.observe(8, seconds)
    assert times.seconds(8) == 2.0
    for seconds in (50.0, 5.0, 5.0):
        times.observe(32, seconds)
    assert [times.seconds(rows) for rows in (4, 16, 32, 64)] == [2.0, 2.0, 5.0, 5.0]
    for _ in range(9):
        times.observe(8, 3.0)
    assert times.seconds(8) == 3.0


Steps = Callable[..., list[int]]


@pytest.fixture
def steps() -> Steps:
    """``steps(length, count, right, draft, …)``: the guesses of each step where all take that long.

    Of a guess the first ``right`` tokens are. A step of the target takes 1 s for up to 16 rows, and of
    more rows as much longer as there are more; one of the draft ``draft`` seconds.
    """

    def run(
        length: DraftLength,
        count: int,
        right: int,
        draft: float,
        sequences: int = 1,
        others: int = 0,
        looked_up: int = 0,
    ) -> list[int]:
        found = []
        for _ in range(count):
            guesses = length.choose(sequences, others, SIZES)
            rows = sequences * (1 + guesses) + others
            assert rows <= SIZES[-1]
            size = next(each for each in SIZES if each >= rows)
            length.observe_target(size, max(1.0, size / 16))
            if guesses:
                length.observe_draft(4, draft)
            for _ in range(sequences if guesses else 0):
                length.observe_guess(min(right, guesses), guesses > right, looked_up)
            found.append(guesses)
        return found

    return run


def test_a_cheap_draft_that_is_right_guesses_many(steps: Steps) -> None:
    length = DraftLength(cost=0.0)
    found = steps(length, 200, right=99, draft=0.02)
    assert found[:2] == [0, 0], "first it is seen what a step takes without it"
    assert found[-20:].count(LONGEST_DRAFT) >= 19
    assert 0 < found.count(0) <= 6, "now and then, to see it again"
    assert length.pays and length.acceptance > 0.95


def test_fewer_are_guessed_where_fewer_are_right(steps: Steps) -> None:
    last = [max(steps(DraftLength(cost=0.0), 300, right, 0.05)[-30:]) for right in (1, 3, 6)]
    assert 0 < last[0] < last[1] < last[2] <= LONGEST_DRAFT


@pytest.mark.parametrize(
    "settings",
    [
        {"right": 0, "draft": 0.1},
        {"right": 99, "draft": 1.1},
        {"right": 1, "draft": 0.99},
        {"right": 99, "draft": 0.01, "others": 63},  # there are no rows to spare
        {"right": 99, "draft": 0.01, "sequences": 32},  # a step of 64 rows takes twice as long
        {"right": 3, "draft": 0.1, "looked_up": 3},  # prompt lookup is as good
    ],
)
def test_a_draft_that_does_not_pay_is_not_asked(settings: dict[str, float], steps: Steps) -> None:
    length = DraftLength(cost=0.0)
    found = steps(length, 1000, **settings)
    if settings.get("sequences") == 32:
        found = [guesses for guesses in found if guesses > 1]
    assert sum(map(bool, found[-400:])) <= 40
    if settings.get("others") != 63 and settings.get("sequences") != 32:
        assert not length.pays


def test_one_that_is_as_large_is_not_tried_at_all(steps: Steps) -> None:
    assert not any(steps(DraftLength(cost=1.0), 300, right=99, draft=0.01))
    assert any(steps(DraftLength(cost=0.5), 30, right=99, draft=0.01))


def test_it_is_tried_again_ever_later_and_goes_on_once_it_pays(steps: Steps) -> None:
    length = DraftLength(cost=0.0)
    found = steps(length, 6000, right=0, draft=0.3)
    tried = [at for at in range(1, len(found)) if found[at] and not found[at - 1]]
    pauses = [later - at for at, later in pairwise(tried)]
    assert pauses == sorted(pauses) and len(pauses) >= 4
    assert pauses[0] >= RETRY and pauses[-1] <= 1.2 * LONGEST_RETRY
    found = steps(length, 2 * LONGEST_RETRY, right=99, draft=0.3)
    assert found[-20:].count(0) <= 1


def test_with_more_streams_a_step_has_no_more_rows_than_it_can(steps: Steps) -> None:
    for sequences, others in ((8, 0), (20, 10), (32, 31), (64, 0)):
        steps(DraftLength(cost=0.0), 50, 99, 0.001, sequences, others)
