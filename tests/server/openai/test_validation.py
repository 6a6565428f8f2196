"""Rejected bodies: the member and the code of the error."""

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
    ("given", "param", "code"),
    [
        ({"name": 1}, "name", "invalid_type"),
        ({"count": "1"}, "count", "invalid_type"),
        ({"count": 1.5}, "count", "invalid_type"),
        ({"share": None}, "share", "invalid_type"),
        ({"either": 3}, "either", "invalid_type"),
        ({"either": [3]}, "either[0]", "invalid_type"),
        ({"parts": [{"text": 3}]}, "parts[0].text", "invalid_type"),
        ({"parts": [{}]}, "parts[0].text", "missing_required_parameter"),
        ({"parts": []}, "parts", "invalid_value"),
        ({"parts": [TEXT] * 3}, "parts", "invalid_value"),
        ({"name": "abcd"}, "name", "invalid_value"),
        ({"name": "A"}, "name", "invalid_value"),
        ({"count": 0}, "count", "invalid_value"),
        ({"share": 2.5}, "share", "invalid_value"),
        ({"choice": "x"}, "choice", "invalid_value"),
        ({"epochs": "many"}, "epochs", "invalid_value"),
        ({"pet": {"type": "cow"}}, "pet.type", "invalid_value"),
        ({"pet": {}}, "pet.type", "missing_required_parameter"),
    ],
)
def test_first_invalid_member_is_reported(given: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(Fault) as refused:
        validate(given, Sample)
    assert (refused.value.parameter, refused.value.details["reason"]) == (param, code)


def bodies() -> Iterator[type[Body]]:
    for module in pkgutil.iter_modules(openai.__path__, f"{openai.__name__}."):
        for each in vars(importlib.import_module(module.name)).values():
            if isinstance(each, type) and issubclass(each, Body) and each.__module__ == module.name:
                yield each


@pytest.mark.parametrize("kind", list(bodies()), ids=lambda kind: kind.__name__)
def test_member_errors_contain_no_pydantic_wording(kind: type[Body]) -> None:
    for name, field in kind.model_fields.items():
        for value in (None, True, -1, 1e30, "", "§" * 5_000, [], [3], [{}], {}, {"type": "§"}):
            try:
                validate({field.alias or name: value}, kind)
            except Fault as fault:
                assert "should" not in fault.message, fault.message
