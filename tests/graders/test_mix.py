"""Combination of several graders."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from luthier.errors import GradingFailed, RecipeError, RowRefused
from luthier.graders import Answer, Exact, Grader, Mix, Multi, Number, grade_answers, parse_graders
from luthier.types import Message, Row

FORM = {"method": "regex", "pattern": "####"}


def answer(reply: str, expected: str | None = "#### 42") -> Answer:
    return Answer((Message("user", "?"),), reply, expected, Row("data.jsonl", 9))


class Length(Grader):
    """A grader with unbounded scores, like a reward model."""

    method: str = "length"
    needs_expected = False

    @property
    def is_share(self) -> bool:
        return False

    def score(self, answer: Answer) -> float:
        return float(len(answer.reply)) if answer.reply else float("nan")


def test_the_weighted_mean() -> None:
    mix = Mix.model_validate(
        {"parts": {"result": "number", "form": FORM}, "weights": {"result": 3, "form": 1}}
    )
    assert mix.parts["result"] == Number()
    replies = [answer("#### 42"), answer("42"), answer("#### 41"), answer("none")]
    assert grade_answers(mix, replies).scores == [1.0, 0.75, 0.25, 0.0]
    assert mix.is_share
    assert Mix.model_validate({"parts": {"a": "number", "b": FORM}}).grade(replies)[1] == 0.5


def test_weights_as_given_and_penalties() -> None:
    fields = {"parts": {"result": Number(), "length": Length()}, "weights": {"length": -0.01}}
    mix = Mix.model_validate({**fields, "normalize": False})
    assert not mix.is_share
    assert grade_answers(mix, [answer("42")]).scores == [pytest.approx(1 - 0.02)]
    assert grade_answers(Mix.model_validate(fields), [answer("42")]).scores[0] == pytest.approx(
        0.98 / 1.01
    )


def test_rounding_does_not_leave_the_bounds() -> None:
    weights = {str(i): 0.1 for i in range(1, 12)}
    mix = Mix.model_validate({"parts": dict.fromkeys(weights, "number"), "weights": weights})
    assert grade_answers(mix, [answer("42")]).scores == [pytest.approx(1.0)]


def test_mixes_may_be_nested_and_survive_storing() -> None:
    inner = {"method": "mix", "parts": {"form": FORM}}
    mix = parse_graders([{"method": "mix", "parts": {"inner": inner, "result": "number"}}])["mix"]
    stored = mix.model_dump(mode="json", exclude_none=True)
    assert stored["parts"]["inner"]["parts"]["form"]["pattern"] == "####"
    assert parse_graders([stored])["mix"] == mix


def test_failed_part_leaves_remaining_scores() -> None:
    mix = Mix(parts={"size": Length(), "result": Number()}, normalize=False)
    with pytest.raises(GradingFailed):
        grade_answers(mix, [answer("42"), answer("")])
    assert grade_answers(mix, [answer("42"), answer("")], on_error="zero").scores == [3.0, 0.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"parts": {}},
        {"parts": {"a": "exact"}, "weights": {"b": 1}},
        {"parts": {"a": "exact"}, "weights": {"a": 0}},
        {"parts": {"a": "rouge"}},
        {"parts": {"a": {"pattern": "x"}}},
        {"parts": {"a": {"method": "regex"}}},
    ],
)
def test_invalid_mix_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Mix.model_validate(fields)


def test_incomplete_part_is_refused() -> None:
    with pytest.raises(RecipeError):
        parse_graders([{"method": "mix", "parts": {"a": "exact", "b": "judge"}}])
    with pytest.raises(RowRefused) as refused:
        Mix(parts={"a": Exact(), "b": Number()}).check_expected("twelve")
    assert refused.value.rule == "grader.no_number"


def test_mix_has_time_limit_if_a_part_has() -> None:
    reward = {"method": "reward", "model": "liked"}
    for parts, limited in (({"a": reward}, False), ({"a": reward, "b": FORM}, True)):
        mix = Mix.model_validate({"parts": parts})
        formula = Multi.model_validate({"graders": parts, "calculate_output": "a"})
        assert mix.has_time_limit is formula.has_time_limit is limited
