"""Form by regular expression, within bounds of time."""

from __future__ import annotations

import time

import pytest
import regex
from pydantic import ValidationError

from luthier.errors import GradingFailed
from luthier.graders import Answer, Regex, grade_answers
from luthier.types import Message, Row

THINK = r"(?s)\s*<think>.+</think>\s*<answer>.+</answer>\s*"


def answer(reply: str) -> Answer:
    return Answer((Message("user", "?"),), reply, None, Row("data.jsonl", 7))


@pytest.mark.parametrize(
    ("reply", "whole", "score"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", True, 1.0),
        ("Well: <think>a</think><answer>c</answer>", True, 0.0),
        ("Well: <think>a</think><answer>c</answer>", False, 1.0),
        ("<think></think><answer>c</answer>", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_search_and_whole(reply: str, whole: bool, score: float) -> None:
    grader = Regex(pattern=THINK, match="whole" if whole else "search")
    assert grader.grade([answer(reply)]) == [score]


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ValidationError):
        Regex(pattern="(")


@pytest.mark.parametrize(
    "pattern",
    ["(" * 100_000, "(?:" * 1000,
     "(" * 400 + "a" + ")*" * 400],
)  # fmt: skip
def test_invalid_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError):
        Regex(pattern=pattern)


@pytest.mark.parametrize(
    "pattern",
    ["a{99999999}", "((a{1000}){1000}){1000}", "a{,99999999}", "a{0000000000099999999}", "[^]]{999999}",
     "(?x)a{9 9 9 9 9 9 9 9}", "(?x)[#]{99#c\n9999999}", "(a)\\1{99999999}", "(?:){99999999}",
     "(?P<n>a{9999}){9999}", "a(?#c){99999999}"],
)  # fmt: skip
def test_huge_counts_are_refused_before_compilation(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regex, "compile", lambda given: pytest.fail("it was compiled"))
    with pytest.raises(ValidationError):
        Regex(pattern=pattern)


@pytest.mark.parametrize(
    "pattern",
    ["a{1000}", r"(\d{4}-){3}\d+", r"\p{L}{3}", r"[a-z\]{99999999}]", r"\{99999999}", "x{5000,}",
     "(ab|cd){2,20}"],
)  # fmt: skip
def test_usual_counts_are_accepted(pattern: str) -> None:
    assert Regex(pattern=pattern).pattern == pattern


def test_endless_pattern_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    grader = Regex(pattern=r"^(a|aa)+$")
    started = time.monotonic()
    with pytest.raises(GradingFailed):
        grade_answers(grader, [answer("a" * 60 + "!")])
    assert time.monotonic() - started < 20
    monkeypatch.setattr("luthier.graders.regex.TIME_LIMIT_S", 0.2)
    assert grade_answers(grader, [answer("aa"), answer("a" * 60 + "!")], "zero").scores == [
        1.0,
        0.0,
    ]
