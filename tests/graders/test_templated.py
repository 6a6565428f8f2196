"""Graders with places for the row's members and the reply, in OpenAI's terms."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.chat_models.base import Failure
from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import GradingFailed, RecipeError, RowRefused
from luthier.graders import (
    Answer,
    LabelModel,
    Multi,
    PythonSource,
    ScoreModel,
    StringCheck,
    TextSimilarity,
    grade_answers,
)
from luthier.graders.formula import compile_formula, names_in, parse_formula, value_of
from luthier.types import Message

MEMBERS = {"answer": "Paris", "tags": ["a", "b"], "deep": {"list": [{"x": "é"}]}, "size": 3}


def answer(reply: str, **members: Any) -> Answer:
    row = PromptOnly("rows.jsonl", 4, prompt="", members={**MEMBERS, **members})
    return Answer((Message("user", "Capital of France?"),), reply, None, row)


def one(grader: Any, reply: str, **members: Any) -> float:
    return grade_answers(grader, [answer(reply, **members)]).scores[0]


@pytest.mark.parametrize(
    ("operation", "reply", "score"),
    [
        ("eq", "Paris", 1),
        ("eq", "paris", 0),
        ("ne", "paris", 1),
        ("ne", "Paris", 0),
        ("like", "It is Paris.", 1),
        ("like", "It is paris.", 0),
        ("ilike", "It is PARIS.", 1),
        ("ilike", "It is Rome.", 0),
    ],
)
def test_string_checks(operation: Any, reply: str, score: float) -> None:
    assert one(StringCheck(reference="{{ item.answer }}", operation=operation), reply) == score


def test_places() -> None:
    for template, text in (
        ("{{item.deep.list[0].x}}!", "é!"),
        ("{{item.tags}}", '["a", "b"]'),
        ("{{item.size}} {{item.answer}}", "3 Paris"),
        ("{{item.messages[0].content}}", "Capital of France?"),
        ("{{sample.output_json.a[1]}}", "2"),
        ("{ {{sample.output_text}} }", '{ {"a": [1, "2"]} }'),
    ):
        grader = StringCheck(input=template, reference=text)
        assert one(grader, '{"a": [1, "2"]}') == 1, template
    # Values of a row are never placeholders.
    assert (
        one(StringCheck(reference="{{item.answer}}"), "{{item.size}}", answer="{{item.size}}") == 1
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{answer}}",
        "{{item}}",
        "{{item.a.__class__()}}",
        "{{sample.secret}}",
        "{{ 1 + 1 }}",
        "{{}}",
    ],
)
def test_invalid_placeholder_is_refused(template: str) -> None:
    with pytest.raises(ValidationError):
        StringCheck(reference=template)


def test_missing_member_of_row_fails() -> None:
    for template in (
        "{{item.other}}",
        "{{item.tags[2]}}",
        "{{item.answer.x}}",
        "{{sample.output_json.a}}",
    ):
        with pytest.raises(GradingFailed) as failed:
            one(StringCheck(reference=template), "no JSON")
        assert failed.value.problems[0].line == 4


@pytest.mark.parametrize(
    ("metric", "reply", "reference", "score"),
    [
        ("fuzzy_match", "abcd", "abxd", 2 * 3 / 8),
        ("fuzzy_match", "", "", 1.0),
        ("rouge_1", "the cat sat", "The cat ran", 2 / 3),
        ("rouge_2", "the cat sat", "the cat ran", 1 / 2),
        ("rouge_5", "the cat sat", "the cat sat", 1.0),
        ("rouge_5", "the cat sat", "the dog sat", 0.0),
        ("rouge_2", "London", "Paris", 0.0),
        ("rouge_2", "London", "Paris is it", 0.0),
        ("rouge_l", "a x b y c", "a b c", 2 * 3 / 8),
        ("bleu", "the cat sat down", "the cat sat down", 1.0),
        ("bleu", "dog", "the cat", 0.0),
        # One of two words; nothing but what is added above them; no brevity to be punished.
        ("bleu", "a b", "a c", (1 / 2 * 1 / 2 * 1 * 1) ** 0.25),
        ("bleu", "a", "a b", math.exp(1 - 2)),
        # Of 4+3+2+1 n-grams each: the words a, b, c, and "a b", "b c", "a b c" are shared.
        ("gleu", "a b c d", "a b c e", 6 / 10),
        ("gleu", "a", "a b", 1 / 3),
        ("rouge_l", "", "word", 0.0),
    ],
)
def test_similarities(metric: Any, reply: str, reference: str, score: float) -> None:
    grader = TextSimilarity(reference="{{item.answer}}", evaluation_metric=metric)
    assert one(grader, reply, answer=reference) == pytest.approx(score)


def test_a_python_function() -> None:
    source = (
        "import json\n"
        "def grade(sample, item):\n"
        "    if sample['output_text'] == 'raise':\n"
        "        raise ValueError('no such thing')\n"
        "    if sample['output_text'] == 'end':\n"
        "        import os; os._exit(0)\n"
        "    return len(sample['output_text']) + item['size'] / 10\n"
    )
    grader = PythonSource(source=source)
    assert grade_answers(grader, [answer("four"), answer("")]).scores == [4.3, 0.3]
    with pytest.raises(GradingFailed):
        one(grader, "raise")
    with pytest.raises(GradingFailed):
        one(grader, "end")


def test_python_function_is_isolated_from_host(tmp_path: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    source = (
        "def grade(sample, item):\n"
        "    import os, socket\n"
        "    seen = os.path.exists(item['path']) or bool(os.environ.get('HOME'))\n"
        "    try:\n"
        "        socket.create_connection(('127.0.0.1', 1), 1)\n"
        "    except OSError as error:\n"
        "        seen = seen or 'unreachable' not in str(error).lower()\n"
        "    return float(seen)\n"
    )
    assert one(PythonSource(source=source), "", path=str(secret)) == 0


@pytest.mark.parametrize("source", ["def other(): pass", "def grade(:", "x = 1\n" * 100_000, ""])
def test_invalid_python_source_is_refused(source: str) -> None:
    with pytest.raises(ValidationError):
        PythonSource(source=source)


def test_slow_function_is_stopped() -> None:
    source = "def grade(sample, item):\n    while True: pass"
    with pytest.raises(GradingFailed):
        one(PythonSource(source=source, seconds=0.3), "")


class Opens:
    """Opens a judge with fixed verdicts."""

    def __init__(self, *replies: str | Failure) -> None:
        self.replies, self.asked = list(replies), [list[Message]()]

    def scorer(self, model: str) -> Any:
        raise AssertionError

    def writer(self, judge: Any, sampling: Any, schema: Any = None) -> Any:
        def write(asked: Sequence[Sequence[Message]]) -> list[str | Failure]:
            self.asked = [list(each) for each in asked]
            return self.replies[: len(asked)]

        return write


def test_score_model() -> None:
    turns = (
        {"role": "developer", "content": "Grade."},
        {"role": "user", "content": "{{item.answer}} or {{sample.output_text}}?"},
    )
    grader = ScoreModel.model_validate({"model": "judge", "input": turns, "range": [0, 5]})
    assert not grader.is_share
    assert grader.models == {"judge": "causal_lm"}
    with pytest.raises(RecipeError):
        one(grader, "Rome")
    judge = Opens("I think: 4.5", "5 of 10, so 3")
    opened = grader.with_models(judge)
    assert grade_answers(opened, [answer("Rome"), answer("Oslo")]).scores == [4.5, 3.0]
    assert judge.asked[0][0] == Message("system", "Grade.")
    assert judge.asked[0][1].content.startswith("Paris or Rome?")
    assert judge.asked[0][1].content.endswith("number from 0 to 5: the score.")
    for bad in ("no idea", "6", Failure("judge.failed", "it is gone")):
        with pytest.raises(GradingFailed):
            one(grader.with_models(Opens(bad)), "Rome")
    with pytest.raises(ValidationError):
        ScoreModel.model_validate({"model": "judge", "input": turns, "range": [1, 1]})


def test_label_model() -> None:
    turns = ({"role": "user", "content": "Is {{sample.output_text}} a city?"},)
    fields = {"model": "judge", "input": turns, "labels": ["yes", "no", "not sure"]}
    grader = LabelModel.model_validate({**fields, "passing_labels": ["yes", "not sure"]})
    assert grader.is_share and grader.answer_schema == {"enum": ["yes", "no", "not sure"]}
    judge = Opens("Yes.", '"no"', "NOT SURE")
    opened = grader.with_models(judge)
    assert grade_answers(opened, [answer("Rome")] * 3).scores == [1.0, 0.0, 1.0]
    assert judge.asked[0][0].content.endswith("and nothing else: yes, no, not sure.")
    for bad in ("yes and no", "", Failure("judge.failed", "it is gone")):
        with pytest.raises(GradingFailed):
            one(grader.with_models(Opens(bad)), "Rome")
    with pytest.raises(ValidationError):
        LabelModel.model_validate({**fields, "passing_labels": ["maybe"]})
    dotted = LabelModel.model_validate(
        {**fields, "labels": ["N.A.", "n.a"], "passing_labels": ["n.a"]}
    )
    opened = dotted.with_models(Opens('"N.A."', "n.a", "N.a."))
    assert grade_answers(opened, [answer("Rome")] * 3).scores == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("verdict", "span", "score"),
    [
        ("Score: 0.5", (0, 1), 0.5),
        ("-1e-1", (-1, 1), -0.1),
        ("from 1 to 7", (0, 5), None),
        ("", (0, 5), None),
    ],
)
def test_numbers_in_text(verdict: str, span: tuple[float, float], score: float | None) -> None:
    fields = {"model": "m", "input": [{"role": "user", "content": "?"}], "range": span}
    assert ScoreModel.model_validate(fields).score_of(verdict) == score


def test_a_formula_of_graders() -> None:
    parts = {
        "same": StringCheck(reference="{{item.answer}}"),
        "near": TextSimilarity(reference="{{item.answer}}"),
    }
    grader = Multi(graders=parts, calculate_output="max(same, near) - 2 ^ (1 - same) / 4")
    assert grade_answers(grader, [answer("Paris"), answer("Pxris")]).scores == pytest.approx(
        [0.75, 0.3]
    )
    again = Multi.model_validate(grader.model_dump(mode="json"))
    assert again == grader
    with pytest.raises(GradingFailed):
        one(Multi(graders=parts, calculate_output="1 / (same - same)"), "x")
    for faulty in ("same / (1 - 1)", "same + log(0)", "sqrt(same, near)", "max(same)"):
        with pytest.raises(ValidationError):
            Multi(graders=parts, calculate_output=faulty)
    with pytest.raises(GradingFailed):
        one(Multi(graders={"a": StringCheck(reference="{{item.no}}")}, calculate_output="a"), "x")


@pytest.mark.parametrize(
    ("formula", "value"),
    [("1 + 2 * 3", 7), ("(1 + 2) * 3", 9), ("2 ^ 3 - -1", 9), ("min(a, b, 0.5)", 0.5)]
    + [("sqrt(abs(-4))", 2), ("floor(1.9) + ceil(1.1)", 3), ("exp(log(2))", 2), ("a / b", 0.5)]
    + [
        ("a >= 1", 1),
        ("a > 1", 0),
        ("2 * a <= b", 1),
        ("(a < b) + (b < a)", 1),
        ("1 - (a < b)", 0),
    ],
)
def test_formulas(formula: str, value: float) -> None:
    assert value_of(compile_formula(formula), {"a": 1.0, "b": 2.0}) == pytest.approx(value)


@pytest.mark.parametrize(
    "formula",
    ["", "a +", "a.b", "a[0]", "__import__('os')", "f(a)", "lambda: a", "a if a else a", "'a'"]
    + [
        "[a]",
        "a == a",
        "a < b < a",
        "a and a",
        "min(*a)",
        "min(a, key=a)",
        "a; a",
        "True",
        "abs",
        "max()",
    ],
)
def test_invalid_formula_is_refused(formula: str) -> None:
    if formula == "abs":  # a name like any other
        assert names_in(parse_formula(formula)) == {"abs"}
        return
    with pytest.raises(ValueError):
        parse_formula(formula)


def test_comparison_formula_is_a_share() -> None:
    parts = {"a": StringCheck(reference="x")}
    assert Multi(graders=parts, calculate_output="2 * a >= 1").is_share
    assert not Multi(graders=parts, calculate_output="2 * a").is_share


def test_formula_overflow() -> None:
    with pytest.raises(OverflowError):
        value_of(compile_formula("9 ^ 9 ^ 9 ^ 9"), {})


def test_formula_with_unknown_grader_is_refused() -> None:
    with pytest.raises(ValidationError):
        Multi(graders={"a": StringCheck(reference="x")}, calculate_output="a + b")


class TestWhatATemplateStandsFor:
    def test_long_text_is_refused_before_rendering(self) -> None:
        grader = StringCheck(reference="{{sample.output_text}}" * 250)
        tracemalloc.start()
        with pytest.raises(
            RowRefused,
        ):
            grader.score(answer("x" * 100_000))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()
        assert grader.score(answer("x" * 10)) == 0.0

    def test_length_counts_rendered_members(self) -> None:
        grader = StringCheck(reference="{{item.deep}} and {{ item.deep }}", operation="ne")
        one = len(json.dumps(MEMBERS["deep"], ensure_ascii=False))
        exact = 2 * one + len(" and ")
        assert grader.score(replace(answer("x"), text_characters=exact)) == 1.0
        with pytest.raises(RowRefused):
            grader.score(replace(answer("x"), text_characters=exact - 1))

    def test_places_are_few(self) -> None:
        assert StringCheck(reference="{{item.a}}" * 256)
        with pytest.raises(ValidationError):
            StringCheck(reference="{{item.a}}" * 257)

    @pytest.mark.parametrize("end", ["", "}}", "{", "} }"])
    def test_white_space_takes_linear_time(self, end: str) -> None:
        started = time.monotonic()
        with suppress(ValidationError):
            StringCheck(reference="{{" + " " * 200_000 + end)
        assert time.monotonic() - started < 5

    def test_turns_to_a_model_are_counted_together(self) -> None:
        turns = [{"role": "user", "content": "{{sample.output_text}}"}] * 30
        grader = ScoreModel.model_validate({"model": "m", "input": turns})
        with pytest.raises(RowRefused):
            grader.question(answer("x" * 10_000))

    def test_deeply_nested_reply_is_text(self) -> None:
        assert one(StringCheck(reference="{{sample.output_text}}"), "[" * 100_000) == 1.0


def test_formulas_have_a_depth() -> None:
    for formula in ("-" * 998 + "a", "^".join("a" * 400)):
        with pytest.raises(ValueError):
            parse_formula(formula)
    assert value_of("+".join("a" * 150), {"a": 1.0}) == 150.0
