"""Rules that accept or reject teacher replies."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import ValidationError

from luthier.chat_models.base import Failure, Reply
from luthier.data.shapes.conversations import Conversation, PromptOnly
from luthier.errors import DataError
from luthier.graders import Answer, Grader
from luthier.types import Message, Row
from luthier.workflows.distil.insights import (
    RULES,
    Insight,
    check_grader,
    grade_insights,
    judge_answer,
    reject_prompts,
    repetition_warning,
    summary,
)
from luthier.workflows.distil.recipe import InsightSpec


def row(line: int = 1, prompt: str = "p", **fields: Any) -> Row:
    return PromptOnly("f.jsonl", line, prompt, **fields)


def rule_of(
    outcome: Reply | Failure, wanted: str | None = None, room: int = 99, **spec: Any
) -> Any:
    def overflow(_: Row, answer: str) -> str:
        return "too much" if len(answer) > room else ""

    asked = InsightSpec(**spec)
    found = [judge_answer(row(expected=wanted), outcome, asked, overflow)]
    if asked.grader is not None:
        found = grade_insights(found, asked.grader, asked.threshold)
    return found[0].rule


def stop(text: str) -> Reply:
    return Reply(text, "stop")


@pytest.mark.parametrize(
    ("outcome", "spec", "rule"),
    [
        (stop("fine"), {}, None),
        (Reply("half an ans", "length"), {}, "answer.cut"),
        (Reply("half an ans", "unknown"), {}, "answer.cut"),
        (Reply("", "content_filter"), {}, "answer.filtered"),
        (Reply("No.", "refusal"), {"refusals": False}, "answer.refusal"),
        (stop(" \n"), {}, "answer.empty"),
        (stop("four"), {"shortest_answer": 4}, None),
        (stop("four"), {"shortest_answer": 5}, "answer.too_short"),
        (stop("four"), {"longest_answer": 4}, None),
        (stop("four"), {"longest_answer": 3}, "answer.too_long"),
        (stop("x" * 100), {}, "answer.context"),
        (Failure("teacher.failed", "none came"), {}, "teacher.failed"),
    ],
)
def test_replies_are_rejected_with_rule(outcome: Any, spec: Any, rule: str | None) -> None:
    assert rule_of(outcome, **spec) == rule
    assert rule is None or rule in RULES


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",
        "Sorry, but I am not able to provide medical advice.",
        "I cannot help you with this.",
        "As an AI language model, I do not have opinions.",
        "I am unable to comply with that.",
        "Unfortunately, I won't write that.",
    ],
)
def test_refusals_in_english(text: str) -> None:
    assert rule_of(stop(text)) == "answer.refusal"
    assert rule_of(stop(text), refusals=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that your order is late. Please send its number.",
        "I cannot recommend this restaurant enough!",
        "Sorry is a board game for two to four players.",
        "You can't divide by zero, so the answer is undefined.",
        "The model said: I cannot help with that.",
        "As an airline, we fly to 40 cities.",
    ],
)
def test_replies_similar_to_refusals_are_accepted(text: str) -> None:
    assert rule_of(stop(text)) is None


def test_grader_compares_with_reply_of_row() -> None:
    assert rule_of(stop("Paris "), "Paris", grader="exact") is None
    assert rule_of(stop("London"), "Paris", grader="exact") == "grader.score"
    assert rule_of(stop("London"), "Paris", grader="exact", threshold=0.0) is None


def test_a_grader_without_anything_to_compare_with_is_refused() -> None:
    rows = [row(1, expected="a"), row(2)]
    check_grader(rows, InsightSpec())
    with pytest.raises(DataError) as refused:
        check_grader(rows, InsightSpec(grader="exact"))
    assert refused.value.rule == "grader.no_expected"
    with pytest.raises(ValidationError):
        InsightSpec(grader="vibes")


class Broken(Grader):
    """A grader that returns no number."""

    method: Literal["broken"] = "broken"

    def score(self, answer: Answer) -> float:
        """Nothing to say."""
        return float("nan")


def test_non_numeric_score_is_rejected() -> None:
    assert rule_of(stop("a"), "a", grader=Broken(), threshold=0.0) == "grader.failed"


def test_duplicate_and_long_prompts_are_rejected() -> None:
    talk = (Message("user", "b"), Message("assistant", "c"), Message("user", "d"))
    rows = [
        row(1, "a"),
        row(2, "b"),
        row(3, "a "),
        Conversation("f", 4, messages=talk),
        row(5, "x" * 9),
    ]
    found = reject_prompts(rows, InsightSpec(longest_prompt=8))
    assert {index: insight.rule for index, insight in found.items()} == {
        2: "prompt.duplicate",
        4: "prompt.too_long",
    }
    assert "line 1" in found[2].reason
    assert rows[3].turns() == talk


def test_the_summary_counts() -> None:
    insights = [
        Insight(row(), "a"),
        Insight(row(), "", "answer.empty"),
        Insight(row(), "x", "answer.cut"),
        Insight(row(), "x", "answer.cut"),
    ]
    found = summary(insights)
    assert (found.prompts, found.accepted) == (4, 1)
    assert list(found.rules.items()) == [("answer.cut", 2), ("answer.empty", 1)]
    assert found.lines[0] == "1 of 4 prompts are accepted"


def test_repeated_answers_are_a_warning() -> None:
    same = [Insight(row(n), "I see.") for n in range(3)]
    others = [Insight(row(n), f"answer {n}") for n in range(30)]
    assert repetition_warning([*same, *others[:10]])
    assert repetition_warning([*same, *others]) == ""
    assert repetition_warning([*same[:2], *others[:3]]) == ""
    assert repetition_warning([]) == ""
