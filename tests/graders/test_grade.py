"""Graders that raise errors, hang or return invalid scores."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import pytest
from pydantic import SkipValidation

from luthier.data.shapes.conversations import PromptCompletion
from luthier.errors import DataError, GradingFailed, LuthierError
from luthier.graders import Answer, Exact, Grader, Number, check_rows, grade_answers
from luthier.types import Message, Row


def answers(*replies: str) -> list[Answer]:
    asked = (Message("user", "?"),)
    return [Answer(asked, text, "ok", Row("data.jsonl", i)) for i, text in enumerate(replies, 1)]


class Own(Grader):
    method: str = "own"
    each: SkipValidation[Callable[[str], Any]]

    def score(self, answer: Answer) -> float:
        return self.each(answer.reply)  # type: ignore[no-any-return]


class AtOnce(Own):
    """A grader with all answers of a batch in one call."""

    @property
    def prefers_batches(self) -> bool:
        return True


def by_name(reply: str) -> Any:
    """Misbehave as the reply demands."""
    match reply:
        case "raise":
            raise KeyError("no such thing")
        case "exit":
            sys.exit(3)
        case "hang":
            time.sleep(30)
        case "deep":
            return by_name(reply) + 0
    return {"nan": math.nan, "inf": -math.inf, "none": None, "text": "1", "two": 2.0}.get(
        reply, 0.5
    )


@pytest.mark.parametrize("kind", [Own, AtOnce])
@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("raise", "grader.raised"),
        ("exit", "grader.raised"),
        ("deep", "grader.raised"),
        ("nan", "grader.not_finite"),
        ("inf", "grader.not_finite"),
        ("none", "grader.not_finite"),
        ("text", "grader.not_finite"),
        ("two", "grader.range"),
        ("hang", "grader.time"),
    ],
)
def test_invalid_score_names_row_grader_and_fix(kind: type[Own], reply: str, rule: str) -> None:
    grader, given = kind(each=by_name), answers("fine", reply, "fine")
    started = time.monotonic()
    with pytest.raises(GradingFailed) as caught:
        grade_answers(grader, given, time_limit_s=0.2)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.rule) == ("data.jsonl", 2, rule)
    assert caught.value.exit_code == LuthierError.exit_code
    found = grade_answers(grader, given, on_error="zero", time_limit_s=0.2)
    assert found.scores == [0.5, 0.0, 0.5]
    assert [problem.line for problem in found.problems] == [2]
    assert time.monotonic() - started < 10


def test_a_wrong_number_of_scores_is_an_error() -> None:
    class Short(Grader):
        method: str = "short"

        @property
        def prefers_batches(self) -> bool:
            return True

        def grade(self, answers: Sequence[Answer]) -> list[float]:
            return [1.0]

    with pytest.raises(GradingFailed):
        grade_answers(Short(), answers("a", "b"))
    assert grade_answers(Short(), answers("a", "b"), on_error="zero").scores == [0.0, 0.0]
    assert grade_answers(Short(), answers("a")).scores == [1.0]


def test_the_time_limit_is_for_each_answer() -> None:
    slow = Own(each=lambda reply: time.sleep(0.1) or 1.0)
    assert grade_answers(slow, answers(*"abcdef"), time_limit_s=0.5).scores == [1.0] * 6
    at_once = AtOnce(each=lambda reply: time.sleep(0.1) or 1.0)
    assert grade_answers(at_once, answers(*"abcdef"), time_limit_s=0.5).scores == [1.0] * 6


def test_hung_grader_skips_next_answer() -> None:
    seen: list[str] = []
    go = threading.Event()

    def wait(reply: str) -> float:
        seen.append(reply)
        if reply == "a":
            go.wait(10)
        return 1.0

    found = grade_answers(Own(each=wait), answers("a", "b"), on_error="zero", time_limit_s=0.2)
    assert found.scores == [0.0, 1.0]
    go.set()
    time.sleep(0.1)
    assert seen == ["a", "b"]


@pytest.mark.parametrize("kind", [Own, AtOnce])
def test_grader_runs_in_context_of_caller(kind: type[Own]) -> None:
    # So a sandbox hears that nobody waits any more, and a judge's journal whose run it is.
    account = ContextVar("account", default=0.0)
    token = account.set(1.0)
    try:
        assert grade_answers(kind(each=lambda reply: account.get()), answers("a")).scores == [1.0]
    finally:
        account.reset(token)


def test_many_problems_are_counted_and_the_first_are_shown() -> None:
    with pytest.raises(GradingFailed) as caught:
        grade_answers(Own(each=by_name), answers(*["nan"] * 9))
    assert [problem.line for problem in caught.value.problems] == list(range(1, 10))


def test_no_answers_have_no_scores() -> None:
    for kind in (Own, AtOnce):
        assert grade_answers(kind(each=by_name), []).scores == []


def test_an_answer_without_an_expected_text_is_refused() -> None:
    row = Row("data.jsonl", 3)
    bare = Answer((Message("user", "?"),), "x", None, row)
    with pytest.raises(GradingFailed) as failed:
        grade_answers(Exact(), [bare])
    [problem] = failed.value.problems
    assert (problem.rule, problem.location) == ("grader.no_expected", row.location)
    with pytest.raises(DataError) as caught:
        check_rows([Exact(), Number()], [bare, *answers("x")])
    rules = [problem.rule for problem in caught.value.problems]
    assert rules == ["grader.no_expected", "grader.no_expected", "grader.no_number"]


def test_best_of_several_correct_replies_counts() -> None:
    row = PromptCompletion("f", 1, "Where is he?", "at home", ("in the house",))
    replies = ["in the house", "at home", "away"]
    graded = grade_answers(Exact(), [Answer.of(row, reply) for reply in replies])
    assert graded.scores == [1, 1, 0]
    failing = Own(each=lambda reply: math.nan)
    assert len(grade_answers(failing, [Answer.of(row, "away")], "zero").problems) == 1
