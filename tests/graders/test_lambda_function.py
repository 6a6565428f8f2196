"""Lambda handlers as graders: events, results and errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import GradingFailed
from luthier.graders import Answer, LambdaFunction, grade_answers
from luthier.types import Message

LENGTHS = """
def lambda_handler(event, context):
    assert context.get_remaining_time_in_millis() > 0 and context.function_name == "reward"
    answers = []
    for each in event:
        said = each["messages"][-1]
        assert said["role"] == "assistant" and each["messages"][0]["content"] == "How long?"
        assert each["metadata"] == {"id": "mine", "factor": each["factor"]}
        if said["content"] == "bad":
            raise KeyError("no such word")
        reward = {"name": "length", "value": 1.0, "type": "Reward"}
        score = len(said["content"]) * each["factor"]
        answers.append(
            {"id": each["id"], "aggregate_reward_score": score, "metrics_list": [reward]}
        )
    return answers[::-1]
"""


def answer(reply: str, line: int = 1, **members: Any) -> Answer:
    row = PromptOnly("rows.jsonl", line, prompt="", members={"id": "mine", "factor": 2, **members})
    return Answer((Message("user", "How long?"),), reply, None, row)


def failed(body: str, *replies: str, **fields: Any) -> list[Any]:
    """Problems of a handler with this ``body``."""
    source = f"def lambda_handler(event, context):\n    {body}\n"
    grader = LambdaFunction(source=source, name="reward", **fields)
    answers = [answer(reply, line) for line, reply in enumerate(replies or ("a",), 1)]
    with pytest.raises(GradingFailed) as error:
        grade_answers(grader, answers)
    return list(error.value.problems)


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")  # that of a server
def test_lambda_scores_are_matched_by_id() -> None:
    grader = LambdaFunction(source=LENGTHS, name="reward")
    answers = [answer("x" * n, factor=n % 3) for n in range(35)]
    assert grade_answers(grader, answers).scores == [n * (n % 3) for n in range(35)]


def test_row_is_named_when_handler_raises() -> None:
    grader = LambdaFunction(source=LENGTHS, name="reward")
    answers = [answer(text, line) for line, text in enumerate(("a", "bad", "ccc", "bad"), 1)]
    with pytest.raises(GradingFailed) as error:
        grade_answers(grader, answers)
    found = [(each.line, each.rule) for each in error.value.problems]
    assert found == [(2, "grader.raised"), (4, "grader.raised")]
    assert grade_answers(grader, answers, on_error="zero").scores == [2, 0, 6, 0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return None", "TypeError"),
        ("return [{'id': each['id']} for each in event]", "aggregate_reward_score"),
        ("return []", "lacks ids ['0']"),
        ("return [{'id': '0', 'aggregate_reward_score': 'good'}]", "ValueError"),
        ("return [{'id': '0', 'aggregate_reward_score': float('nan')}]", "not finite"),
        ("import os; os._exit(3)", "did not end within"),
        ("import boto3", "ModuleNotFoundError"),
    ],
)
def test_invalid_result_is_reported_with_fix(body: str, said: str) -> None:
    (problem,) = failed(body)
    assert said in problem.message and "`reward`" in problem.message and problem.advice


def test_hung_handler_is_stopped() -> None:
    body = "while event[0]['messages'][-1]['content'] == 'hang': pass\n    return 1 / 0"
    problems = failed(body, "hang", "b", seconds=0.4)
    assert [each.rule for each in problems] == ["grader.time", "grader.raised"]


def test_repeated_problem_of_row_is_printed_once() -> None:
    source = "def lambda_handler(event, context):\n    return 1 / 0\n"
    answers = [answer("a", line) for line in (7, 7, 7, 8)]
    with pytest.raises(GradingFailed) as error:
        grade_answers(LambdaFunction(source=source), answers)
    assert len(error.value.problems) == 4 and len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("source", ["def handler(event, context): pass", "def lambda_handler(:"])
def test_sources_without_a_handler_are_refused(source: str) -> None:
    with pytest.raises(ValidationError):
        LambdaFunction(source=source)
