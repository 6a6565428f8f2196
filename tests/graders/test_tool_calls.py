"""Tool calls of replies compared with expected calls."""

from __future__ import annotations

import pytest

from luthier.errors import GradingFailed
from luthier.graders import Answer, ToolCalls, grade_answers
from luthier.types import Message, Row

ROME = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def score(reply: str, expected: str | None) -> float:
    answer = Answer((Message("user", "Weather?"),), reply, expected, Row("data.jsonl", 1))
    return grade_answers(ToolCalls(), [answer]).scores[0]


def marked(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("reply", "expected", "right"),
    [
        (ROME, ROME, 1),
        ('{"arguments": {"days": 2.0, "city": "Rome"}, "name": "weather"}', ROME, 1),
        ('{"name": "weather", "parameters": {"city": "Rome", "days": 2}}', ROME, 1),
        (f"Let me look.\n{marked(ROME)}", ROME, 1),
        (marked(OSLO, ROME), marked(ROME, OSLO), 1),
        (f"[{OSLO}, {ROME}]", marked(ROME, OSLO), 1),
        (marked(ROME), marked(ROME, OSLO), 0),
        (marked(ROME, ROME), ROME, 0),
        (OSLO, ROME, 0),
        (ROME.replace("2", '"2"'), ROME, 0),
        (ROME.replace("weather", "clock"), ROME, 0),
        (ROME[:-1], ROME, 0),
        ("It is sunny.", ROME, 0),
        ("It is sunny.", "Clear sky.", 1),
        (ROME, "Clear sky.", 0),
        ("[" * 100_000, ROME, 0),
    ],
)
def test_equal_calls_score_1(reply: str, expected: str, right: float) -> None:
    assert score(reply, expected) == right


def test_missing_expected_calls_fail() -> None:
    with pytest.raises(GradingFailed) as refused:
        score(ROME, None)
    assert refused.value.rule == "grader.no_expected"
