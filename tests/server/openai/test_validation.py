"""Bodies that are refused, in OpenAI's form of words."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from luthier.server import openai
from luthier.server.http.messages import Fault
from luthier.server.openai.protocol import Body, validate


class Part(Body):
    text: str
    kind: Literal["a", "b"] = "a"


class Cat(Body):
    type: Literal["cat"]


class Dog(Body):
    type: Literal["dog"]


class Sample(Body):
    name: Annotated[str, Field(min_length=1, max_length=3, pattern="^[a-z]*$")] = "a"
    count: Annotated[int, Field(ge=1, le=8)] = 1
    share: Annotated[float, Field(gt=0, lt=2)] = 1.0
    flag: bool = False
    parts: Annotated[list[Part], Field(min_length=1, max_length=2)] | None = None
    either: str | list[Part] = ""
    choice: Literal["none", "auto"] | Part = "none"
    pet: Annotated[Cat | Dog, Field(discriminator="type")] | None = None
    epochs: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"


TEXT = {"text": "x"}


@pytest.mark.parametrize(
    ("given", "param", "code", "message"),
    [
        (
            {"name": 1},
            "name",
            "invalid_type",
            "'name': expected a string, but got an integer instead",
        ),
        ({"count": "1"}, "count", "invalid_type", "expected an integer, but got a string instead"),
        ({"count": 1.5}, "count", "invalid_type", "expected an integer, but got a number instead"),
        ({"share": None}, "share", "invalid_type", "expected a number, but got null instead"),
        ({"flag": {}}, "flag", "invalid_type", "expected a boolean, but got an object instead"),
        (
            {"either": 3},
            "either",
            "invalid_type",
            "expected one of a string or an array, but got an int",
        ),
        (
            {"either": [3]},
            "either[0]",
            "invalid_type",
            "expected an object, but got an integer instead",
        ),
        (
            {"parts": [{"text": 3}]},
            "parts[0].text",
            "invalid_type",
            "'parts[0].text': expected a string",
        ),
        ({"parts": [{}]}, "parts[0].text", "missing_required_parameter", "'parts[0].text'."),
        (
            {"parts": []},
            "parts",
            "empty_array",
            "an array with minimum length 1, but got an empty array",
        ),
        (
            {"parts": [TEXT] * 3},
            "parts",
            "array_above_max_length",
            "got an array with length 3 instead",
        ),
        (
            {"name": ""},
            "name",
            "empty_string",
            "'name': empty string. Expected a string with minimum",
        ),
        (
            {"name": "abcd"},
            "name",
            "string_above_max_length",
            "string too long. Expected a string with max",
        ),
        (
            {"name": "A"},
            "name",
            "invalid_value",
            "Expected a string that matches the pattern '^[a-z]*$'.",
        ),
        (
            {"count": 0},
            "count",
            "integer_below_min_value",
            "Expected a value >= 1, but got 0 instead.",
        ),
        (
            {"count": 9},
            "count",
            "integer_above_max_value",
            "integer above maximum value. Expected a value <=",
        ),
        (
            {"share": 2.5},
            "share",
            "decimal_above_max_value",
            "Expected a value < 2, but got 2.5 instead.",
        ),
        (
            {"choice": "x"},
            "choice",
            "invalid_value",
            "'x'. Supported values are: 'none' or 'auto'.",
        ),
        (
            {"epochs": "many"},
            "epochs",
            "invalid_value",
            "'many'. Supported values are: 'auto' or an integer.",
        ),
        (
            {"pet": {"type": "cow"}},
            "pet",
            "invalid_value",
            "'cow'. Supported values are: 'cat', 'dog'.",
        ),
        (
            {"pet": {}},
            "pet",
            "missing_required_parameter",
            "Missing required parameter: 'pet.type'.",
        ),
    ],
)
def test_what_was_expected_and_what_came(
    given: dict[str, Any], param: str, code: str, message: str
) -> None:
    with pytest.raises(Fault) as refused:
        validate(given, Sample)
    assert (refused.value.parameter, refused.value.details["reason"]) == (param, code)
    assert message in refused.value.message


def test_long_values_are_quoted_in_part() -> None:
    with pytest.raises(Fault, match=r"'x{100}…'"):
        validate({"choice": "x" * 1_000}, Sample)


def bodies() -> Iterator[type[Body]]:
    for module in pkgutil.iter_modules(openai.__path__, f"{openai.__name__}."):
        for each in vars(importlib.import_module(module.name)).values():
            if isinstance(each, type) and issubclass(each, Body) and each.__module__ == module.name:
                yield each


@pytest.mark.parametrize("kind", list(bodies()), ids=lambda kind: kind.__name__)
def test_no_member_is_refused_in_the_words_of_pydantic(kind: type[Body]) -> None:
    for name, field in kind.model_fields.items():
        for value in (None, True, -1, 1e30, "", "§" * 5_000, [], [3], [{}], {}, {"type": "§"}):
            try:
                validate({field.alias or name: value}, kind)
            except Fault as fault:
                assert "should" not in fault.message, fault.message
